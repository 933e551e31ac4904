#include "louver/decode.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "attention/certificate.h"
#include "attention/lap.h"
#include "attention/scratch.h"
#include "attention/visible.h"
#include "kernels/bounds.h"
#include "kernels/kernels.h"

namespace louver {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

// The reference of a query is the largest exact score of a few cells that tend to weigh much.
constexpr int kProbesFirst = 4;
constexpr int kProbesLast = 12;

// With fewer blocks for each thread dense attention deals blocks and heads.
constexpr int kFewBlocks = 8;

// Up to so many threads each of them works out every threshold, which saves a barrier.
constexpr int kSmallTeam = 4;

// From blocks' sums of upper weights to estimated ones: 2^-slack, and what the chord lies above 2^x on average. Taylor in the
// denominator; only compensation uses it.
void estimate(const float * upper, const float * slack, int n, float * out) {
    for (int i = 0; i < n; ++i) {
        const float y = slack[i] * 0.6931472f;
        out[i] = upper[i] / (kMeanChordExcess * (1.0f + y * (1.0f + y * (0.5f + y * (1.0f / 6.0f)))));
    }
}

class Decoder {
  public:
    Decoder(const DecodeTask & task, const Team & team, void * memory)
        : t_(task),
          team_(team),
          s_(static_cast<std::byte *>(memory),
             {task.n_token, task.n_head, task.n_head_kv, task.n_kv, task.keys[0].dim, task.values[0].dim}, team.rank, team.size),
          k_(kernels()),
          dense_(task.settings.epsilon <= 0),
          gqa_(task.n_gqa()),
          n_group_(task.n_token * gqa_),
          n_query_(task.n_token * task.n_head),
          key_width_(padded(task.keys[0].dim)),
          value_width_(padded(task.values[0].dim)),
          chunk_(s_.chunk_blocks),
          to_log2_(static_cast<double>(task.scale) * kLog2E),
          lap_(task.times != nullptr ? task.times + team.rank : nullptr) {}

    Outcome run() {
        begin();
        barrier(&PhaseTimes::begin);
        if (!dense_ && !failed()) {
            select();
        }
        if (!failed()) {
            dense_ ? attend_all() : attend_survivors();
            report_finite();
        }
        barrier(&PhaseTimes::attend);
        if (failed()) {
            return Outcome::not_finite;
        }
        for (int q = team_.rank; q < n_query_; q += team_.size) {
            combine(q);
        }
        if (t_.settings.check) {
            t_.checked[team_.rank] += checked_;
        }
        lap_.mark(&PhaseTimes::combine);
        return Outcome::done;
    }

  private:
    template <class F> void for_each_chunk(F && f) const {
        for (int first = team_.rank * chunk_; first < s_.n_blocks; first += team_.size * chunk_) {
            f(first, std::min(chunk_, s_.n_blocks - first));
        }
    }

    // phase: what the time since the last barrier went into.
    void barrier(int64_t PhaseTimes::*phase) {
        lap_.mark(phase);
        team_.barrier();
        lap_.mark(&PhaseTimes::wait);
    }

    void fail() { std::atomic_ref(s_.not_finite[team_.rank]).store(1, std::memory_order_relaxed); }
    bool failed() const {
        return std::any_of(s_.not_finite, s_.not_finite + team_.size,
                           [](int32_t & raised) { return std::atomic_ref(raised).load(std::memory_order_relaxed) != 0; });
    }

    // Queries are numbered [n_head_kv][n_token][n_gqa].
    int group_of(int q) const { return q / n_group_; }
    int token_of(int q) const { return q % n_group_ / gqa_; }
    int head_of(int q) const { return group_of(q) * gqa_ + q % gqa_; }
    bool all_of(int kv_head) const { return t_.attend_all != nullptr && t_.attend_all[kv_head] != 0; }

