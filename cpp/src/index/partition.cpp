#include "index/partition.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <span>

namespace louver {
namespace {

// Points of a piece that k-means works on, at most, and its rounds.
constexpr int64_t kPiece = 256;
constexpr int kRounds = 4;

class Partition {
  public:
    Partition(const std::vector<float> & points, int64_t n, int width)
        : points_(points), width_(static_cast<size_t>(width)), order_(static_cast<size_t>(n)), group_(static_cast<size_t>(n)) {
        std::iota(order_.begin(), order_.end(), 0u);
    }

    std::vector<uint32_t> tree(int64_t group_size) {
        split(order_, group_size, [&](std::span<uint32_t> leaf) {
            for (const uint32_t point : leaf) {
                group_[point] = n_groups_;
            }
            ++n_groups_;
        });
        return std::move(group_);
    }

    std::vector<uint32_t> kmeans(int64_t group_size, uint64_t seed) {
        std::mt19937_64 random(seed);
        split(order_, std::max(kPiece, group_size), [&](std::span<uint32_t> piece) { cluster(piece, group_size, random); });
        return std::move(group_);
    }

  private:
    float at(uint32_t point, size_t channel) const { return points_[point * width_ + channel]; }

    // Ranges of at most `most` points, by halves: no recursion deeper than their logarithm.
    template <class F> void split(std::span<uint32_t> range, int64_t most, const F & leaf) {
        if (std::ssize(range) <= most) {
            if (!range.empty()) {
                leaf(range);
            }
            return;
        }
        const size_t channel = widest(range);
        const int64_t n_leaves = (std::ssize(range) + most - 1) / most;
        const size_t middle = static_cast<size_t>((n_leaves + 1) / 2 * most);
        std::nth_element(range.begin(), range.begin() + static_cast<ptrdiff_t>(middle), range.end(), [&](uint32_t a, uint32_t b) {
            return at(a, channel) < at(b, channel) || (at(a, channel) == at(b, channel) && a < b);
        });
        split(range.first(middle), most, leaf);
        split(range.subspan(middle), most, leaf);
    }

    size_t widest(std::span<const uint32_t> range) const {
        size_t best = 0;
        double most = -1;
        for (size_t c = 0; c < width_; ++c) {
            float low = at(range[0], c);
            float high = low;
            for (const uint32_t point : range) {
                low = std::min(low, at(point, c));
                high = std::max(high, at(point, c));
            }
            const double width = static_cast<double>(high) - low;
            if (width > most) {
                most = width;
                best = c;
            }
        }
        return best;
    }

    void cluster(std::span<uint32_t> piece, int64_t group_size, std::mt19937_64 & random) {
        const size_t k = static_cast<size_t>((std::ssize(piece) + group_size - 1) / group_size);
        // The first centres are k of the points.
        for (size_t i = 0; i < k; ++i) {
            std::swap(piece[i], piece[i + static_cast<size_t>(random() % (piece.size() - i))]);
        }
        std::vector<double> center(k * width_);
        for (size_t i = 0; i < k; ++i) {
            for (size_t c = 0; c < width_; ++c) {
                center[i * width_ + c] = static_cast<double>(at(piece[i], c));
            }
        }
        std::vector<uint32_t> nearest(piece.size());
        for (int round = 0; round < kRounds; ++round) {
            for (size_t i = 0; i < piece.size(); ++i) {
                nearest[i] = nearest_center(piece[i], center, k);
            }
            std::vector<double> sum(k * width_);
            std::vector<int> count(k);
            for (size_t i = 0; i < piece.size(); ++i) {
                ++count[nearest[i]];
                for (size_t c = 0; c < width_; ++c) {
                    sum[nearest[i] * width_ + c] += static_cast<double>(at(piece[i], c));
                }
            }
            for (size_t i = 0; i < k * width_; ++i) {
                center[i] = count[i / width_] > 0 ? sum[i] / count[i / width_] : center[i];
            }
        }
        number(piece, nearest, k);
    }

    uint32_t nearest_center(uint32_t point, const std::vector<double> & center, size_t k) const {
        uint32_t best = 0;
        double least = std::numeric_limits<double>::infinity();
        for (size_t i = 0; i < k; ++i) {
            double squared = 0;
            for (size_t c = 0; c < width_; ++c) {
                const double difference = static_cast<double>(at(point, c)) - center[i * width_ + c];
                squared += difference * difference;
            }
            if (squared < least) {
                least = squared;
                best = static_cast<uint32_t>(i);
            }
        }
        return best;
    }

    // Centres without points get no number.
    void number(std::span<const uint32_t> piece, const std::vector<uint32_t> & nearest, size_t k) {
        constexpr uint32_t kNone = ~uint32_t{0};
        std::vector<uint32_t> numbers(k, kNone);
        for (size_t i = 0; i < piece.size(); ++i) {
            uint32_t & number = numbers[nearest[i]];
            number = number == kNone ? n_groups_++ : number;
            group_[piece[i]] = number;
        }
    }

    const std::vector<float> & points_;
    size_t width_;
    std::vector<uint32_t> order_;
    std::vector<uint32_t> group_;
    uint32_t n_groups_ = 0;
};

}  // namespace

std::vector<uint32_t> partition(const std::vector<float> & points, int64_t n, int width, Grouping grouping, int group_size,
                                uint64_t seed) {
    Partition all(points, n, width);
    return grouping == Grouping::tree ? all.tree(group_size) : all.kmeans(group_size, seed);
}

}  // namespace louver
