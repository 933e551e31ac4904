// The ball index behind the library's interface: new and rewritten keys wait outside of the groups until there are many.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "index/ball_head.h"
#include "kernels/bounds.h"
#include "kernels/kernels.h"

namespace louver {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class BallHeadQuery final : public HeadQuery {
  public:
    BallHeadQuery(const BallIndex & index, const QueryBatch & batch, int dim) : batch_(batch) {
        for (int i = 0; i < batch.n; ++i) {
            queries_.push_back(std::make_unique<BallQuery>(index, batch.query + static_cast<ptrdiff_t>(i) * padded(dim)));
        }
    }

    void candidates(int first, int count, const double * tau, uint64_t * cells) const override {
        double lower[kMaxRun * kBlockCells];
        double upper[kMaxRun * kBlockCells];
        for (int i = 0; i < batch_.n; ++i) {
            queries_[static_cast<size_t>(i)]->bounds(first, count, lower, upper);
            for (int cell = 0; cell < count * kBlockCells; ++cell) {
                const uint64_t below = upper[cell] < tau[i] ? 1 : 0;
                cells[i * count + cell / kBlockCells] &= ~(below << cell % kBlockCells);
            }
        }
    }

    void weights(int first, int count, const uint64_t * cells, const WeightArgs & a) const override {
        double lower[kMaxRun * kBlockCells];
        double upper[kMaxRun * kBlockCells];
        for (int i = 0; i < batch_.n; ++i) {
            queries_[static_cast<size_t>(i)]->bounds(first, count, lower, upper);
            for (int b = 0; b < count; ++b) {
                float * weight = a.weight + i * a.stride + b * kBlockCells;
                double width = 0;
                for (int cell = 0; cell < kBlockCells; ++cell) {
                    weight[cell] = 0;
                    if ((cells[i * count + b] >> cell & 1) == 0) {
                        continue;
                    }
                    const int at = b * kBlockCells + cell;
                    weight[cell] = upper_weight(in_log2(upper[at], a.to_log2, a.reference[i], 1));
                    a.lower[i] += std::exp2(in_log2(lower[at], a.to_log2, a.reference[i], -1)) * (1.0 - kWeightError);
                    width += upper[at] - lower[at];
                }
                // Half the mean width of the interval.
                const int n = std::popcount(cells[i * count + b]);
                const double half = n > 0 ? 0.5 * width / n * a.to_log2 : 0.0;
                a.estimate[i * a.estimate_stride + b] = std::isfinite(half) ? static_cast<float>(std::exp2(-half)) : 0.0f;
            }
        }
    }

    int64_t preselect(SearchMethod method, int i, double tau, const double * subspace_tau,
                      std::span<uint64_t> cells) const override {
        const BallQuery & query = *queries_[static_cast<size_t>(i)];
        const int n_blocks = static_cast<int>(cells.size());
        if (method == SearchMethod::sweep) {
            return query.sweep(tau, n_blocks, cells.data());
        }
        query.filter(subspace_tau, n_blocks, cells.data());
        return 0;
    }

  private:
    // score * to_log2 - reference, rounded outward: the product and the difference round once each.
    static double in_log2(double score, double to_log2, float reference, int sign) {
        const double scaled = score * to_log2;
        const double x = scaled - reference;
        return std::isfinite(scaled) ? x + sign * (std::fabs(scaled) + std::fabs(x)) * 0x1p-52 : x;
    }

    // At least 2^x and at least 2^kMinLog2; kWeightError covers the rounding of exp2 and to float32.
    static float upper_weight(double x) {
        const double weight = std::exp2(std::max(x, static_cast<double>(kMinLog2))) * (1.0 + kWeightError);
        return weight < 0x1p127 ? static_cast<float>(weight) : kInfinity;
    }

    QueryBatch batch_;
    std::vector<std::unique_ptr<BallQuery>> queries_;
};

}  // namespace

BallHead::BallHead(int dim, const BallOptions & options) : dim_(dim), options_(options), index_(dim, options) {}

void BallHead::append(const Rows & keys, int64_t first, int64_t n, const uint64_t * live) {
    n_waiting_ += n - first;
    merge(keys, n, live, first == 0);
}

void BallHead::update(const Rows & keys, int64_t n, const uint64_t * live, std::span<const int64_t> positions) {
    remove(positions);
    n_waiting_ += static_cast<int64_t>(positions.size());
    merge(keys, n, live, false);
}

void BallHead::remove(std::span<const int64_t> positions) {
    for (const int64_t position : positions) {
        index_.invalidate(position);
    }
}

void BallHead::rebuild(const Rows & keys, int64_t n, const uint64_t * live) {
    index_.rebuild(keys, n, live);
    n_waiting_ = 0;
}

void BallHead::merge(const Rows & keys, int64_t n, const uint64_t * live, bool at_once) {
    if (!at_once && n_waiting_ < options_.merge_at) {
        return;
    }
    index_.merge(keys, n, live);
    n_waiting_ = 0;
}

void BallHead::restore(const Rows & keys, int64_t n, const std::vector<uint32_t> & groups) {
    index_.restore(keys, n, groups);
    n_waiting_ = 0;
}

std::unique_ptr<HeadQuery> BallHead::query(const QueryBatch & batch) const {
    return std::make_unique<BallHeadQuery>(index_, batch, dim_);
}

}  // namespace louver