    const float * query(int q) const { return s_.query + static_cast<size_t>(q) * static_cast<size_t>(key_width_); }
    float * weight(int q, int block) const {
        return s_.weight + q * s_.weight_stride + static_cast<int64_t>(block) * kBlockCells;
    }
    // Of this thread's own blocks; those of a chunk lie together.
    float * slack(int q, int block) const { return s_.slack + s_.own(q, block, team_.size); }
    float * dropped(int q, int block) const { return s_.dropped + s_.own(q, block, team_.size); }
    uint64_t * kept(int kv_head, int block) const { return s_.kept + s_.own(kv_head, block, team_.size); }
    size_t slot(int rank, int q) const {
        return static_cast<size_t>(rank) * static_cast<size_t>(n_query_) + static_cast<size_t>(q);
    }
    size_t mine(int q) const { return slot(team_.rank, q); }
    Partial & partial(int q) const { return s_.partial[mine(q)]; }
    float * output(int rank, int q) const { return s_.output + slot(rank, q) * static_cast<size_t>(value_width_); }
    double over_team(const double * part, int q) const {
        double sum = 0;
        for (int rank = 0; rank < team_.size; ++rank) {
            sum += part[slot(rank, q)];
        }
        return sum;
    }
    Sums below_over_team(int q) const {
        Sums sums{};
        for (int rank = 0; rank < team_.size; ++rank) {
            for (size_t j = 0; j < sums.size(); ++j) {
                sums[j] += s_.below[slot(rank, q)][j];
            }
        }
        return sums;
    }

    Visible visible(int token) const { return {t_.visible + static_cast<int64_t>(token) * s_.n_blocks, t_.n_kv}; }
    // What any of the tokens sees.
    uint64_t visible_to_any(int block) const {
        uint64_t any = 0;
        for (int token = 0; token < t_.n_token; ++token) {
            any |= visible(token)[block];
        }
        return any;
    }
    uint64_t indexed(int kv_head, int block) const { return t_.index[kv_head]->indexed(block); }
    // Cells that are attended whatever their weight.
    uint64_t always(int kv_head, int block) const {
        uint64_t cells = ~indexed(kv_head, block);
        for (int token = 0; token < t_.n_token; ++token) {
            cells |= s_.sight[token].always.of_block(block) & visible(token)[block];
        }
        return cells;
    }

    // Queries, their norms and references, for the KV heads of this thread; clears what this thread sums up.
    void begin() {
        for (int token = 0; token < t_.n_token; ++token) {
            const Visible seen = visible(token);
            s_.sight[token] = {seen.count(), {seen.end_of_first(t_.settings.sinks), seen.begin_of_last(t_.settings.recent)}};
        }
        std::atomic_ref(s_.not_finite[team_.rank]).store(0, std::memory_order_relaxed);
        for (int q = 0; q < n_query_; ++q) {
            partial(q) = {};
            partial(q).peak = dense_ ? -kInfinity : 0.0f;
            std::fill(output(team_.rank, q), output(team_.rank, q) + value_width_, 0.0f);
            s_.lower[mine(q)] = 0;
            s_.upper[mine(q)] = 0;
            s_.below[mine(q)] = {};
        }
        for (int g = team_.rank; g < t_.n_head_kv; g += team_.size) {
            for (int q = g * n_group_; q < (g + 1) * n_group_; ++q) {
                begin_query(q);
            }
            for (int token = 0; !dense_ && token < t_.n_token; ++token) {
                set_references(g, token);
            }
        }
    }

    void begin_query(int q) {
        float * out = s_.query + static_cast<size_t>(q) * static_cast<size_t>(key_width_);
        const std::byte * source = t_.query + token_of(q) * t_.query_token_stride + head_of(q) * t_.query_stride;
        k_.rows_to_f32({source, 0, t_.keys[0].dim, DType::f32}, nullptr, 1, out);
        double squared = 0;
        for (int c = 0; c < key_width_; ++c) {
            squared += static_cast<double>(out[c]) * out[c];
        }
        s_.query_norm[q] = static_cast<float>(std::sqrt(squared)) * kNormInflation;
        s_.reference[q] = 0;
        if (!(s_.query_norm[q] <= kMaxQueryNorm)) {
            fail();
        }
    }

    void set_references(int kv_head, int token) {
        int n = visible(token).first(kProbesFirst, s_.cells);
        n += visible(token).last(kProbesLast, s_.cells + n);
        if (n == 0) {
            return;
        }
        const int first = kv_head * n_group_ + token * gqa_;
        k_.dots(query(first), gqa_, t_.keys[kv_head], s_.cells, n, s_.scores, kBlockCells, {});
        for (int j = 0; j < gqa_; ++j) {
            const float peak = k_.largest(s_.scores + j * kBlockCells, n) * static_cast<float>(to_log2_);
            s_.reference[first + j] = peak;
            if (!std::isfinite(peak)) {
                fail();
            }
        }
    }

