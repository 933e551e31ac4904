// One block of 64 cells into the planes: what GridIndex::repair does with a new grid (cpp/src/index/grid_index.cpp). Norms and
// residuals are float64, so their rounding is what docs/guarantee.md counts with.
#pragma once

#include <cfloat>

#include "cuda/problem.h"
#include "cuda/rows.cuh"
#include "cuda/warp.cuh"

namespace louver::cuda {

inline constexpr int kEncodeThreads = 256;  // at least kMaxKernelDim: a thread to a channel

struct EncodeShared {
    alignas(16) int8_t codes[kBlockCells * kMaxKernelDim];
    float center[kMaxKernelDim];
    float step[kMaxKernelDim];
    unsigned long long finite;
    unsigned long long fits;
    uint32_t bounds[5];  // of non-negative floats, whose bits rise with them
    double squares[2];
};

__device__ __forceinline__ float rounded_up(double value) { return static_cast<float>(value * (1.0 + 0x1p-20)) + FLT_MIN; }

__device__ __forceinline__ uint16_t bf16_nearest(float value) {
    const uint32_t bits = __float_as_uint(value);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ uint16_t bf16_up(float value) {
    return static_cast<uint16_t>((__float_as_uint(value) + 0xffffu) >> 16);
}

// |x| of a row, squared, by a warp.
template <DType type> __device__ __forceinline__ double squared_norm(const std::byte * row, int dim) {
    double sum = 0;
    for (int c = static_cast<int>(threadIdx.x % 32); c < dim; c += 32) {
        const double x = static_cast<double>(element<type>(row, c));
        sum += x * x;
    }
    return sum_of_warp(sum);
}

// By kEncodeThreads threads together. first_row: of the stream, in the cache.
template <DType type> __device__ void encode_block(const Planes & planes, const Plane & keys, const Plane & values,
                                                   int64_t first_row, int head, int64_t slot, int block, uint64_t wanted,
                                                   EncodeShared & shared, Totals * totals) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const int lane = thread % 32;
    const uint64_t indexed = planes.indexed[slot];
    const uint64_t pending = wanted & ~indexed & ~planes.not_finite[slot];
    if (pending == 0) {
        return;
    }
    const uint64_t cells = pending | indexed;
    const int64_t row = first_row + static_cast<int64_t>(block) * kBlockCells;
    const auto key = [&](int cell) { return keys.row(row + cell, head); };
    const auto value = [&](int cell) { return values.row(row + cell, head); };

    if (thread == 0) {
        shared.finite = 0;
        shared.fits = 0;
    }
    if (thread < 5) {
        shared.bounds[thread] = 0;
    }
    for (int i = thread; i < kBlockCells * planes.width() / 4; i += kEncodeThreads) {
        reinterpret_cast<int32_t *>(shared.codes)[i] = 0;
    }
    __syncthreads();

    for (int cell = warp; cell < kBlockCells; cell += kEncodeThreads / 32) {
        if ((cells >> cell & 1) != 0) {
            const double sum = squared_norm<type>(key(cell), planes.key_dim) +
                               (planes.value_dim > 0 ? squared_norm<type>(value(cell), planes.value_dim) : 0.0);
            if (lane == 0 && isfinite(sum)) {
                atomicOr(&shared.finite, 1ull << cell);
            }
        }
    }
    __syncthreads();
    const uint64_t finite = shared.finite;

    // Both are rounded to bfloat16 first and the codes are taken relative to the rounded values, so that rounding them costs
    // coverage, made up for by the step, never correctness.
    double center_squared = 0;
    double mean_squared = 0;
    if (thread < planes.width()) {
        float low = infinity();
        float high = -infinity();
        if (thread < planes.key_dim) {
            for (uint64_t left = finite; left != 0; left &= left - 1) {
                const float x = element<type>(key(__ffsll(static_cast<long long>(left)) - 1), thread);
                low = fminf(low, x);
                high = fmaxf(high, x);
            }
        }
        uint16_t center = 0;
        uint16_t step = 0;
        if (low <= high) {
            center = bf16_nearest(0.5f * low + 0.5f * high);
            const float middle = bf16_float(center);
            step = bf16_up(fmaxf(fmaxf(high - middle, middle - low), 0.0f) / 127.0f);
            center_squared = static_cast<double>(middle) * static_cast<double>(middle);
        }
        shared.center[thread] = bf16_float(center);
        shared.step[thread] = bf16_float(step);
        planes.center_of(slot)[grid_position(thread, planes.n_tiles)] = center;
        planes.step_of(slot)[grid_position(thread, planes.n_tiles)] = step;
    }
    __syncthreads();

    for (int cell = warp; cell < kBlockCells; cell += kEncodeThreads / 32) {
        if ((finite >> cell & 1) == 0) {
            continue;
        }
        const std::byte * at = key(cell);
        bool fits = true;
        double residual_squared = 0;
        double key_squared = 0;
        int code_squared = 0;
        for (int c = lane; c < planes.key_dim; c += 32) {
            const float x = element<type>(at, c);
            const float middle = shared.center[c];
            const float width = shared.step[c];
            const float level = width > 0 ? rintf((x - middle) / width) : 0.0f;
            // A step that underflowed, or keys near the largest float.
            if ((width == 0 && x != middle) || !(level >= -128.0f && level <= 127.0f)) {
                fits = false;
                continue;
            }
            const int code = static_cast<int>(level);
            shared.codes[code_position(cell, c, planes.n_tiles)] = static_cast<int8_t>(code);
            code_squared += code * code;
            const double residual = static_cast<double>(x) - (static_cast<double>(middle) + static_cast<double>(width) * code);
            residual_squared += residual * residual;
            key_squared += static_cast<double>(x) * static_cast<double>(x);
        }
        residual_squared = sum_of_warp(residual_squared);
        key_squared = sum_of_warp(key_squared);
        code_squared = __reduce_add_sync(~0u, code_squared);
        fits = __all_sync(~0u, fits);
        const double value_squared = planes.value_dim > 0 ? squared_norm<type>(value(cell), planes.value_dim) : 0.0;
        const float residual = rounded_up(sqrt(residual_squared));
        if (lane == 0 && fits && isfinite(residual)) {
            atomicOr(&shared.fits, 1ull << cell);
            atomicMax(&shared.bounds[0], __float_as_uint(residual));
            atomicMax(&shared.bounds[1], __float_as_uint(rounded_up(sqrt(static_cast<double>(code_squared)))));
            atomicMax(&shared.bounds[3], __float_as_uint(rounded_up(sqrt(key_squared))));
            atomicMax(&shared.bounds[4], __float_as_uint(rounded_up(sqrt(value_squared))));
        }
    }
    __syncthreads();
    const uint64_t fits = shared.fits;

    if (thread < planes.value_dim) {
        float sum = 0;
        for (uint64_t left = fits; left != 0; left &= left - 1) {
            sum += element<type>(value(__ffsll(static_cast<long long>(left)) - 1), thread);
        }
        uint16_t mean = fits != 0 ? bf16_nearest(sum / static_cast<float>(__popcll(static_cast<long long>(fits)))) : uint16_t{0};
        if (!isfinite(bf16_float(mean))) {  // the sum overflowed, or was rounded up to infinity
            mean = 0;
        }
        planes.means_of(slot)[thread] = mean;
        mean_squared = static_cast<double>(bf16_float(mean)) * static_cast<double>(bf16_float(mean));
    }
    // The sums of squares over the channels, by the first warp.
    double * squares = reinterpret_cast<double *>(shared.center);  // [256] over center and step, which are done with
    static_assert(sizeof(shared.center) + sizeof(shared.step) >= kEncodeThreads * sizeof(double));
    for (int which = 0; which < 2; ++which) {
        squares[thread] = which == 0 ? center_squared : mean_squared;
        __syncthreads();
        if (warp == 0) {
            double sum = 0;
            for (int i = lane; i < kEncodeThreads; i += 32) {
                sum += squares[i];
            }
            sum = sum_of_warp(sum);
            if (lane == 0) {
                shared.squares[which] = sum;
            }
        }
        __syncthreads();
    }
    int4 * codes = reinterpret_cast<int4 *>(planes.codes_of(slot));
    for (int i = thread; i < kBlockCells * planes.width() / 16; i += kEncodeThreads) {
        codes[i] = reinterpret_cast<const int4 *>(shared.codes)[i];
    }
    if (thread == 0) {
        BlockBounds bounds;
        bounds.residual_norm = __uint_as_float(shared.bounds[0]);
        bounds.code_norm = __uint_as_float(shared.bounds[1]);
        bounds.center_norm = rounded_up(sqrt(shared.squares[0]));
        bounds.key_norm = __uint_as_float(shared.bounds[3]);
        bounds.value_norm = fmaxf(__uint_as_float(shared.bounds[4]), rounded_up(sqrt(shared.squares[1])));
        planes.bounds[slot] = bounds;
        planes.indexed[slot] = fits;
        planes.not_finite[slot] |= cells & ~finite;
        if (totals != nullptr) {
            atomicAdd(&totals->blocks_built, 1ull);
            atomicAdd(&totals->cells_encoded, static_cast<unsigned long long>(__popcll(static_cast<long long>(fits))));
        }
    }
    __syncthreads();  // the next block may follow
}

// The cells of a block that any token of a stream sees, if the block is complete: all of them, or its successor is in use.
__device__ __forceinline__ uint64_t complete_cells(const uint64_t * visible, int64_t stride, int n_row, int block, int n_blocks) {
    uint64_t here = 0;
    uint64_t after = 0;
    for (int row = 0; row < n_row; ++row) {
        here |= visible[row * stride + block];
        after |= block + 1 < n_blocks ? visible[row * stride + block + 1] : 0;
    }
    return here == ~uint64_t{0} || after != 0 ? here : 0;
}

}  // namespace louver::cuda
