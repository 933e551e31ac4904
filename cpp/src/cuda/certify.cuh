// Steps of the certificate that several kernels share; cpp/src/attention/certificate.cpp has them for the CPU.
#pragma once

#include <cmath>

#include "cuda/problem.h"
#include "cuda/warp.cuh"
#include "kernels/bounds.h"

namespace louver::cuda {

// The weight at the upper edge of a bin, relative to the reference.
inline constexpr float kEdgeFactor = 1.0f + 0x1p-20f;  // for the error of exp2_fast
__device__ __forceinline__ float upper_edge(int bin) {
    return exp2_fast(static_cast<float>(bin + 1 - kReferenceBin) * (1.0f / kBinsPerOctave)) * kEdgeFactor;
}

// What a cell of a bin weighs on average, as part of the edge: the mean of 2^(-f / 8) over f in [0, 1].
inline constexpr float kMeanOfBin = 0.9576f;

// Every dropped cell's q.k is below this: its place lay under the threshold's bin.
__device__ inline float tau_of(int threshold, float reference, float to_log2) {
    if (threshold <= 0) {
        return -infinity();
    }
    const double log2_weight = static_cast<double>(threshold - kReferenceBin) / kBinsPerOctave + 4 * kWeightError;
    const double raw = (log2_weight + static_cast<double>(reference) + fabs(static_cast<double>(reference)) * 0x1p-20) /
                       static_cast<double>(to_log2);
    return nextafterf(static_cast<float>(raw), infinity());
}

// How far a float32 dot product is from the exact one at most, in log2 units.
__device__ inline double score_error(float query_norm, float key_norm, int dim, float to_log2) {
    return (2.0 * dim + 16.0) * static_cast<double>(kUnit) * query_norm * key_norm * to_log2;
}

}  // namespace louver::cuda