    // From the scan to kept() and dropped(), which this thread knows for its own chunks.
    void select() {
        int64_t most = 0;
        for (int token = 0; token < t_.n_token; ++token) {
            most = std::max(most, s_.sight[token].n_visible);
        }
        const MassOracle oracle(t_.settings.epsilon, most);
        for_each_chunk([&](int first, int count) { scan_chunk(oracle, first, count); });
        barrier(&PhaseTimes::scan);
        guess_thresholds(oracle);
        for_each_chunk([&](int first, int count) {
            for (int g = 0; g < t_.n_head_kv; ++g) {
                select_chunk(g, first, count);
                add_upper(g, first, count);
                prefetch_keys(g, first, count);
            }
        });
        barrier(&PhaseTimes::select);
        verify(oracle);
        lap_.mark(&PhaseTimes::select);
    }

    void scan_chunk(const MassOracle & oracle, int first, int count) {
        for (int g = 0; g < t_.n_head_kv; ++g) {
            if (all_of(g)) {
                continue;
            }
            const GridIndex & index = *t_.index[g];
            const int q0 = g * n_group_;
            for (int q = 0; q < n_group_; ++q) {
                for (int b = 0; b < count; ++b) {
                    const uint64_t cells = visible(q / gqa_)[first + b] & indexed(g, first + b);
                    s_.scanning[q * kChunkBlocks + b] = cells;
                    partial(q0 + q).scanned += std::popcount(cells);
                }
            }
            ScanArgs args{};
            args.codes = index.codes(first);
            args.next_codes = codes_after(g, first);
            args.center = index.center(first);
            args.step = index.step(first);
            args.bounds = index.bounds(first);
            args.cells = s_.scanning;
            args.cells_stride = kChunkBlocks;
            args.n_blocks = count;
            args.dim = index.key_dim();
            args.n_query = n_group_;
            args.query = query(q0);
            args.query_norm = s_.query_norm + q0;
            args.to_log2 = static_cast<float>(to_log2_);
            args.certified = t_.settings.certified;
            args.reference = s_.reference + q0;
            args.candidate = oracle.coarse().data();
            args.weight = weight(q0, first);
            args.weight_stride = s_.weight_stride;
            args.slack = slack(q0, first);
            args.slack_stride = s_.n_own;
            args.lower = s_.lower + mine(q0);
            args.below = s_.below[mine(q0)].data();
            k_.scan(args);
            add_unindexed(g, first, count);
        }
    }

    // The codes that this thread scans next.
    const uint8_t * codes_after(int kv_head, int first) const {
        const int next = first + team_.size * chunk_;
        if (kv_head + 1 < t_.n_head_kv) {
            return t_.index[kv_head + 1]->codes(first);
        }
        return next < s_.n_blocks ? t_.index[0]->codes(next) : nullptr;
    }

    // Visible cells that the index does not cover are attended for sure; their exact weights belong to the lower bound.
    void add_unindexed(int kv_head, int first, int count) {
        uint64_t unindexed[kChunkBlocks];
        for (int b = 0; b < count; ++b) {
            unindexed[b] = visible_to_any(first + b) & ~indexed(kv_head, first + b);
        }
        const int n = list_cells(first, unindexed, count, s_.cells);
        for (int i = 0; i < n; i += kBlockCells) {
            const int tile = std::min(kBlockCells, n - i);
            const int32_t * cells = s_.cells + i;
            const float key_norm = largest_norm(t_.keys[kv_head], cells, tile);
            const bool usable = std::isfinite(key_norm);  // else the total becomes infinite
            k_.dots(query(kv_head * n_group_), n_group_, t_.keys[kv_head], cells, tile, s_.scores, kBlockCells, {});
            for (int j = 0; j < n_group_; ++j) {
                const int q = kv_head * n_group_ + j;
                float * scores = s_.scores + j * kBlockCells;
                hide(scores, cells, tile, q);
                partial(q).key_norm = std::max(partial(q).key_norm, key_norm);
                const float sum = k_.exp2_sum(scores, tile, static_cast<float>(to_log2_), s_.reference[q]);
                const double error = score_error(s_.query_norm[q], key_norm, t_.keys[0].dim, to_log2_);
                s_.lower[mine(q)] += usable ? sum * std::exp2(-error) : std::numeric_limits<double>::infinity();
            }
        }
    }

