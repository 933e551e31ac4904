// A query against the ball index. All in float64; the slack of each bound is derived in docs/guarantee.md, "The ball index".
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "index/ball_index.h"

namespace louver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Relative error of the norm of a slice of the query, and of the product of it and a radius.
constexpr double kReachError = 0x1p-40;

#ifdef LOUVER_ZERO_SLACK
constexpr double kSlack = 0;  // the negative control of the tests: what they check has to fail then
constexpr double kReach = 0.5;
#else
constexpr double kSlack = 1;
constexpr double kReach = 1;
#endif

// Of a float64 sum of n products of float32: n * 2^-53 of its terms' magnitudes, twice for good measure; and the same for a
// bound's share of the rounding of the sum over the subspaces.
double sum_error(double magnitude, int n) { return kSlack * magnitude * (n + 4) * 0x1p-52; }

}  // namespace

BallQuery::BallQuery(const BallIndex & index, const float * query) : index_(index) {
    for (const BallIndex::Subspace & subspace : index.subspaces_) {
        bounds_.push_back(bound(subspace, query + subspace.begin));
    }
}

BallQuery::Bounds BallQuery::bound(const BallIndex::Subspace & subspace, const float * query) const {
    const size_t n = static_cast<size_t>(subspace.n_groups);
    const int width = subspace.width;
    Bounds bounds{std::vector<double>(n), std::vector<double>(n)};
    double squared = 0;
    for (int c = 0; c < width; ++c) {
        squared += static_cast<double>(query[c]) * query[c];
    }
    const double norm = std::sqrt(squared);
    for (size_t g = 0; g < n && norm > 0; ++g) {  // a query of zeros scores 0
        const float * first = subspace.first.data() + g * static_cast<size_t>(width);
        double lower = 0;
        double upper = 0;
        double magnitude = 0;
        if (index_.is_ball()) {
            for (int c = 0; c < width; ++c) {
                const double term = static_cast<double>(query[c]) * first[c];
                lower += term;
                magnitude += std::fabs(term);
            }
            const double reach = kReach * norm * subspace.radius[g] * (1 + kReachError);
            upper = lower + reach;
            lower -= reach;
            magnitude += reach;
        } else {
            const float * second = subspace.second.data() + g * static_cast<size_t>(width);
            for (int c = 0; c < width; ++c) {
                const double a = static_cast<double>(query[c]) * first[c];
                const double b = static_cast<double>(query[c]) * second[c];
                lower += std::min(a, b);
                upper += std::max(a, b);
                magnitude += std::max(std::fabs(a), std::fabs(b));
            }
        }
        const double slack = sum_error(magnitude, width + index_.n_subspaces());
        bounds.lower[g] = lower - slack;
        bounds.upper[g] = upper + slack;
    }
    return bounds;
}

template <class F> void BallQuery::for_cells(int block, F && f) const {
    for (uint64_t left = index_.indexed(block); left != 0; left &= left - 1) {
        const int cell = std::countr_zero(left);
        const size_t position = static_cast<size_t>(block) * kBlockCells + static_cast<size_t>(cell);
        f(cell, index_.group_of_.data() + position * bounds_.size());
    }
}

void BallQuery::bounds(int first, int count, double * lower, double * upper) const {
    std::fill(lower, lower + count * kBlockCells, -kInfinity);
    std::fill(upper, upper + count * kBlockCells, kInfinity);
    for (int b = 0; b < count; ++b) {
        for_cells(first + b, [&](int cell, const uint32_t * groups) {
            double least = 0;
            double most = 0;
            for (size_t s = 0; s < bounds_.size(); ++s) {
                least += bounds_[s].lower[groups[s]];
                most += bounds_[s].upper[groups[s]];
            }
            lower[b * kBlockCells + cell] = least;
            upper[b * kBlockCells + cell] = most;
        });
    }
}

int64_t BallQuery::sweep(double tau, int n_blocks, uint64_t * cells) const {
    std::fill(cells, cells + n_blocks, uint64_t{0});
    // Of each subspace the groups in falling order of their bounds, and the row of each.
    std::vector<std::vector<uint32_t>> order(bounds_.size());
    std::vector<std::vector<int64_t>> row(bounds_.size());
    int64_t n_rows = std::numeric_limits<int64_t>::max();
    for (size_t s = 0; s < bounds_.size(); ++s) {
        const std::vector<double> & upper = bounds_[s].upper;
        order[s].resize(upper.size());
        std::iota(order[s].begin(), order[s].end(), 0u);
        std::sort(order[s].begin(), order[s].end(), [&](uint32_t a, uint32_t b) { return upper[a] > upper[b]; });
        row[s].resize(upper.size());
        for (size_t i = 0; i < order[s].size(); ++i) {
            row[s][order[s][i]] = static_cast<int64_t>(i);
        }
        n_rows = std::min<int64_t>(n_rows, std::ssize(upper));
    }
    // Whatever was not seen before a row has no larger bound than the row's in any subspace. Once one list has ended, all was
    // seen.
    int64_t rows = 0;
    for (; rows < n_rows; ++rows) {
        double most = 0;
        for (size_t s = 0; s < bounds_.size(); ++s) {
            most += bounds_[s].upper[order[s][static_cast<size_t>(rows)]];
        }
        if (most < tau) {
            break;
        }
    }
    for (int b = 0; b < n_blocks; ++b) {
        for_cells(b, [&](int cell, const uint32_t * groups) {
            bool seen = false;
            for (size_t s = 0; s < bounds_.size(); ++s) {
                seen = seen || row[s][groups[s]] < rows;
            }
            cells[b] |= static_cast<uint64_t>(seen) << cell;
        });
    }
    return rows;
}

void BallQuery::filter(const double * tau, int n_blocks, uint64_t * cells) const {
    std::fill(cells, cells + n_blocks, uint64_t{0});
    for (int b = 0; b < n_blocks; ++b) {
        for_cells(b, [&](int cell, const uint32_t * groups) {
            bool reached = true;
            for (size_t s = 0; s < bounds_.size(); ++s) {
                reached = reached && !(bounds_[s].upper[groups[s]] < tau[s]);
            }
            cells[b] |= static_cast<uint64_t>(reached) << cell;
        });
    }
}

}  // namespace louver
