// A plain model of an index, and what every answer is held against. A wrong answer ends the process.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

#include "exact.h"
#include "louver/index.h"

// The judge's branches are not what the fuzzer is to explore.
#if defined(__clang__)
#define FUZZ_UNTRACED [[clang::no_sanitize("coverage")]]
#else
#define FUZZ_UNTRACED
#endif

namespace fuzz {

inline uint64_t & checked_pairs() {
    static uint64_t pairs = 0;
    static const bool registered = [] {
        return std::atexit([] { std::printf("checked pairs: %" PRIu64 ", misses: 0\n", pairs); }) == 0;
    }();
    static_cast<void>(registered);
    return pairs;
}

inline void expect(bool holds, const char * what) {
    if (!holds) {
        std::printf("checked pairs: %" PRIu64 ", WRONG: %s\n", checked_pairs(), what);
        std::fflush(stdout);
        std::abort();
    }
}

struct Model {
    int n_head_kv = 1;
    int dim = 1;
    std::vector<std::vector<float>> keys;  // [n_head_kv] of [n][dim], as stored
    std::vector<bool> live;

    int n() const { return static_cast<int>(live.size()); }
    const float * key(int head, int i) const {
        return keys[static_cast<size_t>(head)].data() + static_cast<size_t>(i) * static_cast<size_t>(dim);
    }
    bool finite(int head, int i) const {
        return std::all_of(key(head, i), key(head, i) + dim, [](float x) { return std::isfinite(x); });
    }
};

// In 80-bit arithmetic: the products are exact, the sums within dim * 2^-64 of their terms' magnitudes.
struct Score {
    long double value;
    long double magnitude;
};

FUZZ_UNTRACED inline Score score(const float * query, const float * key, int dim) {
    Score s{0, 0};
    for (int c = 0; c < dim; ++c) {
        const long double term = static_cast<double>(query[c]) * key[c];
        s.value += term;
        s.magnitude += std::fabs(term);
    }
    return s;
}

// What index.h allows a score to be off, and the judge's own error.
inline long double score_error(const Score & s, int dim) { return s.magnitude * (dim * 0x1p-53L + dim * 0x1p-63L); }

// Whether query . key >= tau: by the score where that is clear, else exactly.
FUZZ_UNTRACED inline bool reaches(const float * query, const float * key, int dim, double tau) {
    if (std::isinf(tau)) {
        return tau < 0;
    }
    const Score s = score(query, key, dim);
    if (std::fabs(s.value - tau) > s.magnitude * (dim * 0x1p-62L)) {
        return s.value > tau;
    }
    return exact_compare(query, key, dim, tau) >= 0;
}

FUZZ_UNTRACED inline void expect_rows(const louver::Matches & matches, size_t n_query, const Model & model) {
    expect(matches.offsets.size() == n_query + 1 && matches.offsets.front() == 0, "offsets are not one for each query and one");
    expect(matches.offsets.back() == static_cast<int64_t>(matches.ids.size()), "offsets do not end where the ids do");
    expect(matches.ids.size() == matches.scores.size(), "ids and scores are of different size");
    for (size_t q = 0; q < n_query; ++q) {
        expect(matches.offsets[q] <= matches.offsets[q + 1], "offsets fall");
        for (int64_t j = matches.offsets[q]; j < matches.offsets[q + 1]; ++j) {
            const int64_t id = matches.ids[static_cast<size_t>(j)];
            expect(id >= 0 && id < model.n() && model.live[static_cast<size_t>(id)], "an id is not live");
            expect(j == matches.offsets[q] || id > matches.ids[static_cast<size_t>(j - 1)], "ids do not rise");
        }
    }
}

// The bits of the positions that query q found.
FUZZ_UNTRACED inline std::vector<bool> found(const louver::Matches & matches, size_t q, const Model & model) {
    std::vector<bool> bits(model.live.size());
    for (int64_t j = matches.offsets[q]; j < matches.offsets[q + 1]; ++j) {
        bits[static_cast<size_t>(matches.ids[static_cast<size_t>(j)])] = true;
    }
    return bits;
}

// The result of a search is the range itself. subspace_tau: [n_query][n_subspaces], or empty.
FUZZ_UNTRACED inline void judge_search(const Model & model, std::span<const float> queries, std::span<const double> tau,
                                       const louver::Matches & matches, std::span<const double> subspace_tau = {}) {
    const size_t n_query = tau.size();
    expect_rows(matches, n_query, model);
    const int per_head = static_cast<int>(n_query) / model.n_head_kv;
    const int n_subspaces = static_cast<int>(subspace_tau.size() / std::max<size_t>(n_query, 1));
    for (size_t q = 0; q < n_query; ++q) {
        const float * query = queries.data() + q * static_cast<size_t>(model.dim);
        const int head = static_cast<int>(q) / per_head;
        const std::vector<bool> got = found(matches, q, model);
        size_t at = static_cast<size_t>(matches.offsets[q]);
        for (int i = 0; i < model.n(); ++i) {
            if (!model.live[static_cast<size_t>(i)]) {
                continue;
            }
            ++checked_pairs();
            const float * key = model.key(head, i);
            bool wanted = !model.finite(head, i) || reaches(query, key, model.dim, tau[q]);
            for (int s = 0; s < n_subspaces && wanted && model.finite(head, i); ++s) {
                const int begin = s * model.dim / n_subspaces;
                const int end = (s + 1) * model.dim / n_subspaces;
                wanted = reaches(query + begin, key + begin, end - begin,
                                 subspace_tau[q * static_cast<size_t>(n_subspaces) + static_cast<size_t>(s)]);
            }
            expect(!wanted || got[static_cast<size_t>(i)], "a key with q.k >= tau was missed");
            expect(wanted || !got[static_cast<size_t>(i)], "a key with q.k < tau was found");
            if (!got[static_cast<size_t>(i)]) {
                continue;
            }
            const double given = matches.scores[at++];
            const Score s = score(query, key, model.dim);
            if (model.finite(head, i)) {
                expect(std::fabs(given - s.value) <= score_error(s, model.dim), "a score is wrong");
                expect(given >= tau[q], "a score is on the wrong side of tau");
            } else {
                expect(!std::isfinite(given), "the score of a key that is not finite is finite");
            }
        }
    }
}

// No key with q.k >= tau was left out, and delta bounds the mass that was.
FUZZ_UNTRACED inline void judge_selection(const Model & model, std::span<const float> queries,
                                          const louver::Selection & selection, double scale, const louver::Oracle & oracle) {
    const size_t n_query = selection.certificates.size();
    expect_rows(selection.matches, n_query, model);
    const int per_head = static_cast<int>(n_query) / model.n_head_kv;
    for (size_t q = 0; q < n_query; ++q) {
        const louver::SelectionCertificate & c = selection.certificates[q];
        const float * query = queries.data() + q * static_cast<size_t>(model.dim);
        const int head = static_cast<int>(q) / per_head;
        const std::vector<bool> got = found(selection.matches, q, model);
        expect(!std::isnan(c.tau) && c.delta >= 0 && c.delta <= 1, "tau or delta is out of range");
        expect(oracle.kind != louver::OracleKind::mass || c.delta <= oracle.epsilon, "delta exceeds epsilon");
        long double most = -HUGE_VALL;
        long double magnitude = 0;
        bool all_finite = true;
        for (int i = 0; i < model.n(); ++i) {
            if (model.live[static_cast<size_t>(i)]) {
                ++checked_pairs();
                const bool finite = model.finite(head, i);
                expect(got[static_cast<size_t>(i)] || (finite && !reaches(query, model.key(head, i), model.dim, c.tau)),
                       "a key with q.k >= tau was not selected");
                const Score s = finite ? score(query, model.key(head, i), model.dim) : Score{0, 0};
                most = std::max(most, s.value);
                magnitude = std::max(magnitude, s.magnitude);
                all_finite = all_finite && finite;
            }
        }
        const long double off = 4 * magnitude * scale * model.dim * 0x1p-64L;  // of an exponent
        if (!all_finite || off > 1e-3L) {
            continue;  // no mass to speak of, or not in these numbers
        }
        double dropped = 0;
        double total = 0;
        int n_selected = 0;
        for (int i = 0; i < model.n(); ++i) {
            if (model.live[static_cast<size_t>(i)]) {
                const double weight =
                    std::exp(static_cast<double>((score(query, model.key(head, i), model.dim).value - most) * scale));
                total += weight;
                dropped += got[static_cast<size_t>(i)] ? 0 : weight;
                n_selected += got[static_cast<size_t>(i)];
            }
        }
        expect(dropped <= c.delta * total * (1 + 1e-9L + off), "more mass was dropped than delta says");
        expect(n_selected == c.n_selected, "n_selected is wrong");
        const int64_t n_live = std::count(model.live.begin(), model.live.end(), true);
        expect(oracle.kind != louver::OracleKind::top_k || c.n_selected >= std::min(oracle.k, n_live),
               "fewer than k were selected");
    }
}

// The output is as near to dense attention's as error_bound says, up to the rounding to float32.
FUZZ_UNTRACED inline void judge_attention(const Model & model, std::span<const float> queries, std::span<const float> values,
                                          int value_dim, const louver::Attention & attention, double scale) {
    const size_t n_query = attention.certificates.size();
    const int per_head = static_cast<int>(n_query) / model.n_head_kv;
    for (size_t q = 0; q < n_query; ++q) {
        const float * query = queries.data() + q * static_cast<size_t>(model.dim);
        const int head = static_cast<int>(q) / per_head;
        const float * of_head = values.data() + static_cast<size_t>(head * model.n() * value_dim);
        std::vector<double> sum(static_cast<size_t>(value_dim));
        double most = -HUGE_VAL;
        double magnitude = 0;
        bool all_finite = true;
        for (int i = 0; i < model.n(); ++i) {
            if (model.live[static_cast<size_t>(i)]) {
                all_finite = all_finite && model.finite(head, i);
                const Score s = score(query, model.key(head, i), model.dim);
                most = std::max(most, static_cast<double>(s.value));
                magnitude = std::max(magnitude, static_cast<double>(s.magnitude));
            }
        }
        if (!all_finite || magnitude * scale > 1e6) {
            continue;
        }
        double mass = 0;
        double longest = 0;
        for (int i = 0; i < model.n(); ++i) {
            if (!model.live[static_cast<size_t>(i)]) {
                continue;
            }
            const double weight =
                std::exp((static_cast<double>(score(query, model.key(head, i), model.dim).value) - most) * scale);
            mass += weight;
            for (int c = 0; c < value_dim; ++c) {
                const double value = of_head[i * value_dim + c];
                sum[static_cast<size_t>(c)] += weight * value;
                longest = std::max(longest, std::fabs(value));
            }
        }
        double squared = 0;
        for (int c = 0; c < value_dim; ++c) {
            const double given = attention.output[q * static_cast<size_t>(value_dim) + static_cast<size_t>(c)];
            const double off = given - sum[static_cast<size_t>(c)] / mass;
            squared += off * off;
        }
        expect(std::sqrt(squared) <= attention.error_bound[q] + 1e-6 * longest,
               "the output is farther from dense than error_bound");
        expect(attention.dense[q] == 0, "dense attention ran for finite keys");
    }
}

}  // namespace fuzz
