// The engine's grid index behind the library's interface: blocks are indexed as they fill up.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "index/head_index.h"
#include "index/workers.h"
#include "kernels/bounds.h"
#include "kernels/kernels.h"
#include "louver/grid_index.h"

namespace louver {
namespace {

// Blocks that one thread builds at a time.
constexpr int kBuildBlocks = 16;

// For candidates, scores are brought to about +-2^5 log2 units: fine enough for weights, which are rounded to 2^-16 of one there,
// and no upper bound overflows. A threshold beyond all scores is cut to where every decision is the same.
constexpr int kScoreExponent = 5;
constexpr double kMostReference = 4096;

// Scores that may be larger than this are not bounded here: the change of unit would leave float32's range.
constexpr double kMostScore = 0x1p100;

// An upper bound w on 2^x has 2^x <= w (1 + kWeightError): x >= 0 implies w >= this.
constexpr float kReached = 1.0f - 0x1p-15f;

class GridQuery final : public HeadQuery {
  public:
    GridQuery(const GridIndex & index, float key_norm, const QueryBatch & batch) : index_(index), batch_(batch) {
        float most = 0;
        for (int i = 0; i < batch.n; ++i) {
            usable_[static_cast<size_t>(i)] = batch.norm[i] <= kMaxQueryNorm;
            most = usable_[static_cast<size_t>(i)] ? std::max(most, batch.norm[i]) : most;
        }
        const double largest = static_cast<double>(most) * key_norm;
        if (!(largest < kMostScore)) {
            usable_.fill(false);
        }
        const int exponent = largest > 0 && largest < kMostScore ? std::ilogb(largest) : 0;
        to_log2_ = std::ldexp(1.0, std::min(kScoreExponent - exponent, 100));
    }

    void candidates(int first, int count, const double * tau, uint64_t * cells) const override {
        float weight[kMaxBatch * kMaxRun * kBlockCells];
        std::array<float, kMaxBatch> reference;
        for (int i = 0; i < batch_.n; ++i) {
            const double exact = std::clamp(tau[i] * to_log2_, -kMostReference, kMostReference);
            reference[static_cast<size_t>(i)] = std::nextafter(static_cast<float>(exact), -HUGE_VALF);
        }
        constexpr int kStride = kMaxRun * kBlockCells;
        scan(first, count, cells, static_cast<float>(to_log2_), reference.data(), weight, kStride, nullptr);
        for (int i = 0; i < batch_.n; ++i) {
            if (usable_[static_cast<size_t>(i)]) {
                select(weight + i * kStride, count, cells + i * count);
            }
        }
    }

    void weights(int first, int count, const uint64_t * cells, const WeightArgs & a) const override {
        scan(first, count, cells, static_cast<float>(a.to_log2), a.reference, a.weight, a.stride, &a);
        for (int i = 0; i < batch_.n; ++i) {
            if (usable_[static_cast<size_t>(i)]) {
                continue;
            }
            for (int cell = 0; cell < count * kBlockCells; ++cell) {
                const bool wanted = (cells[i * count + cell / kBlockCells] >> cell % kBlockCells & 1) != 0;
                a.weight[i * a.stride + cell] = wanted ? std::numeric_limits<float>::infinity() : 0.0f;
            }
        }
    }

    int64_t preselect(SearchMethod, int, double, const double *, std::span<uint64_t>) const override { return 0; }

  private:
    // Leaves those of the cells whose weight reaches 1.
    static void select(const float * weight, int count, uint64_t * cells) {
        std::array<uint64_t, kMaxRun> kept{};
        std::array<float, kMaxRun> dropped;
        const float threshold = kReached;
        SelectArgs args{};
        args.weight = weight;
        args.threshold = &threshold;
        args.n_query = 1;
        args.n_blocks = count;
        args.visible = cells;
        args.kept = kept.data();
        args.dropped = dropped.data();
        kernels().select(args);
        std::copy_n(kept.begin(), count, cells);
    }

