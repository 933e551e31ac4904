#include "louver/mass_oracle.h"

#include <algorithm>
#include <cmath>

#include "kernels/bounds.h"

namespace louver {
namespace {

static_assert(kOracleCandidates == kCandidates);

// The reference is the score of a visible cell, so that L is about 1 at least. How far above it L may lie and still be
// bracketed by the coarse candidates; beyond, the answer is only less sharp.
constexpr double kHeadroomLog2 = 8.0;

// The guess aims at this share of epsilon. What any query of a group needs is kept for all of them, so less is dropped than each
// query's own threshold would drop, and most guesses hold; more than 1 costs more second passes than the few survivors it saves
// are worth (docs/performance.md).
constexpr double kAim = 1.0;

}  // namespace

MassOracle::MassOracle(double epsilon, int64_t n_scanned) : epsilon_(epsilon), n_scanned_(std::max<int64_t>(n_scanned, 1)) {
    // The answer lies in [epsilon L / n, epsilon L]: below, even n cells cannot add up to epsilon; above, one cell exceeds it.
    const double first = std::log2(epsilon_ / static_cast<double>(n_scanned_));
    const double last = std::log2(epsilon_) + kHeadroomLog2;
    for (int j = 0; j < kCandidates; ++j) {
        coarse_[static_cast<size_t>(j)] = static_cast<float>(std::exp2(first + (last - first) * j / (kCandidates - 1)));
    }
}

bool MassOracle::satisfies(double dropped, double lower) const {
    return dropped * (1.0 + kWeightError) <= epsilon_ * lower * (1.0 - kWeightError);
}

// Every weight dropped is under the threshold, so n of them are at most n times it.
double MassOracle::sure(double lower) const {
    return epsilon_ * lower * (1.0 - 4 * kWeightError) / static_cast<double>(n_scanned_);
}

float MassOracle::guess(const Sums & below, double lower) const {
    if (!(lower > 0)) {
        return 0;  // no bound on the mass: nothing may be dropped
    }
    const double target = kAim * epsilon_ * lower;
    const auto over = std::find_if(below.begin(), below.end(), [target](double sum) { return sum > target; });
    double guess = coarse_.back();
    if (over != below.end()) {
        const size_t j = static_cast<size_t>(over - below.begin());
        guess = coarse_[j];
        if (j > 0 && below[j - 1] > 0) {
            // Between two candidates U is close to a power of theta.
            const double part = std::log(target / below[j - 1]) / std::log(below[j] / below[j - 1]);
            guess = coarse_[j - 1] * std::pow(static_cast<double>(coarse_[j]) / coarse_[j - 1], part);
        } else {
            guess *= target / below[j];
        }
    }
    return static_cast<float>(std::max(guess, sure(lower)));
}

Candidates MassOracle::fine(float guess, bool too_much, double lower) const {
    constexpr std::array<float, kCandidates> kSteps = {0.02f, 0.05f, 0.1f,  0.15f, 0.2f,  0.3f,  0.4f,  0.5f,
                                                       0.58f, 0.65f, 0.72f, 0.78f, 0.84f, 0.89f, 0.94f, 0.97f};
    Candidates fine;
    if (too_much) {
        std::transform(kSteps.begin(), kSteps.end(), fine.begin(), [guess](float step) { return step * guess; });
    } else {
        // A weight of epsilon L is too much by itself.
        const double ratio = std::max(epsilon_ * lower / static_cast<double>(guess), 1.0);
        for (int j = 0; j < kCandidates; ++j) {
            fine[static_cast<size_t>(j)] = static_cast<float>(guess * std::pow(ratio, static_cast<double>(j) / kCandidates));
        }
    }
    return fine;
}

float MassOracle::refined(const Candidates & fine, const Sums & below, double lower) const {
    float best = lower > 0 ? static_cast<float>(sure(lower)) : 0.0f;
    for (size_t j = 0; j < fine.size(); ++j) {
        if (satisfies(below[j], lower)) {
            best = std::max(best, fine[j]);
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
