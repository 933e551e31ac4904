// The mass oracle: the largest threshold whose dropped softmax mass is provably at most epsilon.
//
// It works on upper bounds w_i >= 2^(score_i - reference) of the softmax weights and on a lower bound L of their sum.
// Dropping every cell with w_i < theta drops at most U(theta) = sum of those w_i, hence at most the share U(theta) / L of
// the mass. Two passes over the weights try kCandidates thresholds each: coarse ones, then fine ones between the two
// coarse ones that bracket the answer. No weight is sorted.
#pragma once

#include <array>
#include <cstdint>

namespace louver {

inline constexpr int kOracleCandidates = 8;
using Candidates = std::array<float, kOracleCandidates>;
using Sums = std::array<double, kOracleCandidates>;

class MassOracle {
  public:
    // epsilon in (0, 1); n_scanned weights at most.
    MassOracle(double epsilon, int64_t n_scanned);

    // The first pass's thresholds, rising.
    const Candidates & coarse() const { return coarse_; }

    struct Bracket {
        float sure;       // a threshold that satisfies epsilon
        Candidates fine;  // the second pass's thresholds, rising, all at least `sure`
    };

    // From the first pass: below[j] = U(coarse()[j]), lower = L. Both as float32 and float64 sums computed them.
    Bracket narrow(const Sums & below, double lower) const;

    // From the second pass: below[j] = U(bracket.fine[j]).
    float threshold(const Bracket & bracket, const Sums & below, double lower) const;

  private:
    bool satisfies(double dropped, double lower) const;

    double epsilon_;
    int64_t n_scanned_;
    Candidates coarse_;
};

// Upper bound on the dropped share of the mass: dropped is an upper bound on what was left out, kept a lower bound on what
// was attended, both in the same unit.
double dropped_share(double dropped, double kept);

}  // namespace louver