    float largest_norm(const Rows & keys, const int32_t * cells, int n) const {
        k_.rows_to_f32(keys, cells, n, s_.keys);
        double largest = 0;
        for (int i = 0; i < n; ++i) {
            const float * key = s_.keys + i * key_width_;
            double squared = 0;
            for (int c = 0; c < key_width_; ++c) {
                squared += static_cast<double>(key[c]) * key[c];
            }
            if (!std::isfinite(squared)) {
                return kInfinity;
            }
            largest = std::max(largest, squared);
        }
        return static_cast<float>(std::sqrt(largest)) * kNormInflation;
    }

    // Scores of cells that the query's token does not see become -infinity; returns how many it sees.
    int hide(float * scores, const int32_t * cells, int n, int q) const {
        if (t_.n_token == 1) {
            return n;  // only what it sees is ever listed
        }
        int seen = 0;
        const Visible visible = this->visible(token_of(q));
        for (int i = 0; i < n; ++i) {
            const bool sees = (visible[cells[i] / kBlockCells] >> (cells[i] % kBlockCells) & 1) != 0;
            scores[i] = sees ? scores[i] : -kInfinity;
            seen += sees;
        }
        return seen;
    }

    // From the team's sums to each query's threshold. In a small team every thread finds all of them; in a large one the sums of
    // all threads are too much to read for each, and the queries are dealt out.
    void guess_thresholds(const MassOracle & oracle) {
        if (team_.size <= kSmallTeam) {
            for (int q = 0; q < n_query_; ++q) {
                s_.guess[q] = guess(oracle, q);
            }
        } else {
            for (int q = team_.rank; q < n_query_; q += team_.size) {
                s_.shared_guess[q] = guess(oracle, q);
            }
            barrier(&PhaseTimes::select);
            std::copy(s_.shared_guess, s_.shared_guess + n_query_, s_.guess);
        }
        for (int q = 0; q < n_query_; ++q) {
            s_.threshold[q] = s_.guess[q].threshold;
            if (!std::isfinite(s_.guess[q].total)) {
                fail();
            }
        }
    }

    Guess guess(const MassOracle & oracle, int q) const {
        const double total = over_team(s_.lower, q);
        if (all_of(group_of(q)) || !std::isfinite(total)) {
            return {total, 0};
        }
        Sums below = below_over_team(q);
        for (double & sum : below) {
            sum *= kSampleStep;
        }
        return {total, oracle.guess(below, total)};
    }

    // The chunk's survivors for one KV head: what any of the group's queries needs, one gather serves all of them.
    void select_chunk(int kv_head, int first, int count) {
        uint64_t seen[kChunkBlocks];
        uint64_t * survivors = kept(kv_head, first);
        for (int b = 0; b < count; ++b) {
            seen[b] = visible_to_any(first + b);
            survivors[b] = all_of(kv_head) ? seen[b] : always(kv_head, first + b);
        }
        if (all_of(kv_head)) {
            return;
        }
        const int q0 = kv_head * n_group_;
        SelectArgs args{};
        args.weight = weight(q0, first);
        args.weight_stride = s_.weight_stride;
        args.threshold = s_.threshold + q0;
        args.n_query = n_group_;
        args.n_blocks = count;
        args.visible = seen;
        args.kept = survivors;
        args.dropped = dropped(q0, first);
        args.dropped_stride = s_.n_own;
        k_.select(args);
    }

    // The survivors' keys on their way to L2, while the next chunks are selected.
    void prefetch_keys(int kv_head, int first, int count) const {
        const Rows & keys = t_.keys[kv_head];
        const int64_t bytes = static_cast<int64_t>(row_bytes(keys.type, keys.dim));
        const uint64_t * survivors = kept(kv_head, first);
        for (int b = 0; b < count; ++b) {
            for (uint64_t left = survivors[b]; left != 0; left &= left - 1) {
                const std::byte * row = keys.row(static_cast<int64_t>(first + b) * kBlockCells + std::countr_zero(left));
                for (int64_t offset = 0; offset < bytes; offset += 64) {
                    __builtin_prefetch(row + offset, 0, 2);
                }
            }
        }
    }

