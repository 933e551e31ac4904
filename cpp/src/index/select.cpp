// Selection: the oracle's threshold, the keys that reach it, and a bound on what the others weigh.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "attention/certificate.h"
#include "index/scorer.h"
#include "index/state.h"
#include "index/workers.h"
#include "kernels/bounds.h"
#include "kernels/kernels.h"
#include "louver/mass_oracle.h"
#include "oracle/threshold.h"

namespace louver {
namespace {

static_assert(kOracleCandidates == kCandidates);

constexpr double kLog2E = 1.4426950408889634;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Blocks of one piece of work.
constexpr int kChunk = 4 * kMaxRun;

// The reference of a query is the largest score of a few keys that tend to weigh much, and is raised where that was too little
// for the weights to fit a float32.
constexpr int kProbesFirst = 4;
constexpr int kProbesLast = 12;
constexpr int kRaises = 2;

// With more mass than this, in units of the reference, thresholds would leave float32's range.
constexpr double kMostMass = 0x1p60;

// Upper bounds on the weights of all keys for a batch of queries.
class Weights {
  public:
    Weights(const Index::State & state, const QuerySet & queries, const QuerySet::Batch & batch, double to_log2)
        : s_(state),
          queries_(queries),
          batch_(batch),
          head_(*state.heads[static_cast<size_t>(batch.head)]),
          to_log2_(to_log2),
          n_blocks_(state.n_blocks()),
          stride_(static_cast<int64_t>(n_blocks_) * kBlockCells),
          reference_(static_cast<size_t>(batch.n)),
          lower_(static_cast<size_t>(batch.n)),
          weight_(static_cast<size_t>(batch.n) * static_cast<size_t>(stride_)),
          estimate_(static_cast<size_t>(batch.n) * static_cast<size_t>(n_blocks_)) {
        for (int i = 0; i < batch.n; ++i) {
            reference_[static_cast<size_t>(i)] = reference(i, probes());
        }
        bound();
        for (int raise = 0; raise < kRaises && raise_references(); ++raise) {
            bound();
        }
    }

    Scorer scorer(int i) const {
        return {s_.store.rows(batch_.head), queries_.f32(batch_.first + i), queries_.f64(batch_.first + i)};
    }
    float reference(int i) const { return reference_[static_cast<size_t>(i)]; }
    double lower(int i) const { return lower_[static_cast<size_t>(i)]; }
    float * of(int i) { return weight_.data() + i * stride_; }
    const float * of(int i) const { return weight_.data() + i * stride_; }
    int64_t size() const { return stride_; }
    // About which share of the upper bounds the weights of a block are.
    float estimate(int i, int block) const { return estimate_[static_cast<size_t>(i * n_blocks_ + block)]; }

    // Bounds on the weight of a key with that score; magnitude: of the score's terms. kWeightError covers what exp2 is off.
    double least(int i, double score, double magnitude) const { return bounded(i, score, magnitude, -1); }
    double most(int i, double score, double magnitude) const { return bounded(i, score, magnitude, 1); }

  private:
    double bounded(int i, double score, double magnitude, int sign) const {
        const double scaled = score * to_log2_;
        const double off =
            score_margin(magnitude, s_.store.dim()) * to_log2_ + (std::fabs(scaled) + std::fabs(reference(i))) * 0x1p-51;
        return std::exp2(scaled - reference(i) + sign * off) * (1.0 + sign * kWeightError);
    }

    std::vector<int32_t> probes() const {
        std::vector<int32_t> cells;
        const auto probe = [&](int64_t position) {
            if ((s_.live[static_cast<size_t>(position / kBlockCells)] >> position % kBlockCells & 1) != 0) {
                cells.push_back(static_cast<int32_t>(position));
            }
            return cells.size();
        };
        const int64_t n = s_.store.size();
        for (int64_t p = 0; p < n && probe(p) < kProbesFirst; ++p) {}
        for (int64_t p = n - 1; p >= 0 && probe(p) < kProbesFirst + kProbesLast; --p) {}
        return cells;
    }

