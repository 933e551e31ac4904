#include "louver/decode.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "attention/scratch.h"
#include "kernels/bounds.h"
#include "kernels/kernels.h"

namespace louver {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

// The reference of a head is the largest exact score of a few cells that tend to weigh much.
constexpr int kProbesFirst = 4;
constexpr int kProbesLast = 12;

// 2^-slack: from a cell's upper weight to its estimated one. Taylor in the denominator; only compensation uses it.
float estimate_factor(float slack) {
    const float y = slack * 0.6931472f;
    return 1.0f / (1.0f + y * (1.0f + y * (0.5f + y * (1.0f / 6.0f))));
}

// How far float32 may be from the exact score of a key of that norm, in log2 units.
double score_error(float query_norm, float key_norm, int dim, double to_log2) {
    return (2.0 * dim + 16.0) * kUnit * query_norm * key_norm * to_log2;
}

// Cells before `first_end` and from `last_begin` on are always attended.
struct Always {
    int64_t first_end;
    int64_t last_begin;

    uint64_t of_block(int block) const {
        const int64_t start = static_cast<int64_t>(block) * kBlockCells;
        return below(first_end - start) | ~below(last_begin - start);
    }

  private:
    static uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }
};

class Decoder {
  public:
    Decoder(const DecodeTask & task, const Team & team, void * memory)
        : t_(task),
          team_(team),
          s_(static_cast<std::byte *>(memory), task.n_head, task.n_head_kv, task.n_kv, task.keys[0].dim, task.values[0].dim,
             team.rank, team.size),
          k_(kernels()),
          dense_(task.settings.epsilon <= 0),
          gqa_(task.n_gqa()),
          key_width_(padded(task.keys[0].dim)),
          value_width_(padded(task.values[0].dim)),
          to_log2_(static_cast<double>(task.scale) * kLog2E) {}

    Outcome run() {
        count_visible();
        begin();
        team_.barrier();
        if (!failed() && !dense_) {
            const MassOracle oracle(t_.settings.epsilon, n_visible_);
            for_each_chunk([&](int first, int count) { scan_chunk(oracle, first, count); });
            team_.barrier();
            narrow(oracle);
            for_each_chunk([&](int first, int count) { refine_chunk(first, count); });
            team_.barrier();
            choose(oracle);
        }
        if (!failed()) {
            for_each_chunk([&](int first, int count) { dense_ ? attend_all(first, count) : attend_survivors(first, count); });
            report_finite();
        }
        team_.barrier();
        if (failed()) {
            return Outcome::not_finite;
        }
        for (int h = team_.rank; h < t_.n_head; h += team_.size) {
            combine(h);
        }
        if (t_.settings.check) {
            t_.checked[team_.rank] += checked_;
        }
        return Outcome::done;
    }

  private:
    template <class F> void for_each_chunk(F && f) const {
        const int n_chunks = (s_.n_blocks + kChunkBlocks - 1) / kChunkBlocks;
        for (int chunk = team_.rank; chunk < n_chunks; chunk += team_.size) {
            const int first = chunk * kChunkBlocks;
            f(first, std::min(kChunkBlocks, s_.n_blocks - first));
        }
    }

    void fail() { s_.not_finite[team_.rank] = 1; }
    bool failed() const {
        return std::any_of(s_.not_finite, s_.not_finite + team_.size, [](int32_t raised) { return raised != 0; });
    }

    const float * query(int h) const { return s_.query + static_cast<size_t>(h) * static_cast<size_t>(key_width_); }
    float * weight(int h) const { return s_.weight + h * s_.weight_stride; }
    float * slack(int h) const { return s_.slack + static_cast<size_t>(h) * static_cast<size_t>(s_.n_blocks); }
    size_t slot(int rank, int h) const {
        return static_cast<size_t>(rank) * static_cast<size_t>(t_.n_head) + static_cast<size_t>(h);
    }
    Partial & partial(int rank, int h) const { return s_.partial[slot(rank, h)]; }
    Partial & mine(int h) const { return partial(team_.rank, h); }
    float * output(int rank, int h) const { return s_.output + slot(rank, h) * static_cast<size_t>(value_width_); }
    uint64_t * kept_of(int kv_head) const { return s_.kept + kv_head * kChunkBlocks; }
    uint64_t indexed(int kv_head, int block) const { return t_.visible[block] & t_.index[kv_head]->indexed(block); }