    void add_upper(int kv_head, int first, int count) {
        for (int q = kv_head * n_group_; !all_of(kv_head) && q < (kv_head + 1) * n_group_; ++q) {
            const float * sums = dropped(q, first);
            for (int b = 0; b < count; ++b) {
                s_.upper[mine(q)] += sums[b];
            }
        }
    }

    // Where a guess dropped too much, or ended before epsilon did, finer thresholds are tried, with sums over all weights.
    void verify(const MassOracle & oracle) {
        const auto exceeds = [&](int q) { return !oracle.satisfies(over_team(s_.upper, q), s_.guess[q].total); };
        const auto is_open = [&](int q) { return oracle.is_open(s_.threshold[q]); };
        const auto fine = [&](int q) { return oracle.fine(s_.threshold[q], exceeds(q) || !is_open(q), s_.guess[q].total); };
        bool any = false;
        for (int q = 0; q < n_query_; ++q) {
            // A threshold that rises lets the others of its group drop more: then each has to satisfy epsilon by itself.
            const int q0 = group_of(q) * n_group_;
            bool group_open = false;
            for (int other = q0; other < q0 + n_group_; ++other) {
                group_open = group_open || is_open(other);
            }
            s_.refines[q] = !all_of(group_of(q)) && (exceeds(q) || group_open);
            if (s_.refines[q] != 0) {
                any = true;
                const Candidates candidates = fine(q);
                s_.below[mine(q)] = {};
                for_each_chunk([&](int first, int count) {
                    k_.sums_below(weight(q, first), static_cast<int64_t>(count) * kBlockCells, candidates.data(),
                                  s_.below[mine(q)].data());
                });
            }
        }
        if (!any) {
            return;
        }
        barrier(&PhaseTimes::select);
        for (int g = 0; g < t_.n_head_kv; ++g) {
            bool again = false;
            for (int q = g * n_group_; q < (g + 1) * n_group_; ++q) {
                if (s_.refines[q] != 0) {
                    again = true;
                    s_.threshold[q] = oracle.refined(fine(q), below_over_team(q), s_.guess[q].total);
                }
            }
            if (again) {
                for_each_chunk([&](int first, int count) { select_chunk(g, first, count); });
            }
        }
    }

    // Everything visible, block by block: the heads of a row lie side by side, so that memory streams only if all of them are
    // read before the next rows are.
    void attend_all() {
        if (s_.n_blocks < kFewBlocks * team_.size) {
            attend_few();
            return;
        }
        const auto after = [&](int block) {
            return (block + 1) % chunk_ == 0 ? block + 1 + (team_.size - 1) * chunk_ : block + 1;
        };
        int32_t * cells = s_.cells;
        int32_t * next = s_.cells + kBlockCells;
        int block = team_.rank * chunk_;
        int n = list_visible(block, cells);
        while (block < s_.n_blocks) {
            block = after(block);
            const int n_next = list_visible(block, next);
            for (int g = 0; n > 0 && g < t_.n_head_kv; ++g) {
                const int begin = n_next * g / t_.n_head_kv;
                const int share = n_next * (g + 1) / t_.n_head_kv - begin;
                attend_tile(g, cells, n, {all_heads(t_.keys), next + begin, share}, {all_heads(t_.values), next + begin, share});
            }
            std::swap(cells, next);
            n = n_next;
        }
    }

    // A short context lies in the caches: its blocks and heads are dealt out one by one, so that every thread has work.
    void attend_few() {
        for (int unit = team_.rank; unit < s_.n_blocks * t_.n_head_kv; unit += team_.size) {
            const int n = list_visible(unit / t_.n_head_kv, s_.cells);
            if (n > 0) {
                attend_tile(unit % t_.n_head_kv, s_.cells, n, {}, {});
            }
        }
    }

