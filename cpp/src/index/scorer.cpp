#include "index/scorer.h"

#include <algorithm>
#include <cmath>

#include "index/exact_score.h"
#include "index/subspaces.h"
#include "kernels/kernels.h"

namespace louver {
namespace {

// Cells that are scored together.
constexpr int kTile = 64;

}  // namespace

void Scorer::add_matches(const int32_t * cells, int n, double tau, Scored & out) const {
    double score[kTile];
    double magnitude[kTile];
    float key[kMaxDim];
    const bool bounded = std::isfinite(tau);
    for (int first = 0; first < n; first += kTile) {
        const int count = std::min(kTile, n - first);
        kernels().dots_f64(f64_, keys_, cells + first, count, score, magnitude);
        for (int i = 0; i < count; ++i) {
            const int32_t cell = cells[first + i];
            const bool finite = std::isfinite(score[i]);
            if (finite && bounded && std::fabs(score[i] - tau) <= score_margin(magnitude[i], keys_.dim)) {
                ++out.n_exact;
                kernels().rows_to_f32(keys_, &cell, 1, key);
                if (compare_dot(f32_, key, keys_.dim, tau) < 0) {
                    continue;
                }
                score[i] = exact_dot(f32_, key, keys_.dim);
            } else if (finite && score[i] < tau) {
                continue;
            }
            if (finite && subspace_tau_ != nullptr) {
                kernels().rows_to_f32(keys_, &cell, 1, key);
                if (!reaches_subspaces(key)) {
                    continue;
                }
            }
            out.ids.push_back(cell);
            out.scores.push_back(score[i]);
            out.magnitudes.push_back(magnitude[i]);
        }
    }
    out.n_scored += n;
}

void Scorer::score(const int32_t * cells, int n, double * score, double * magnitude) const {
    kernels().dots_f64(f64_, keys_, cells, n, score, magnitude);
}

bool Scorer::reaches_subspaces(const float * key) const {
    for (int s = 0; s < n_subspaces_; ++s) {
        const int first = subspace_begin(s, n_subspaces_, keys_.dim);
        const int count = subspace_begin(s + 1, n_subspaces_, keys_.dim) - first;
        const double tau = subspace_tau_[s];
        if (tau == HUGE_VAL || (std::isfinite(tau) && compare_dot(f32_ + first, key + first, count, tau) < 0)) {
            return false;
        }
    }
    return true;
}

}  // namespace louver