    // Which cells the settings keep whatever their score, from the first and the last visible ones.
    void count_visible() {
        n_visible_ = 0;
        for (int b = 0; b < s_.n_blocks; ++b) {
            n_visible_ += std::popcount(t_.visible[b]);
        }
        always_ = {nth_visible(t_.settings.sinks), nth_visible_from_end(t_.settings.recent)};
    }
    // One past the n-th visible cell, 0 for n = 0.
    int64_t nth_visible(int n) const {
        for (int b = 0; n > 0 && b < s_.n_blocks; ++b) {
            for (uint64_t left = t_.visible[b]; left != 0; left &= left - 1) {
                if (--n == 0) {
                    return static_cast<int64_t>(b) * kBlockCells + std::countr_zero(left) + 1;
                }
            }
        }
        return n > 0 ? t_.n_kv : 0;
    }
    // The n-th visible cell from the end, n_kv for n = 0.
    int64_t nth_visible_from_end(int n) const {
        if (n == 0) {
            return std::numeric_limits<int64_t>::max();
        }
        for (int b = s_.n_blocks - 1; b >= 0; --b) {
            for (uint64_t left = t_.visible[b]; left != 0;) {
                const int cell = 63 - std::countl_zero(left);
                if (--n == 0) {
                    return static_cast<int64_t>(b) * kBlockCells + cell;
                }
                left &= ~(uint64_t{1} << cell);
            }
        }
        return 0;
    }

    // Queries, their norms and references, for the KV heads of this thread; clears what this thread sums up.
    void begin() {
        s_.not_finite[team_.rank] = 0;
        for (int h = 0; h < t_.n_head; ++h) {
            mine(h) = {};
            mine(h).peak = dense_ ? -kInfinity : 0.0f;
            std::fill(output(team_.rank, h), output(team_.rank, h) + value_width_, 0.0f);
            s_.lower[slot(team_.rank, h)] = 0;
            s_.coarse[slot(team_.rank, h)] = {};
            s_.fine[slot(team_.rank, h)] = {};
        }
        for (int g = team_.rank; g < t_.n_head_kv; g += team_.size) {
            for (int h = g * gqa_; h < (g + 1) * gqa_; ++h) {
                begin_head(h);
            }
            if (!dense_) {
                set_references(g);
            }
        }
    }

    void begin_head(int h) {
        float * q = s_.query + static_cast<size_t>(h) * static_cast<size_t>(key_width_);
        const Rows source = {t_.query + h * t_.query_stride, 0, t_.keys[0].dim, DType::f32};
        k_.rows_to_f32(source, nullptr, 1, q, {});
        double squared = 0;
        for (int c = 0; c < source.dim; ++c) {
            squared += static_cast<double>(q[c]) * q[c];
        }
        s_.query_norm[h] = static_cast<float>(std::sqrt(squared)) * kNormInflation;
        s_.reference[h] = 0;
        if (!std::isfinite(s_.query_norm[h])) {
            fail();
        }
    }