    float reference(int i, const std::vector<int32_t> & cells) const {
        std::vector<double> scores(cells.size());
        std::vector<double> magnitudes(cells.size());
        scorer(i).score(cells.data(), static_cast<int>(cells.size()), scores.data(), magnitudes.data());
        double most = -kInfinity;
        for (const double score : scores) {
            most = std::isfinite(score) ? std::max(most, score) : most;
        }
        // Rounded up: with scores far from 0 a float's step is many log2 units.
        const float scaled = std::nextafter(static_cast<float>(most * to_log2_), HUGE_VALF);
        return std::isfinite(scaled) ? scaled : 0.0f;
    }

    // Whether any reference is higher now: some weight was very large and its key's score is finite.
    bool raise_references() {
        bool any = false;
        for (int i = 0; i < batch_.n; ++i) {
            std::vector<int32_t> large;
            for (int64_t cell = 0; cell < stride_; ++cell) {
                if (!(of(i)[cell] < kMostMass)) {
                    large.push_back(static_cast<int32_t>(cell));
                }
            }
            const float higher = large.empty() ? 0.0f : reference(i, large);
            if (!large.empty() && higher > reference(i)) {
                reference_[static_cast<size_t>(i)] = higher;
                any = true;
            }
        }
        return any;
    }

    void bound() {
        const int n_chunks = (n_blocks_ + kChunk - 1) / kChunk;
        const size_t n = static_cast<size_t>(batch_.n);
        std::vector<double> lower(static_cast<size_t>(n_chunks) * n);
        parallel_for(n_chunks, s_.n_threads(), [&](int64_t chunk) {
            const int end = std::min(n_blocks_, static_cast<int>(chunk + 1) * kChunk);
            for (int first = static_cast<int>(chunk) * kChunk; first < end; first += kMaxRun) {
                bound_run(first, std::min(kMaxRun, end - first), lower.data() + static_cast<size_t>(chunk) * n);
            }
        });
        for (size_t i = 0; i < n; ++i) {
            lower_[i] = 0;
            for (size_t chunk = 0; chunk < static_cast<size_t>(n_chunks); ++chunk) {
                lower_[i] += lower[chunk * n + i];
            }
        }
    }

    void bound_run(int first, int count, double * lower) {
        uint64_t cells[kMaxBatch * kMaxRun];
        for (int i = 0; i < batch_.n; ++i) {
            for (int b = 0; b < count; ++b) {
                cells[i * count + b] = s_.live[static_cast<size_t>(first + b)] & head_.indexed(first + b);
            }
        }
        const int64_t at = static_cast<int64_t>(first) * kBlockCells;
        batch_.query->weights(
            first, count, cells,
            {to_log2_, reference_.data(), weight_.data() + at, stride_, estimate_.data() + first, n_blocks_, lower});
        for (int b = 0; b < count; ++b) {
            for (uint64_t left = s_.live[static_cast<size_t>(first + b)] & ~cells[b]; left != 0; left &= left - 1) {
                const int32_t cell = (first + b) * kBlockCells + std::countr_zero(left);
                for (int i = 0; i < batch_.n; ++i) {
                    of(i)[cell] = exact(i, cell, lower[i]);
                }
            }
        }
    }

    // The upper weight of a key that is not bounded, infinity where its score is not finite.
    float exact(int i, int32_t cell, double & lower) const {
        double score;
        double magnitude;
        scorer(i).score(&cell, 1, &score, &magnitude);
        const double weight = most(i, score, magnitude);
        if (!std::isfinite(score) || !(weight < 0x1p127)) {
            return std::numeric_limits<float>::infinity();
        }
        lower += least(i, score, magnitude);
        return static_cast<float>(std::max(weight, std::exp2(static_cast<double>(kMinLog2))) * (1 + 0x1p-20));
    }