    // Lists what any token sees of a block, nothing behind the last one.
    int list_visible(int block, int32_t * cells) const {
        const uint64_t seen = block < s_.n_blocks ? visible_to_any(block) : 0;
        return list_cells(block, &seen, seen != 0, cells);
    }

    Rows all_heads(const Rows * rows) const { return {rows[0].base, rows[0].stride, rows[0].dim * t_.n_head_kv, rows[0].type}; }

    // Lists the cells of the bits of `count` blocks from `first` on; returns how many.
    static int list_cells(int first, const uint64_t * bits, int count, int32_t * cells) {
        int n = 0;
        for (int b = 0; b < count; ++b) {
            for (uint64_t left = bits[b]; left != 0; left &= left - 1) {
                cells[n++] = (first + b) * kBlockCells + std::countr_zero(left);
            }
        }
        return n;
    }

    // The survivors of a chunk, listed for each KV head.
    struct Survivors {
        int32_t * n;      // [n_head_kv]
        int32_t * cells;  // [n_head_kv][kChunkCells]
    };
    void list_survivors(int first, const Survivors & survivors) const {
        for (int g = 0; g < t_.n_head_kv; ++g) {
            const int count = std::clamp(s_.n_blocks - first, 0, chunk_);
            survivors.n[g] = count > 0 ? list_cells(first, kept(g, first), count, survivors.cells + g * kChunkCells) : 0;
        }
    }
    // Up to 64 survivors of one KV head.
    struct Tile {
        int kv_head;
        int start;
        int n;
        const int32_t * cells;
    };
    // The tile after `tile`, of the same head or the next with any survivors; kv_head is n_head_kv after the last one.
    Tile next_tile(const Survivors & survivors, const Tile & tile) const {
        int g = tile.kv_head;
        int start = tile.start + tile.n;
        while (g < 0 || (g < t_.n_head_kv && start >= survivors.n[g])) {
            ++g;
            start = 0;
        }
        if (g == t_.n_head_kv) {
            return {g, 0, 0, nullptr};
        }
        return {g, start, std::min(kBlockCells, survivors.n[g] - start), survivors.cells + g * kChunkCells + start};
    }

    void attend_survivors() {
        constexpr Tile kBefore = {-1, 0, 0, nullptr};
        Survivors survivors = {s_.n_cells, s_.cells};
        Survivors coming = {s_.n_cells + t_.n_head_kv, s_.cells + t_.n_head_kv * kChunkCells};
        const int step = team_.size * chunk_;
        list_survivors(team_.rank * chunk_, survivors);
        for (int first = team_.rank * chunk_; first < s_.n_blocks; first += step) {
            list_survivors(first + step, coming);
            // Survivors lie scattered: each gather asks memory for the rows of the next one, whichever head's or chunk's they
            // are.
            Tile tile = next_tile(survivors, kBefore);
            while (tile.kv_head < t_.n_head_kv) {
                const Tile next = next_tile(survivors, tile);
                const Tile & ahead = next.kv_head < t_.n_head_kv ? next : next_tile(coming, kBefore);
                attend_tile(tile.kv_head, tile.cells, tile.n, {t_.values[tile.kv_head], tile.cells, tile.n},
                            ahead.kv_head < t_.n_head_kv ? Ahead{t_.keys[ahead.kv_head], ahead.cells, ahead.n} : Ahead{});
                tile = next;
            }
            const int count = std::min(chunk_, s_.n_blocks - first);
            for (int g = 0; g < t_.n_head_kv; ++g) {
                if (!all_of(g)) {
                    account_dropped(g, first, count);
                }
                if (t_.settings.check) {
                    check_chunk(g, first, count);
                }
            }
            std::swap(survivors, coming);
        }
    }