    void set_references(int kv_head) {
        int n = 0;
        for (int b = 0; n < kProbesFirst && b < s_.n_blocks; ++b) {
            for (uint64_t left = t_.visible[b]; left != 0 && n < kProbesFirst; left &= left - 1) {
                s_.cells[n++] = b * kBlockCells + std::countr_zero(left);
            }
        }
        const int wanted = n + kProbesLast;
        for (int b = s_.n_blocks - 1; n < wanted && b >= 0; --b) {
            for (uint64_t left = t_.visible[b]; left != 0 && n < wanted;) {
                const int cell = 63 - std::countl_zero(left);
                s_.cells[n++] = b * kBlockCells + cell;
                left &= ~(uint64_t{1} << cell);
            }
        }
        if (n == 0) {
            return;
        }
        k_.rows_to_f32(t_.keys[kv_head], s_.cells, n, s_.keys, {});
        k_.dots(query(kv_head * gqa_), gqa_, s_.keys, n, key_width_, s_.scores, kBlockCells);
        for (int j = 0; j < gqa_; ++j) {
            const float peak = k_.largest(s_.scores + j * kBlockCells, n) * static_cast<float>(to_log2_);
            s_.reference[kv_head * gqa_ + j] = peak;
            if (!std::isfinite(peak)) {
                fail();
            }
        }
    }

    void scan_chunk(const MassOracle & oracle, int first, int count) {
        uint64_t cells[kChunkBlocks];
        for (int g = 0; g < t_.n_head_kv; ++g) {
            const GridIndex & index = *t_.index[g];
            const int h = g * gqa_;
            int scanned = 0;
            for (int b = 0; b < count; ++b) {
                cells[b] = indexed(g, first + b);
                scanned += std::popcount(cells[b]);
            }
            ScanArgs args{};
            args.codes = index.codes(first);
            args.center = index.center(first);
            args.step = index.step(first);
            args.bounds = index.bounds(first);
            args.cells = cells;
            args.n_blocks = count;
            args.dim = index.key_dim();
            args.n_query = gqa_;
            args.query = query(h);
            args.query_norm = s_.query_norm + h;
            args.to_log2 = static_cast<float>(to_log2_);
            args.certified = t_.settings.certified;
            args.reference = s_.reference + h;
            args.candidate = oracle.coarse().data();
            args.weight = weight(h) + static_cast<int64_t>(first) * kBlockCells;
            args.weight_stride = s_.weight_stride;
            args.slack = slack(h) + first;
            args.slack_stride = s_.n_blocks;
            args.lower = s_.lower + slot(team_.rank, h);
            args.below = s_.coarse[slot(team_.rank, h)].data();
            k_.scan(args);
            for (int j = 0; j < gqa_; ++j) {
                mine(h + j).scanned += scanned;
            }
            add_unindexed(g, first, count);
        }
    }

    // Visible cells that the index does not cover are attended for sure; their exact weights belong to the lower bound.
    void add_unindexed(int kv_head, int first, int count) {
        uint64_t unindexed[kChunkBlocks];
        for (int b = 0; b < count; ++b) {
            unindexed[b] = t_.visible[first + b] & ~t_.index[kv_head]->indexed(first + b);
        }
        const int n = list_cells(first, unindexed, count, 0);
        for (int i = 0; i < n; i += kBlockCells) {
            const int tile = std::min(kBlockCells, n - i);
            k_.rows_to_f32(t_.keys[kv_head], s_.cells + i, tile, s_.keys, {});
            const float key_norm = largest_norm(tile);
            const bool usable = std::isfinite(key_norm);  // else narrow() finds the total infinite
            k_.dots(query(kv_head * gqa_), gqa_, s_.keys, tile, key_width_, s_.scores, kBlockCells);
            for (int j = 0; j < gqa_; ++j) {
                const int h = kv_head * gqa_ + j;
                mine(h).key_norm = std::max(mine(h).key_norm, key_norm);
                const float sum = k_.exp2_sum(s_.scores + j * kBlockCells, tile, static_cast<float>(to_log2_), s_.reference[h]);
                const double error = score_error(s_.query_norm[h], key_norm, t_.keys[0].dim, to_log2_);
                s_.lower[slot(team_.rank, h)] += usable ? sum * std::exp2(-error) : std::numeric_limits<double>::infinity();
            }
        }
    }

