// Steps of the certificate that several kernels share; cpp/src/attention/certificate.cpp has them for the CPU.
#pragma once

#include <cmath>

#include "cuda/problem.h"
#include "cuda/warp.cuh"
#include "kernels/bounds.h"

namespace louver::cuda {

// What a cell weighs at most, relative to the reference, whose bin is the e-th byte of a word: the chord of 2^x over the octave
// of the bin's upper edge, the number whose bits rise evenly. It lies above 2^x, by 6.2 % at most.
__device__ __forceinline__ float chord_of(uint32_t bins, int e) {
    static_assert(kBinsPerOctave == 8);
    constexpr int kBit = 20;  // of an eighth of an octave, in a float
    const uint32_t bits = e < 3 ? (bins & 0xffu << 8 * e) << (kBit - 8 * e % 24) : bins >> 24 << kBit;
    return __uint_as_float(bits + ((127u << 23) - ((kReferenceBin - 1u) << kBit)));
}

// What a cell of a bin weighs on average, as part of that: the mean of 2^(-f / 8) over f in [0, 1], by that of the chord's
// excess at the 8 edges of an octave.
inline constexpr float kMeanOfBin = 0.9576f / 1.0400f;

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