    const Index::State & s_;
    const QuerySet & queries_;
    const QuerySet::Batch & batch_;
    const HeadIndex & head_;
    double to_log2_;
    int n_blocks_;
    int64_t stride_;
    std::vector<float> reference_;  // [n]
    std::vector<double> lower_;     // [n] of the sum of all weights
    std::vector<float> weight_;     // [n][stride]
    std::vector<float> estimate_;   // [n][n_blocks]
};

class Selector {
  public:
    Selector(const Index::State & state, const QuerySet & queries, const Oracle & oracle, std::span<const int64_t> sample,
             double scale)
        : s_(state), queries_(queries), oracle_(oracle), sample_(sample) {
        const size_t n = static_cast<size_t>(queries.n());
        out_.to_log2 = scale * kLog2E;
        out_.reference.resize(n);
        out_.dropped.resize(n);
        out_.kept.resize(n);
        out_.estimate.resize(n * static_cast<size_t>(state.n_blocks()));
        out_.certificates.resize(n);
        out_.keys.resize(n);
    }

    Selected run() {
        const bool by_mass = oracle_.kind == OracleKind::mass;
        if (!by_mass) {
            search();
        }
        for (const QuerySet::Batch & batch : queries_.batches()) {
            const Weights weights(s_, queries_, batch, out_.to_log2);
            parallel_for(batch.n, s_.n_threads(), [&](int64_t at) {
                const int i = static_cast<int>(at);
                if (by_mass) {
                    select_mass(weights, batch, i, mass_threshold(weights, i));
                }
                certify(weights, batch, i);
                // Where epsilon cannot be certified, nothing is dropped.
                if (by_mass && !(certificate(batch.first + i).delta <= oracle_.epsilon)) {
                    select_mass(weights, batch, i, 0);
                    certify(weights, batch, i);
                }
            });
        }
        return std::move(out_);
    }

  private:
    SelectionCertificate & certificate(int query) { return out_.certificates[static_cast<size_t>(query)]; }
    Scored & found(int query) { return out_.keys[static_cast<size_t>(query)]; }

    void search() {
        const std::vector<double> tau = thresholds();
        out_.keys = score_matches(s_, queries_, tau);
        for (int query = 0; query < queries_.n(); ++query) {
            certificate(query).tau = tau[static_cast<size_t>(query)];
        }
    }

    std::vector<double> thresholds() const {
        std::vector<double> tau(static_cast<size_t>(queries_.n()), oracle_.tau);
        if (oracle_.kind == OracleKind::top_k) {
            return kth_largest();
        }
        if (samples(oracle_.kind)) {
            const std::vector<int32_t> cells(sample_.begin(), sample_.end());
            std::vector<double> scores(cells.size());
            std::vector<double> magnitudes(cells.size());
            for (int query = 0; query < queries_.n(); ++query) {
                scorer(query).score(cells.data(), static_cast<int>(cells.size()), scores.data(), magnitudes.data());
                tau[static_cast<size_t>(query)] = sample_threshold(oracle_, scores);
            }
        }
        return tau;
    }

    Scorer scorer(int query) const { return {s_.store.rows(queries_.head_of(query)), queries_.f32(query), queries_.f64(query)}; }