    float largest_norm(int n) const {
        double largest = 0;
        for (int i = 0; i < n; ++i) {
            const float * key = s_.keys + i * key_width_;
            double squared = 0;
            for (int c = 0; c < key_width_; ++c) {
                squared += static_cast<double>(key[c]) * key[c];
            }
            largest = squared <= largest ? largest : squared;  // a NaN is taken over
        }
        return static_cast<float>(std::sqrt(largest)) * kNormInflation;
    }

    // The team's sums of the first pass, to each head's second candidates. Every thread does the same, as in choose().
    void narrow(const MassOracle & oracle) {
        for (int h = 0; h < t_.n_head; ++h) {
            double lower = 0;
            Sums below{};
            for (int rank = 0; rank < team_.size; ++rank) {
                lower += s_.lower[slot(rank, h)];
                for (size_t j = 0; j < below.size(); ++j) {
                    below[j] += s_.coarse[slot(rank, h)][j];
                }
            }
            if (!std::isfinite(lower)) {
                fail();
            }
            s_.total[h] = lower;
            s_.bracket[h] = oracle.narrow(below, lower);
        }
    }

    void refine_chunk(int first, int count) {
        for (int h = 0; h < t_.n_head; ++h) {
            k_.sums_below(weight(h) + static_cast<int64_t>(first) * kBlockCells, static_cast<int64_t>(count) * kBlockCells,
                          s_.bracket[h].fine.data(), s_.fine[slot(team_.rank, h)].data());
        }
    }

    void choose(const MassOracle & oracle) {
        for (int h = 0; h < t_.n_head; ++h) {
            Sums below{};
            for (int rank = 0; rank < team_.size; ++rank) {
                for (size_t j = 0; j < below.size(); ++j) {
                    below[j] += s_.fine[slot(rank, h)][j];
                }
            }
            s_.threshold[h] = oracle.threshold(s_.bracket[h], below, s_.total[h]);
        }
    }

    // The chunk's survivors for one KV head: what any of the group's heads needs, one gather serves all of them.
    void select_chunk(int kv_head, int first, int count) {
        uint64_t * kept = kept_of(kv_head);
        for (int b = 0; b < count; ++b) {
            kept[b] = always_.of_block(first + b) | ~t_.index[kv_head]->indexed(first + b);
        }
        k_.select(weight(kv_head * gqa_) + static_cast<int64_t>(first) * kBlockCells, s_.weight_stride,
                  s_.threshold + kv_head * gqa_, gqa_, count, kept);
        for (int b = 0; b < count; ++b) {
            kept[b] &= t_.visible[first + b];
        }
        s_.n_cells[kv_head] = list_cells(first, kept, count, kv_head * kChunkCells);
    }

    // Everything visible, block by block: the heads of a row lie side by side, so that memory streams only if all of them are
    // read before the next rows are.
    void attend_all(int first, int count) {
        for (int b = first; b < first + count; ++b) {
            const int32_t * cells = s_.cells + (b - first) % 2 * kBlockCells;
            const int n = b == first ? list_cells(b, &t_.visible[b], 1, 0) : n_next_;
            n_next_ = b + 1 < first + count ? list_cells(b + 1, &t_.visible[b + 1], 1, (b + 1 - first) % 2 * kBlockCells) : 0;
            const int32_t * next = s_.cells + (b + 1 - first) % 2 * kBlockCells;
            for (int g = 0; n > 0 && g < t_.n_head_kv; ++g) {
                const int begin = n_next_ * g / t_.n_head_kv;
                const int share = n_next_ * (g + 1) / t_.n_head_kv - begin;
                attend_tile(g, cells, n, {all_heads(t_.keys), next + begin, share}, {all_heads(t_.values), next + begin, share});
            }
        }
    }

    Rows all_heads(const Rows * rows) const { return {rows[0].base, rows[0].stride, rows[0].dim * t_.n_head_kv, rows[0].type}; }

