// The mass oracle: the largest threshold whose dropped softmax mass is provably at most epsilon.
//
// It works on upper bounds w_i >= 2^(score_i - reference) of the softmax weights and on a lower bound L of their sum.
// Dropping every cell with w_i < theta drops at most U(theta) = sum of those w_i, hence at most the share U(theta) / L of
// the mass. A sample of the weights, summed under kCandidates thresholds, gives a guess of theta. The caller selects with it
// and adds up what that really drops, which is what counts: where it is too much, finer thresholds are tried on all
// the weights. No weight is sorted.
#pragma once

#include <array>
#include <cstdint>

namespace louver {

inline constexpr int kOracleCandidates = 16;
using Candidates = std::array<float, kOracleCandidates>;
using Sums = std::array<double, kOracleCandidates>;

class MassOracle {
  public:
    // epsilon in (0, 1); n_scanned weights at most.
    MassOracle(double epsilon, int64_t n_scanned);

    // The sample's thresholds, rising.
    const Candidates & coarse() const { return coarse_; }

    // below[j] = U(coarse()[j]) of the sample, scaled up to all weights; lower = L.
    float guess(const Sums & below, double lower) const;

    // Whether weights that sum up to `dropped` may be dropped.
    bool satisfies(double dropped, double lower) const;

    // Whether the sample's thresholds ended before epsilon was used up, because the reference lies far below the best score.
    bool is_open(float guess) const { return guess >= coarse_.back(); }

    // Rising thresholds between which the answer lies: below a guess that dropped too much, or above an open one.
    Candidates fine(float guess, bool too_much, double lower) const;

    // From all weights: below[j] = U(fine[j]). The result satisfies epsilon.
    float refined(const Candidates & fine, const Sums & below, double lower) const;

  private:
    double sure(double lower) const;

    double epsilon_;
    int64_t n_scanned_;
    Candidates coarse_;
};

// Upper bound on the dropped share of the mass: dropped is an upper bound on what was left out, kept a lower bound on what
// was attended, both in the same unit.
double dropped_share(double dropped, double kept);

}  // namespace louver
