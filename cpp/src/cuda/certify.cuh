// Steps of the certificate that several kernels share; cpp/src/attention/certificate.cpp has them for the CPU.
#pragma once

#include <cmath>

#include "cuda/problem.h"
#include "cuda/warp.cuh"
#include "kernels/bounds.h"

namespace louver::cuda {

// The weights at bins' edges are worked out by exp2_fast, whose error this covers.
inline constexpr float kEdgeFactor = 1.0f + 0x1p-20f;

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

}  // namespace louver::cuda