    // The cells of the bits of `count` blocks from `first` on, to s_.cells from `at` on; returns how many.
    int list_cells(int first, const uint64_t * bits, int count, int at) {
        int n = 0;
        for (int b = 0; b < count; ++b) {
            for (uint64_t left = bits[b]; left != 0; left &= left - 1) {
                s_.cells[at + n++] = (first + b) * kBlockCells + std::countr_zero(left);
            }
        }
        return n;
    }

    void attend_survivors(int first, int count) {
        for (int g = 0; g < t_.n_head_kv; ++g) {
            select_chunk(g, first, count);
        }
        // Survivors lie scattered: each gather asks memory for the rows of the next one, whichever head's they are.
        Tile tile = next_tile({-1, 0, 0});
        while (tile.kv_head < t_.n_head_kv) {
            const Tile next = next_tile(tile);
            const int32_t * cells = cells_of(tile);
            const bool last = next.kv_head == t_.n_head_kv;
            attend_tile(tile.kv_head, cells, tile.n, {t_.values[tile.kv_head], cells, tile.n},
                        last ? Ahead{} : Ahead{t_.keys[next.kv_head], cells_of(next), next.n});
            tile = next;
        }
        for (int g = 0; g < t_.n_head_kv; ++g) {
            account_dropped(g, first, count);
            if (t_.settings.check) {
                check_chunk(g, first, count, kept_of(g));
            }
        }
    }

    // Up to 64 survivors of one KV head's list.
    struct Tile {
        int kv_head;
        int start;
        int n;
    };
    // The tile after `tile`, of the same head or the next with any survivors; kv_head is n_head_kv after the last one.
    Tile next_tile(const Tile & tile) const {
        int g = tile.kv_head;
        int start = tile.start + tile.n;
        while (g < 0 || (g < t_.n_head_kv && start >= s_.n_cells[g])) {
            ++g;
            start = 0;
        }
        return {g, start, g < t_.n_head_kv ? std::min(kBlockCells, s_.n_cells[g] - start) : 0};
    }
    const int32_t * cells_of(const Tile & tile) const { return s_.cells + tile.kv_head * kChunkCells + tile.start; }

    // Exact attention of the group's heads to 1 to 64 cells, with a running peak (online softmax, arXiv 1805.02867).
    // The first rows to prefetch come with the keys' gather, the second with the values'.
    void attend_tile(int kv_head, const int32_t * cells, int n, const Ahead & with_keys, const Ahead & with_values) {
        const int h0 = kv_head * gqa_;
        k_.rows_to_f32(t_.keys[kv_head], cells, n, s_.keys, with_keys);
        k_.dots(query(h0), gqa_, s_.keys, n, key_width_, s_.scores, kBlockCells);
        for (int j = 0; j < gqa_; ++j) {
            Partial & p = mine(h0 + j);
            float * scores = s_.scores + j * kBlockCells;
            const float reference = s_.reference[h0 + j];
            const float peak = k_.largest(scores, n) * static_cast<float>(to_log2_) - reference;
            const float raised = !(peak <= p.peak) ? peak : p.peak;  // a NaN is taken over, and found by report_finite
            s_.rescale[j] = std::exp2(p.peak - raised);
            p.kept = p.kept * static_cast<double>(s_.rescale[j]) +
                     static_cast<double>(k_.exp2_sum(scores, n, static_cast<float>(to_log2_), raised + reference));
            p.peak = raised;
            p.attended += n;
        }
        k_.rows_to_f32(t_.values[kv_head], cells, n, s_.values, with_values);
        k_.accumulate(s_.scores, kBlockCells, s_.rescale, gqa_, s_.values, n, value_width_, output(team_.rank, h0));
    }

