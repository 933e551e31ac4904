#include "oracle/threshold.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iomanip>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace louver {
namespace {

void require(bool holds, const std::string & message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

std::string text(double x) {
    std::ostringstream out;
    out << std::setprecision(17) << x;
    return out.str();
}

double kth_largest(std::span<double> scores, int64_t k) {
    const auto kth = scores.begin() + std::min<int64_t>(k, std::ssize(scores)) - 1;
    std::nth_element(scores.begin(), kth, scores.end(), std::greater<>());
    return *kth;
}

// The paper's: among the upper half of the sorted scores, at least two, the highest of the three widest gaps; the score below it.
double below_high_gap(std::span<double> scores) {
    constexpr size_t kWidest = 3;
    std::sort(scores.begin(), scores.end(), std::greater<>());
    const size_t n = std::min(std::max<size_t>(2, scores.size() / 2), scores.size());
    std::vector<size_t> below(n - 1);  // the score below each gap
    std::iota(below.begin(), below.end(), size_t{1});
    if (below.empty()) {
        return scores.front();
    }
    const auto wider = [&](size_t a, size_t b) {
        const double gap_a = scores[a - 1] - scores[a];
        const double gap_b = scores[b - 1] - scores[b];
        return gap_a > gap_b || (gap_a == gap_b && a < b);
    };
    std::sort(below.begin(), below.end(), wider);
    below.resize(std::min(kWidest, below.size()));
    return scores[*std::min_element(below.begin(), below.end())];
}

}  // namespace

void validate(const Oracle & oracle) {
    const auto is = [&](OracleKind kind) { return oracle.kind == kind; };
    require(!is(OracleKind::fixed) || !std::isnan(oracle.tau), "tau is NaN, accepted is a number or an infinity");
    require(!is(OracleKind::mass) || (oracle.epsilon >= 0 && oracle.epsilon < 1),
            "epsilon is " + text(oracle.epsilon) + ", accepted is a number in [0, 1)");
    require(!is(OracleKind::budget) || (oracle.fraction > 0 && oracle.fraction <= 1),
            "fraction is " + text(oracle.fraction) + ", accepted is a number in (0, 1]");
    require((!is(OracleKind::top_k) && !is(OracleKind::sample_top_k)) || oracle.k >= 1,
            "k is " + std::to_string(oracle.k) + ", accepted is 1 or more");
    require(!samples(oracle.kind) || oracle.n_samples >= 1,
            "n_samples is " + std::to_string(oracle.n_samples) + ", accepted is 1 or more");
}

double sample_threshold(const Oracle & oracle, std::span<double> scores) {
    const auto end = std::remove_if(scores.begin(), scores.end(), [](double score) { return !std::isfinite(score); });
    scores = scores.first(static_cast<size_t>(end - scores.begin()));
    if (scores.empty()) {
        return -std::numeric_limits<double>::infinity();
    }
    const double n = static_cast<double>(scores.size());
    switch (oracle.kind) {
        case OracleKind::sample_max: return *std::max_element(scores.begin(), scores.end());
        case OracleKind::sample_mean_max: {
            const double mean = std::accumulate(scores.begin(), scores.end(), 0.0) / n;
            return 0.5 * (mean + *std::max_element(scores.begin(), scores.end()));
        }
        case OracleKind::sample_top_k: return kth_largest(scores, oracle.k);
        case OracleKind::sample_gap: return below_high_gap(scores);
        case OracleKind::budget: return kth_largest(scores, std::max<int64_t>(1, static_cast<int64_t>(oracle.fraction * n)));
        default: throw std::invalid_argument("this oracle does not sample");
    }
}

}  // namespace louver