    void scan(int first, int count, const uint64_t * cells, float to_log2, const float * reference, float * weight,
              int64_t weight_stride, const WeightArgs * out) const {
        std::array<double, kMaxBatch> lower{};
        std::array<float, kMaxBatch * kMaxRun> slack;
        std::array<uint64_t, kMaxBatch * kMaxRun> scanned;
        for (int i = 0; i < batch_.n; ++i) {
            for (int b = 0; b < count; ++b) {
                scanned[static_cast<size_t>(i * count + b)] = usable_[static_cast<size_t>(i)] ? cells[i * count + b] : 0;
            }
        }
        ScanArgs args{};
        args.codes = index_.codes(first);
        args.next_codes = first + count < index_.n_blocks() ? index_.codes(first + count) : nullptr;
        args.center = index_.center(first);
        args.step = index_.step(first);
        args.bounds = index_.bounds(first);
        args.cells = scanned.data();
        args.cells_stride = count;
        args.n_blocks = count;
        args.dim = index_.key_dim();
        args.n_query = batch_.n;
        args.query = batch_.query;
        args.query_norm = batch_.norm;
        args.to_log2 = to_log2;
        args.certified = true;
        args.reference = reference;
        args.weight = weight;
        args.weight_stride = weight_stride;
        args.slack = slack.data();
        args.slack_stride = kMaxRun;
        args.lower = lower.data();
        kernels().scan(args);
        for (int i = 0; out != nullptr && i < batch_.n; ++i) {
            out->lower[i] += lower[static_cast<size_t>(i)];
            for (int b = 0; b < count; ++b) {
                const float width = slack[static_cast<size_t>(i * kMaxRun + b)];
                out->estimate[i * out->estimate_stride + b] = std::exp2(-width) / kMeanChordExcess;
            }
        }
    }

    const GridIndex & index_;
    QueryBatch batch_;
    std::array<bool, kMaxBatch> usable_{};
    double to_log2_;
};

class GridHead final : public HeadIndex {
  public:
    GridHead(int dim, int n_threads) : index_(dim, 0, 0), n_threads_(n_threads) {}

    uint64_t indexed(int block) const override { return block < index_.n_blocks() ? index_.indexed(block) : 0; }

    void reserve(int64_t n) override {
        if (n > index_.n_cells()) {
            index_.grow(std::max(n, std::min<int64_t>(2 * index_.n_cells(), std::numeric_limits<int32_t>::max())));
        }
    }

    // The last block waits until it is full: a grid made for a few keys seldom fits the next one.
    void append(const Rows & keys, int64_t first, int64_t n, const uint64_t * live) override {
        repair(keys, static_cast<int>(first / kBlockCells), static_cast<int>(n / kBlockCells), live);
    }

    void update(const Rows & keys, int64_t n, const uint64_t * live, std::span<const int64_t> positions) override {
        std::vector<int> blocks;
        for (const int64_t position : positions) {
            index_.invalidate(position, 1);
            blocks.push_back(static_cast<int>(position / kBlockCells));
        }
        std::sort(blocks.begin(), blocks.end());
        blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
        for (const int block : blocks) {
            if (block < n / kBlockCells) {
                repair(keys, block, block + 1, live);
            }
        }
    }

    void remove(std::span<const int64_t> positions) override {
        for (const int64_t position : positions) {
            index_.invalidate(position, 1);
        }
    }

    void rebuild(const Rows & keys, int64_t n, const uint64_t * live) override {
        index_.invalidate(0, n);
        key_norm_ = 0;
        repair(keys, 0, n_blocks_for(n), live);
    }

    std::unique_ptr<HeadQuery> query(const QueryBatch & batch) const override {
        return std::make_unique<GridQuery>(index_, key_norm_, batch);
    }

    int64_t block_bytes() const override { return static_cast<int64_t>(index_.block_bytes()); }
    size_t bytes() const override { return index_.bytes(); }

  private:
    void repair(const Rows & keys, int first, int end, const uint64_t * live) {
        const int64_t n_parts = (end - first + kBuildBlocks - 1) / kBuildBlocks;
        parallel_for(n_parts, n_threads_, [&](int64_t part) {
            const int begin = first + static_cast<int>(part) * kBuildBlocks;
            for (int block = begin; block < std::min(begin + kBuildBlocks, end); ++block) {
                index_.repair(block, live[block], keys, Rows{});
            }
        });
        for (int block = first; block < end; ++block) {
            key_norm_ = std::max(key_norm_, index_.bounds(block)->key_norm);
        }
    }

    GridIndex index_;
    int n_threads_;
    float key_norm_ = 0;  // the largest of an indexed key, or of one that was
};

}  // namespace

std::unique_ptr<HeadIndex> make_grid_head(int dim, int n_threads) { return std::make_unique<GridHead>(dim, n_threads); }

}  // namespace louver