    // What the chunk's dropped cells weigh at most, and their compensation.
    void account_dropped(int kv_head, int first, int count) {
        const GridIndex & index = *t_.index[kv_head];
        const int h0 = kv_head * gqa_;
        k_.dropped_sums(weight(h0) + static_cast<int64_t>(first) * kBlockCells, s_.weight_stride, gqa_, kept_of(kv_head), count,
                        s_.block_sums, kChunkBlocks);
        bool any = false;
        for (int j = 0; j < gqa_; ++j) {
            Partial & p = mine(h0 + j);
            float * sums = s_.block_sums + j * kChunkBlocks;
            const float scale = std::exp2(-p.peak);
            s_.rescale[j] = 1.0f;
            for (int b = 0; b < count; ++b) {
                if (indexed(kv_head, first + b) != 0) {
                    p.key_norm = std::max(p.key_norm, index.bounds(first)[b].key_norm);
                }
                if (sums[b] > 0) {
                    any = true;
                    p.dropped += sums[b];
                    p.value_norm = std::max(p.value_norm, index.bounds(first)[b].value_norm);
                    sums[b] *= estimate_factor(slack(h0 + j)[first + b]);
                    p.compensation += t_.settings.compensate ? sums[b] : 0.0f;
                    sums[b] *= scale;
                }
            }
        }
        if (any && t_.settings.compensate) {
            Rows means = index.value_means();
            means.base = means.row(first);
            k_.rows_to_f32(means, nullptr, count, s_.values, {});
            for (int b = 0; b < count; ++b) {
                if (indexed(kv_head, first + b) == 0) {
                    std::fill(s_.values + b * value_width_, s_.values + (b + 1) * value_width_, 0.0f);
                }
            }
            k_.accumulate(s_.block_sums, kChunkBlocks, s_.rescale, gqa_, s_.values, count, value_width_, output(team_.rank, h0));
        }
    }

    // Every visible cell of the chunk in float64, against what was decided without looking.
    void check_chunk(int kv_head, int first, int count, const uint64_t * kept) {
        for (int b = 0; b < count; ++b) {
            for (uint64_t left = t_.visible[first + b]; left != 0; left &= left - 1) {
                const int bit = std::countr_zero(left);
                const int32_t cell = (first + b) * kBlockCells + bit;
                const bool attended = (kept[b] >> bit & 1) != 0;
                const bool bounded = (indexed(kv_head, first + b) >> bit & 1) != 0;
                k_.rows_to_f32(t_.keys[kv_head], &cell, 1, s_.keys, {});
                for (int h = kv_head * gqa_; h < (kv_head + 1) * gqa_; ++h) {
                    double dot = 0;
                    for (int c = 0; c < key_width_; ++c) {
                        dot += static_cast<double>(query(h)[c]) * s_.keys[c];
                    }
                    const double exact = std::exp2(dot * to_log2_ - s_.reference[h]);
                    ++checked_.pairs;
                    checked_.misses += !attended && dot >= tau(h);
                    checked_.bound_violations += bounded && exact > weight(h)[cell] * (1.0 + kWeightError);
                    (attended ? mine(h).checked_kept : mine(h).checked_dropped) += exact;
                }
            }
        }
    }

    // A dropped cell's upper weight is under the threshold; so is its exact score under this.
    float tau(int h) const {
        if (dense_) {
            return -kInfinity;
        }
        const double log2_weight = std::log2(static_cast<double>(s_.threshold[h])) + 4 * kWeightError;
        const double reference = s_.reference[h];
        const double raw = (log2_weight + reference + std::fabs(reference) * 0x1p-20) / to_log2_;
        return std::nextafter(static_cast<float>(raw), kInfinity);
    }

    void report_finite() {
        for (int h = 0; h < t_.n_head; ++h) {
            const Partial & p = mine(h);
            double sum = p.kept + p.dropped;
            for (int c = 0; c < value_width_; ++c) {
                sum += output(team_.rank, h)[c] * 0.0f;
            }
            if (!std::isfinite(sum) || std::isnan(p.peak) || p.peak == kInfinity) {
                fail();
            }
        }
    }

