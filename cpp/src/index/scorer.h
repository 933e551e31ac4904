// Scores from the keys themselves, and the decision q.k >= tau in exact arithmetic.
#pragma once

#include <cstdint>
#include <vector>

#include "louver/types.h"

namespace louver {

// A float64 sum of dim exact products, in any order, is off by less than dim * 2^-53 of the sum of their magnitudes, and so is
// that sum itself: this covers both (docs/guarantee.md, "Exact scores").
constexpr double score_margin(double magnitude, int dim) { return magnitude * (dim + 8) * 0x1p-52; }

struct Scored {
    std::vector<int64_t> ids;
    std::vector<double> scores;
    std::vector<double> magnitudes;  // sums of the terms' magnitudes: what a score may be off is proportional to them
    int64_t n_scored = 0;
    int64_t n_exact = 0;
};

// One query against the keys of a head.
class Scorer {
  public:
    // f32, f64: [padded(dim)], the same numbers. subspace_tau: null, or n_subspaces thresholds that a match reaches too.
    Scorer(const Rows & keys, const float * f32, const double * f64, const double * subspace_tau = nullptr, int n_subspaces = 0)
        : keys_(keys), f32_(f32), f64_(f64), subspace_tau_(subspace_tau), n_subspaces_(n_subspaces) {}

    // Appends those of the cells with q.k >= tau, and those that hold a NaN or an infinity.
    void add_matches(const int32_t * cells, int n, double tau, Scored & out) const;

    // Of each cell.
    void score(const int32_t * cells, int n, double * score, double * magnitude) const;

  private:
    bool reaches_subspaces(const float * key) const;

    Rows keys_;
    const float * f32_;
    const double * f64_;
    const double * subspace_tau_;
    int n_subspaces_;
};

}  // namespace louver
