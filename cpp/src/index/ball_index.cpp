#include "index/ball_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "index/partition.h"
#include "index/subspaces.h"
#include "kernels/kernels.h"

namespace louver {
namespace {

// A float64 norm of up to 1024 differences is off by less than this, relatively.
constexpr double kNormError = 0x1p-40;

bool finite(const float * key, int dim) {
    return std::all_of(key, key + dim, [](float x) { return std::isfinite(x); });
}

}  // namespace

BallIndex::BallIndex(int dim, const BallOptions & options) : options_(options) {
    if (options.n_subspaces < 1 || options.n_subspaces > dim || options.group_size < 1 || options.merge_at < 1) {
        throw std::invalid_argument("BallIndex: n_subspaces is " + std::to_string(options.n_subspaces) + ", group_size is " +
                                    std::to_string(options.group_size) + ", merge_at is " + std::to_string(options.merge_at) +
                                    ", accepted are 1 to dim = " + std::to_string(dim) + ", and 1 or more for the others");
    }
    for (int s = 0; s < options.n_subspaces; ++s) {
        const int begin = subspace_begin(s, options.n_subspaces, dim);
        subspaces_.push_back({begin, subspace_begin(s + 1, options.n_subspaces, dim) - begin, 0, {}, {}, {}});
    }
}

uint64_t BallIndex::indexed(int block) const {
    return static_cast<size_t>(block) < indexed_.size() ? indexed_[static_cast<size_t>(block)] : 0;
}

void BallIndex::clear() {
    for (Subspace & subspace : subspaces_) {
        subspace.n_groups = 0;
        subspace.first.clear();
        subspace.second.clear();
        subspace.radius.clear();
    }
    std::fill(indexed_.begin(), indexed_.end(), uint64_t{0});
    n_members_ = n_added_ = 0;
}

void BallIndex::rebuild(const Rows & keys, int64_t n, const uint64_t * live) {
    clear();
    merge(keys, n, live);
}

void BallIndex::merge(const Rows & keys, int64_t n, const uint64_t * live) {
    if (2 * n_members_ < n_added_) {
        clear();
    }
    group_of_.resize(static_cast<size_t>(n) * subspaces_.size(), kNoGroup);
    indexed_.resize(static_cast<size_t>(n_blocks_for(n)));
    std::vector<int32_t> positions;
    for (size_t b = 0; b < indexed_.size(); ++b) {
        for (uint64_t left = live[b] & ~indexed_[b]; left != 0; left &= left - 1) {
            positions.push_back(static_cast<int32_t>(b) * kBlockCells + std::countr_zero(left));
        }
    }
    add(keys, positions);
}

// Groups the positions among themselves, behind the groups there are.
void BallIndex::add(const Rows & keys, const std::vector<int32_t> & positions) {
    std::vector<float> row(static_cast<size_t>(padded(keys.dim)));
    std::vector<int32_t> usable;
    std::vector<float> all;
    for (const int32_t position : positions) {
        kernels().rows_to_f32(keys, &position, 1, row.data());
        if (finite(row.data(), keys.dim)) {
            usable.push_back(position);
            all.insert(all.end(), row.begin(), row.begin() + keys.dim);
        }
    }
    const int64_t n = std::ssize(usable);
    for (size_t s = 0; s < subspaces_.size() && n > 0; ++s) {
        Subspace & subspace = subspaces_[s];
        const size_t width = static_cast<size_t>(subspace.width);
        std::vector<float> points(usable.size() * width);
        for (size_t i = 0; i < usable.size(); ++i) {
            std::copy_n(all.begin() + static_cast<ptrdiff_t>(i) * keys.dim + subspace.begin, width,
                        points.begin() + static_cast<ptrdiff_t>(i * width));
        }
        std::vector<uint32_t> group =
            partition(points, n, subspace.width, options_.grouping, options_.group_size, options_.seed + s);
        for (size_t i = 0; i < usable.size(); ++i) {
            group[i] += static_cast<uint32_t>(subspace.n_groups);
            group_of(usable[i], s) = group[i];
        }
        enclose(subspace, points, group);
    }
    mark(usable);
}

// Adds the groups that the points are in; all numbers from n_groups on are new.
void BallIndex::enclose(Subspace & subspace, const std::vector<float> & points, const std::vector<uint32_t> & group) {
    const size_t width = static_cast<size_t>(subspace.width);
    const size_t before = static_cast<size_t>(subspace.n_groups);
    const size_t n_groups = group.empty() ? before : size_t{*std::max_element(group.begin(), group.end())} + 1;
    const float kInfinity = std::numeric_limits<float>::infinity();
    subspace.n_groups = static_cast<int64_t>(n_groups);
    if (!is_ball()) {
        subspace.first.resize(n_groups * width, kInfinity);
        subspace.second.resize(n_groups * width, -kInfinity);
        for (size_t i = 0; i < group.size() * width; ++i) {
            const size_t at = group[i / width] * width + i % width;
            subspace.first[at] = std::min(subspace.first[at], points[i]);
            subspace.second[at] = std::max(subspace.second[at], points[i]);
        }
        for (size_t i = before * width; i < n_groups * width; ++i) {
            if (subspace.first[i] > subspace.second[i]) {  // a number without members
                subspace.first[i] = subspace.second[i] = 0;
            }
        }
        return;
    }
    std::vector<double> sum((n_groups - before) * width);
    std::vector<int64_t> count(n_groups - before);
    for (size_t i = 0; i < group.size(); ++i) {
        ++count[group[i] - before];
        for (size_t c = 0; c < width; ++c) {
            sum[(group[i] - before) * width + c] += static_cast<double>(points[i * width + c]);
        }
    }
    subspace.first.resize(n_groups * width);
    subspace.radius.resize(n_groups, 0.0);
    for (size_t i = 0; i < sum.size(); ++i) {
        const int64_t members = std::max<int64_t>(count[i / width], 1);
        subspace.first[before * width + i] = static_cast<float>(sum[i] / static_cast<double>(members));
    }
    for (size_t i = 0; i < group.size(); ++i) {
        double squared = 0;
        for (size_t c = 0; c < width; ++c) {
            const double difference = static_cast<double>(points[i * width + c]) - subspace.first[group[i] * width + c];
            squared += difference * difference;
        }
        double & radius = subspace.radius[group[i]];
        radius = std::max(radius, std::sqrt(squared) * (1 + kNormError));
    }
}

void BallIndex::mark(const std::vector<int32_t> & positions) {
    for (const int32_t position : positions) {
        indexed_[static_cast<size_t>(position / kBlockCells)] |= uint64_t{1} << position % kBlockCells;
    }
    n_members_ += std::ssize(positions);
    n_added_ += std::ssize(positions);
}

void BallIndex::invalidate(int64_t position) {
    const size_t block = static_cast<size_t>(position / kBlockCells);
    const uint64_t bit = uint64_t{1} << position % kBlockCells;
    if (block < indexed_.size() && (indexed_[block] & bit) != 0) {
        indexed_[block] &= ~bit;
        --n_members_;
    }
}

std::vector<uint32_t> BallIndex::groups(int64_t n) const {
    std::vector<uint32_t> numbers(subspaces_.size() * static_cast<size_t>(n), kNoGroup);
    for (size_t s = 0; s < subspaces_.size(); ++s) {
        // Numbered anew by their first members: below n, and without the empty ones.
        std::vector<uint32_t> renamed(static_cast<size_t>(subspaces_[s].n_groups), kNoGroup);
        uint32_t next = 0;
        for (int64_t position = 0; position < n; ++position) {
            if ((indexed(static_cast<int>(position / kBlockCells)) >> position % kBlockCells & 1) != 0) {
                uint32_t & name = renamed[group_of_[static_cast<size_t>(position) * subspaces_.size() + s]];
                name = name == kNoGroup ? next++ : name;
                numbers[s * static_cast<size_t>(n) + static_cast<size_t>(position)] = name;
            }
        }
    }
    return numbers;
}

void BallIndex::restore(const Rows & keys, int64_t n, const std::vector<uint32_t> & groups) {
    const auto require = [](bool holds, const char * message) {
        if (!holds) {
            throw std::invalid_argument(message);
        }
    };
    const size_t cells = static_cast<size_t>(n);
    require(groups.size() == subspaces_.size() * cells, "groups are not one for each key and subspace");
    clear();
    group_of_.assign(groups.size(), kNoGroup);
    indexed_.assign(static_cast<size_t>(n_blocks_for(n)), 0);
    std::vector<int32_t> positions;
    std::vector<float> all;
    std::vector<float> row(static_cast<size_t>(padded(keys.dim)));
    for (size_t i = 0; i < cells; ++i) {
        const bool grouped = groups[i] != kNoGroup;
        for (size_t s = 0; s < subspaces_.size(); ++s) {
            const uint32_t group = groups[s * cells + i];
            require((group != kNoGroup) == grouped, "a key is in groups of some subspaces only");
            require(!grouped || group < cells, "a group's number is too large");
            group_of_[i * subspaces_.size() + s] = group;
        }
        if (grouped) {
            const int32_t position = static_cast<int32_t>(i);
            kernels().rows_to_f32(keys, &position, 1, row.data());
            require(finite(row.data(), keys.dim), "a key with a NaN or an infinity is in a group");
            positions.push_back(position);
            all.insert(all.end(), row.begin(), row.begin() + keys.dim);
        }
    }
    for (size_t s = 0; s < subspaces_.size(); ++s) {
        const size_t width = static_cast<size_t>(subspaces_[s].width);
        std::vector<float> points(positions.size() * width);
        std::vector<uint32_t> group(positions.size());
        for (size_t i = 0; i < positions.size(); ++i) {
            std::copy_n(all.begin() + static_cast<ptrdiff_t>(i) * keys.dim + subspaces_[s].begin, width,
                        points.begin() + static_cast<ptrdiff_t>(i * width));
            group[i] = group_of(positions[i], s);
        }
        enclose(subspaces_[s], points, group);
    }
    mark(positions);
}

size_t BallIndex::bytes() const {
    size_t bytes = group_of_.size() * sizeof(uint32_t) + indexed_.size() * sizeof(uint64_t);
    for (const Subspace & subspace : subspaces_) {
        bytes += (subspace.first.size() + subspace.second.size()) * sizeof(float) + subspace.radius.size() * sizeof(double);
    }
    return bytes;
}

}  // namespace louver