    void combine(int h) {
        Partial all{};
        all.peak = -kInfinity;
        for (int rank = 0; rank < team_.size; ++rank) {
            all.peak = std::max(all.peak, partial(rank, h).peak);
        }
        double kept = 0;  // in units of 2^peak, as the sum of the outputs
        float * sum = output(0, h);
        for (int rank = 0; rank < team_.size; ++rank) {
            const Partial & p = partial(rank, h);
            const float factor = p.peak == -kInfinity ? 0.0f : std::exp2(p.peak - all.peak);
            kept += p.kept * static_cast<double>(factor);
            all.dropped += p.dropped;
            all.compensation += p.compensation;
            all.value_norm = std::max(all.value_norm, p.value_norm);
            all.key_norm = std::max(all.key_norm, p.key_norm);
            all.attended += p.attended;
            all.scanned += p.scanned;
            all.checked_kept += p.checked_kept;
            all.checked_dropped += p.checked_dropped;
            const float * part = output(rank, h);
            for (int c = 0; c < value_width_; ++c) {
                sum[c] = (rank == 0 ? 0.0f : sum[c]) + part[c] * factor;
            }
        }
        const double unit = all.peak == -kInfinity ? 1.0 : std::exp2(static_cast<double>(all.peak));
        const double mass = kept + all.compensation / unit;
        const float inverse = mass > 0 ? static_cast<float>(1.0 / mass) : 0.0f;  // no visible cell: 0, as stock
        double norm_squared = 0;
        float * out = reinterpret_cast<float *>(t_.output + h * t_.output_stride);
        for (int c = 0; c < t_.values[0].dim; ++c) {
            out[c] = sum[c] * inverse;
            norm_squared += static_cast<double>(out[c]) * out[c];
        }

        // The attended cells' exact weights came from float32 scores; the mass proper is at least this.
        const double error = score_error(s_.query_norm[h], all.key_norm, t_.keys[0].dim, to_log2_);
        const double least = kept * unit * std::exp2(-error);
        const double delta = dropped_share(all.dropped, least);
        HeadCertificate & certificate = t_.certificates[h];
        certificate.tau = tau(h);
        certificate.n_visible = static_cast<int32_t>(n_visible_);
        certificate.n_scanned = all.scanned;
        certificate.n_attended = all.attended;
        certificate.delta = static_cast<float>(delta * (1 + 0x1p-20));
        certificate.error_bound = error_bound(all, least, std::sqrt(norm_squared));
        if (t_.settings.check && !dense_) {
            const double truth = all.checked_dropped / std::max(all.checked_kept + all.checked_dropped, 1e-300);
            checked_.mass_violations += truth > static_cast<double>(certificate.delta);
        }
    }

    // |output - dense| <= (largest |value| + |output|) * max((y + U) / (K + U), y / K): U dropped at most, y compensation, K
    // kept at least (docs/guarantee.md, "The output").
    static float error_bound(const Partial & all, double least, double output_norm) {
        if (all.dropped <= 0) {
            return 0;
        }
        const double upper = all.dropped * (1.0 + kWeightError);
        const double added = all.compensation * (1.0 + kWeightError);
        const double share = std::max((added + upper) / (least + upper), added / std::max(least, 1e-300));
        return static_cast<float>((all.value_norm + output_norm) * share * (1 + 0x1p-20));
    }

    const DecodeTask & t_;
    const Team & team_;
    Scratch s_;
    const Kernels & k_;
    bool dense_;
    int gqa_;
    int key_width_;
    int value_width_;
    double to_log2_;
    int64_t n_visible_ = 0;
    Always always_{0, 0};
    CheckCounts checked_;
    int n_next_ = 0;  // of attend_all: cells listed for the block after this one
};

}  // namespace

size_t decode_scratch_bytes(int n_head, int n_head_kv, int64_t n_kv, int key_dim, int value_dim, int team_size) {
    return Scratch(nullptr, n_head, n_head_kv, n_kv, key_dim, value_dim, 0, team_size).bytes;
}

Outcome decode(const DecodeTask & task, const Team & team, void * scratch) { return Decoder(task, team, scratch).run(); }

}  // namespace louver
