// How the channels are cut into subspaces: contiguous slices whose sizes differ by at most 1.
#pragma once

namespace louver {

// The first channel of subspace s of n; subspace_begin(n, n, dim) is dim.
constexpr int subspace_begin(int s, int n, int dim) { return s * dim / n; }

}  // namespace louver