    // Of each query a threshold that k keys reach, and no others but those within float64's rounding of the k-th.
    std::vector<double> kth_largest() const {
        const size_t n = static_cast<size_t>(queries_.n());
        std::vector<double> tau(n, -kInfinity);
        if (oracle_.k >= s_.n_live) {
            return tau;
        }
        // The keys with the k largest upper bounds have scores, the least of which at least k keys reach: a first threshold.
        const size_t k = static_cast<size_t>(oracle_.k);
        for (const QuerySet::Batch & batch : queries_.batches()) {
            const Weights weights(s_, queries_, batch, out_.to_log2);
            for (int i = 0; i < batch.n; ++i) {
                std::vector<int32_t> cells = live_cells();
                const float * weight = weights.of(i);
                std::nth_element(cells.begin(), cells.begin() + static_cast<ptrdiff_t>(k - 1), cells.end(),
                                 [weight](int32_t a, int32_t b) { return weight[a] > weight[b]; });
                cells.resize(k);
                tau[static_cast<size_t>(batch.first + i)] = least_score(batch.first + i, cells);
            }
        }
        const std::vector<Scored> matches = score_matches(s_, queries_, tau);
        for (size_t q = 0; q < n; ++q) {
            std::vector<std::pair<double, int32_t>> best;
            for (size_t j = 0; j < matches[q].ids.size(); ++j) {
                if (std::isfinite(matches[q].scores[j])) {
                    best.emplace_back(matches[q].scores[j], static_cast<int32_t>(matches[q].ids[j]));
                }
            }
            if (best.size() < k) {
                continue;
            }
            std::nth_element(best.begin(), best.begin() + static_cast<ptrdiff_t>(k - 1), best.end(), std::greater<>());
            std::vector<int32_t> cells;
            std::transform(best.begin(), best.begin() + static_cast<ptrdiff_t>(k), std::back_inserter(cells),
                           [](const auto & scored) { return scored.second; });
            tau[q] = least_score(static_cast<int>(q), cells);
        }
        return tau;
    }

    std::vector<int32_t> live_cells() const {
        std::vector<int32_t> cells;
        for (size_t b = 0; b < s_.live.size(); ++b) {
            for (uint64_t left = s_.live[b]; left != 0; left &= left - 1) {
                cells.push_back(static_cast<int32_t>(b) * kBlockCells + std::countr_zero(left));
            }
        }
        return cells;
    }

    // A number that the exact scores of all these keys reach; -infinity if one of them is not finite.
    double least_score(int query, const std::vector<int32_t> & cells) const {
        std::vector<double> score(cells.size());
        std::vector<double> magnitude(cells.size());
        scorer(query).score(cells.data(), static_cast<int>(cells.size()), score.data(), magnitude.data());
        double least = kInfinity;
        for (size_t i = 0; i < cells.size(); ++i) {
            least = std::isfinite(score[i]) ? std::min(least, score[i] - score_margin(magnitude[i], s_.store.dim())) : -kInfinity;
        }
        return least;
    }

    // The engine's oracle on the weights: a threshold for which what is dropped satisfies epsilon by its own sum.
    float mass_threshold(const Weights & weights, int i) const {
        const double lower = weights.lower(i) * (1.0 - 4 * kWeightError);  // so that delta, too, satisfies it
        if (!(oracle_.epsilon > 0 && lower > 0 && lower < kMostMass)) {
            return 0;
        }
        const MassOracle oracle(oracle_.epsilon, s_.n_live);
        const auto sums = [&](const Candidates & candidates) {
            Sums below{};
            kernels().sums_below(weights.of(i), weights.size(), candidates.data(), below.data());
            return below;
        };
        const float guess = oracle.guess(sums(oracle.coarse()), lower);
        const bool exceeds = !oracle.satisfies(dropped_under(weights, i, guess), lower);
        if (!exceeds && !oracle.is_open(guess)) {
            return guess;
        }
        const Candidates fine = oracle.fine(guess, exceeds, lower);
        return oracle.refined(fine, sums(fine), lower);
    }

    void select_mass(const Weights & weights, const QuerySet::Batch & batch, int i, float threshold) {
        const int query = batch.first + i;
        std::vector<int32_t> cells;
        for (size_t b = 0; b < s_.live.size(); ++b) {
            for (uint64_t left = s_.live[b]; left != 0; left &= left - 1) {
                const int32_t cell = static_cast<int32_t>(b) * kBlockCells + std::countr_zero(left);
                if (!(weights.of(i)[cell] < threshold)) {
                    cells.push_back(cell);
                }
            }
        }
        Scored & found = this->found(query);
        found.ids.assign(cells.begin(), cells.end());
        found.scores.resize(cells.size());
        found.magnitudes.resize(cells.size());
        found.n_scored = static_cast<int64_t>(cells.size());
        weights.scorer(i).score(cells.data(), static_cast<int>(cells.size()), found.scores.data(), found.magnitudes.data());
        certificate(query).tau = tau_of(threshold, weights.reference(i), out_.to_log2);
    }