    // Exact attention of the group's queries to 1 to 64 cells, with a running peak (online softmax, arXiv 1805.02867).
    // The first rows to prefetch come with the keys, the second with the values.
    void attend_tile(int kv_head, const int32_t * cells, int n, const Ahead & with_keys, const Ahead & with_values) {
        const int q0 = kv_head * n_group_;
        const float to_log2 = static_cast<float>(to_log2_);
        k_.dots(query(q0), n_group_, t_.keys[kv_head], cells, n, s_.scores, kBlockCells, with_keys);
        for (int j = 0; j < n_group_; ++j) {
            Partial & p = partial(q0 + j);
            float * scores = s_.scores + j * kBlockCells;
            const int seen = hide(scores, cells, n, q0 + j);
            s_.rescale[j] = 1.0f;
            if (seen == 0) {
                std::fill(scores, scores + n, 0.0f);
                continue;
            }
            const float reference = s_.reference[q0 + j];
            // Rounded up: every change of unit is then a power of two, without an error.
            const float peak = std::ceil(k_.largest(scores, n) * to_log2 - reference);
            if (!(peak <= p.peak)) {  // a NaN is taken over, and found by report_finite
                s_.rescale[j] = std::exp2(p.peak - peak);
                p.kept *= static_cast<double>(s_.rescale[j]);
                p.peak = peak;
            }
            p.kept += static_cast<double>(k_.exp2_sum(scores, n, to_log2, p.peak + reference));
            p.attended += seen;
        }
        k_.accumulate(s_.scores, kBlockCells, s_.rescale, n_group_, t_.values[kv_head], cells, n, output(team_.rank, q0),
                      with_values);
    }

    // What the chunk's dropped cells weigh at most, and their compensation.
    void account_dropped(int kv_head, int first, int count) {
        const GridIndex & index = *t_.index[kv_head];
        const int q0 = kv_head * n_group_;
        float key_norm = 0;
        float value_norm = 0;
        bool any = false;
        const uint64_t * survivors = kept(kv_head, first);
        for (int b = 0; b < count; ++b) {
            const uint64_t scanned = visible_to_any(first + b) & indexed(kv_head, first + b);
            const BlockBounds & bounds = *index.bounds(first + b);
            key_norm = scanned != 0 ? std::max(key_norm, bounds.key_norm) : key_norm;
            if ((scanned & ~survivors[b]) != 0) {
                value_norm = std::max(value_norm, bounds.value_norm);
                any = true;
            }
        }
        for (int j = 0; j < n_group_; ++j) {
            Partial & p = partial(q0 + j);
            const float * sums = dropped(q0 + j, first);
            float * estimates = s_.block_sums + j * kChunkBlocks;
            estimate(sums, slack(q0 + j, first), count, estimates);
            float most = 0;
            float added = 0;
            for (int b = 0; b < count; ++b) {
                most += sums[b];
                added += estimates[b];
            }
            p.dropped += static_cast<double>(most);
            p.compensation += t_.settings.compensate ? static_cast<double>(added) : 0.0;
            p.key_norm = std::max(p.key_norm, key_norm);
            p.value_norm = std::max(p.value_norm, value_norm);
            s_.rescale[j] = 1.0f;
            const float scale = p.peak > 0 ? std::exp2(-p.peak) : 1.0f;
            for (int b = 0; b < count; ++b) {
                estimates[b] *= scale;
            }
        }
        if (any && t_.settings.compensate) {
            Rows means = index.value_means();
            means.base = means.row(first);
            k_.accumulate(s_.block_sums, kChunkBlocks, s_.rescale, n_group_, means, nullptr, count, output(team_.rank, q0), {});
        }
    }

    // Every visible cell of the chunk in float64, against what was decided without looking.
    void check_chunk(int kv_head, int first, int count) {
        for (int q = kv_head * n_group_; q < (kv_head + 1) * n_group_; ++q) {
            const float tau = tau_of(s_.threshold[q], s_.reference[q], to_log2_);
            for (int b = first; b < first + count; ++b) {
                for (uint64_t left = visible(token_of(q))[b]; left != 0; left &= left - 1) {
                    const int bit = std::countr_zero(left);
                    const int32_t cell = b * kBlockCells + bit;
                    const bool attended = (*kept(kv_head, b) >> bit & 1) != 0;
                    const bool bounded = !all_of(kv_head) && (indexed(kv_head, b) >> bit & 1) != 0;
                    k_.rows_to_f32(t_.keys[kv_head], &cell, 1, s_.keys);
                    double dot = 0;
                    for (int c = 0; c < key_width_; ++c) {
                        dot += static_cast<double>(query(q)[c]) * s_.keys[c];
                    }
                    const double exact = std::exp2(dot * to_log2_ - s_.reference[q]);
                    ++checked_.pairs;
                    checked_.misses += !attended && dot >= tau;
                    checked_.bound_violations += bounded && exact > weight(q, 0)[cell] * (1.0 + kWeightError);
                    (attended ? partial(q).checked_kept : partial(q).checked_dropped) += exact;
                }
            }
        }
    }

