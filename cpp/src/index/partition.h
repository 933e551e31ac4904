// Points into small groups of near ones.
#pragma once

#include <cstdint>
#include <vector>

#include "louver/index.h"

namespace louver {

// The group of each of n points, numbered from 0 without gaps. points: [n][width] finite. tree: a range is cut at the median of
// its widest channel until `group_size` are left, so that all groups but the last are full. kmeans: Lloyd's algorithm within
// pieces of such a tree, because comparing every point with every centre would take the square of n.
std::vector<uint32_t> partition(const std::vector<float> & points, int64_t n, int width, Grouping grouping, int group_size,
                                uint64_t seed);

}  // namespace louver
