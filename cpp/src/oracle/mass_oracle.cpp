#include "louver/mass_oracle.h"

#include <algorithm>
#include <cmath>

#include "kernels/bounds.h"

namespace louver {
namespace {

static_assert(kOracleCandidates == kCandidates);

// The reference is the score of a visible cell, so that L is about 1 at least. How far above it L may lie and still be
// bracketed by the coarse candidates; beyond, the answer is only less sharp.
constexpr double kHeadroomLog2 = 6.0;

}  // namespace

MassOracle::MassOracle(double epsilon, int64_t n_scanned) : epsilon_(epsilon), n_scanned_(std::max<int64_t>(n_scanned, 1)) {
    // The answer lies in [epsilon L / n, epsilon L]: below, even n cells cannot add up to epsilon; above, one cell exceeds it.
    const double first = std::log2(epsilon_ / static_cast<double>(n_scanned_)) - 1.0;
    const double last = std::log2(epsilon_) + kHeadroomLog2;
    for (int j = 0; j < kCandidates; ++j) {
        coarse_[static_cast<size_t>(j)] = static_cast<float>(std::exp2(first + (last - first) * j / (kCandidates - 1)));
    }
}

bool MassOracle::satisfies(double dropped, double lower) const {
    return dropped * (1.0 + kWeightError) <= epsilon_ * lower * (1.0 - kWeightError);
}

MassOracle::Bracket MassOracle::narrow(const Sums & below, double lower) const {
    if (!(lower > 0)) {
        return Bracket{};  // no bound on the mass: nothing may be dropped
    }
    // Every weight dropped is under the threshold, so n of them at most n times it.
    double sure = epsilon_ * lower * (1.0 - 4 * kWeightError) / static_cast<double>(n_scanned_);
    double limit = epsilon_ * lower;
    for (size_t j = 0; j < coarse_.size(); ++j) {
        const double candidate = coarse_[j];
        if (satisfies(below[j], lower)) {
            sure = std::max(sure, candidate);
        } else {
            limit = std::min(limit, candidate);
            break;
        }
    }
    Bracket bracket{};
    bracket.sure = static_cast<float>(sure);
    const double ratio = std::pow(std::max(limit, sure) / sure, 1.0 / (kCandidates + 1));
    double fine = sure;
    for (float & candidate : bracket.fine) {
        candidate = static_cast<float>(fine *= ratio);
    }
    return bracket;
}

float MassOracle::threshold(const Bracket & bracket, const Sums & below, double lower) const {
    float best = bracket.sure;
    for (size_t j = 0; j < bracket.fine.size(); ++j) {
        if (satisfies(below[j], lower)) {
            best = std::max(best, bracket.fine[j]);
        }
    }
    return best;
}

double dropped_share(double dropped, double kept) {
    const double most = dropped * (1.0 + kWeightError);
    const double least = std::max(kept, 0.0) * (1.0 - kWeightError);
    if (most <= 0) {
        return 0;
    }
    return std::min(1.0, most / (most + least));
}

}  // namespace louver