    void report_finite() {
        // So that the sum of the threads' parts is finite too.
        const float most = std::numeric_limits<float>::max() / static_cast<float>(team_.size);
        for (int q = 0; q < n_query_; ++q) {
            const Partial & p = partial(q);
            const float * out = output(team_.rank, q);
            bool finite = std::isfinite(p.kept + p.dropped) && p.peak < kInfinity;
            for (int c = 0; c < value_width_; ++c) {
                finite &= std::fabs(out[c]) <= most;
            }
            if (!finite) {
                fail();
            }
        }
    }

    void combine(int q) {
        Partial all{};
        all.peak = -kInfinity;
        for (int rank = 0; rank < team_.size; ++rank) {
            all.peak = std::max(all.peak, s_.partial[slot(rank, q)].peak);
        }
        float * sum = output(0, q);
        for (int rank = 0; rank < team_.size; ++rank) {
            const Partial & p = s_.partial[slot(rank, q)];
            const float factor = p.peak == -kInfinity ? 0.0f : std::exp2(p.peak - all.peak);
            all.add(p, factor);
            const float * part = output(rank, q);
            for (int c = 0; c < value_width_; ++c) {
                sum[c] = (rank == 0 ? 0.0f : sum[c]) + part[c] * factor;
            }
        }
        const double unit = all.peak == -kInfinity ? 1.0 : std::exp2(static_cast<double>(all.peak));
        // Where there is compensation, the unit is not 0.
        const double mass = all.kept + (all.compensation > 0 ? all.compensation / unit : 0.0);
        const float inverse = mass > 0 ? static_cast<float>(1.0 / mass) : 0.0f;  // no visible cell: 0, as stock
        double norm_squared = 0;
        float * out = reinterpret_cast<float *>(t_.output + token_of(q) * t_.output_token_stride + head_of(q) * t_.output_stride);
        for (int c = 0; c < t_.values[0].dim; ++c) {
            out[c] = sum[c] * inverse;
            norm_squared += static_cast<double>(out[c]) * out[c];
        }

        HeadCertificate & certificate = t_.certificates[token_of(q) * t_.n_head + head_of(q)];
        certificate.tau = dense_ ? -kInfinity : tau_of(s_.threshold[q], s_.reference[q], to_log2_);
        certificate.n_visible = static_cast<int32_t>(s_.sight[token_of(q)].n_visible);
        const double total = dense_ ? 0.0 : s_.guess[q].total;
        certify(all, unit, score_error(s_.query_norm[q], all.key_norm, t_.keys[0].dim, to_log2_), total, std::sqrt(norm_squared),
                certificate);
        if (!dense_) {  // what the oracle satisfied is proven, whatever the roundings up since
            certificate.delta = std::min(certificate.delta, static_cast<float>(t_.settings.epsilon * (1.0 - kWeightError)));
        }
        if (t_.settings.check && !dense_) {
            const double truth = all.checked_dropped / std::max(all.checked_kept + all.checked_dropped, 1e-300);
            checked_.mass_violations += truth > static_cast<double>(certificate.delta);
        }
    }

    const DecodeTask & t_;
    const Team & team_;
    Scratch s_;
    const Kernels & k_;
    bool dense_;
    int gqa_;
    int n_group_;
    int n_query_;
    int key_width_;
    int value_width_;
    int chunk_;  // blocks that a thread takes at a time
    double to_log2_;
    CheckCounts checked_;
    Lap lap_;
};

}  // namespace

size_t decode_scratch_bytes(int n_token, int n_head, int n_head_kv, int64_t n_kv, int key_dim, int value_dim, int team_size) {
    return Scratch(nullptr, {n_token, n_head, n_head_kv, n_kv, key_dim, value_dim}, 0, team_size).bytes;
}

Outcome decode(const DecodeTask & task, const Team & team, void * scratch) { return Decoder(task, team, scratch).run(); }

}  // namespace louver