    // What was selected weighs at least its exact weights, and what the dropped ones leave of the total. Sums that overflowed on
    // the way bound nothing.
    static double least_kept(double kept, double lower, double dropped) {
        constexpr double kMost = std::numeric_limits<double>::max();
        const double left = lower * (1.0 - kWeightError) - dropped * (1.0 + kWeightError);
        const double least = std::isnan(kept) ? 0.0 : std::min(kept, kMost);
        return lower < kMostMass ? std::max({least, left, 0.0}) : least;
    }

    double dropped_under(const Weights & weights, int i, float threshold) const {
        const float * weight = weights.of(i);
        return std::accumulate(weight, weight + weights.size(), 0.0,
                               [threshold](double sum, float w) { return w < threshold ? sum + w : sum; });
    }

    void certify(const Weights & weights, const QuerySet::Batch & batch, int i) {
        const int query = batch.first + i;
        const size_t q = static_cast<size_t>(query);
        const Scored & found = this->found(query);
        std::vector<uint64_t> selected(s_.live.size());
        double kept = 0;
        for (size_t j = 0; j < found.ids.size(); ++j) {
            const int64_t cell = found.ids[j];
            selected[static_cast<size_t>(cell / kBlockCells)] |= uint64_t{1} << cell % kBlockCells;
            kept += weights.least(i, found.scores[j], found.magnitudes[j]);
        }
        const HeadIndex & head = *s_.heads[static_cast<size_t>(batch.head)];
        double dropped = 0;
        int64_t n_bounded = 0;
        int64_t n_blocks_read = 0;
        for (size_t b = 0; b < s_.live.size(); ++b) {
            const int block = static_cast<int>(b);
            const int bounded = std::popcount(s_.live[b] & head.indexed(block));
            n_bounded += bounded;
            n_blocks_read += bounded > 0;
            double of_block = 0;
            for (uint64_t left = s_.live[b] & ~selected[b]; left != 0; left &= left - 1) {
                of_block += weights.of(i)[block * kBlockCells + std::countr_zero(left)];
            }
            dropped += of_block;
            out_.estimate[q * s_.live.size() + b] = static_cast<float>(of_block) * weights.estimate(i, block);
        }
        out_.reference[q] = weights.reference(i);
        out_.dropped[q] = dropped;
        out_.kept[q] = least_kept(kept, weights.lower(i), dropped);

        SelectionCertificate & c = certificate(query);
        const int passes = oracle_.kind == OracleKind::mass ? 1 : oracle_.kind == OracleKind::top_k ? 4 : 2;
        c.n_keys = s_.n_live;
        c.n_bounded = n_bounded;
        c.n_scored = found.n_scored;
        c.n_selected = static_cast<int64_t>(found.ids.size());
        c.bytes_read = passes * n_blocks_read * head.block_bytes() +
                       c.n_scored * static_cast<int64_t>(row_bytes(s_.store.type(), s_.store.dim()));
        c.delta = std::isfinite(dropped) ? std::min(1.0, dropped_share(dropped, out_.kept[q]) * (1 + 0x1p-20)) : 1.0;
    }

    const Index::State & s_;
    const QuerySet & queries_;
    Oracle oracle_;
    std::span<const int64_t> sample_;
    Selected out_;
};

}  // namespace

Selected select_keys(const Index::State & state, const QuerySet & queries, const Oracle & oracle, std::span<const int64_t> sample,
                     double scale) {
    if (state.n_live == 0) {
        throw std::invalid_argument("the index is empty: there is no key to select from, accepted is an index with live keys");
    }
    return Selector(state, queries, oracle, sample, scale).run();
}

}  // namespace louver
