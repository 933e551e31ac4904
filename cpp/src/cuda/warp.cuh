// What the lanes of a warp do together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"

namespace louver::cuda {

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(~0u, x, step);
    }
    return x;
}

__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(~0u, x, step);
    }
    return x;
}

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    }
    return x;
}

// Of n values at once over `width` lanes: lane l has the sum of value l % n.
template <int n, int width> __device__ __forceinline__ float transposed_sum(float (&values)[n]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int left = n, bit = 1; left > 1; left /= 2, bit *= 2) {
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int j = 0; j < left / 2; ++j) {
            const float keep = upper ? values[2 * j + 1] : values[2 * j];
            const float give = upper ? values[2 * j] : values[2 * j + 1];
            values[j] = keep + __shfl_xor_sync(~0u, give, bit);
        }
    }
#pragma unroll
    for (int bit = n; bit < width; bit *= 2) {
        values[0] += __shfl_xor_sync(~0u, values[0], bit);
    }
    return values[0];
}

// Of the lanes before this one. Of whole numbers: what is taken away again would leave a float's rounding.
template <class T> __device__ __forceinline__ T exclusive_sum(T x) {
    static_assert(std::is_integral_v<T>);
    const int lane = static_cast<int>(threadIdx.x % 32);
    T sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const T other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) {
            sum += other;
        }
    }
    return sum - x;
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

}  // namespace louver::cuda
