// Attention of a warp over rows of 16-bit floats, on the tensor cores, with the accuracy of float32: queries and weights are
// cut into parts of 16 bits, a column of the right operand to each, and keys and values are the left operand as they are stored.
// A chunk's keys are on their way into shared memory while the values of the chunk before are worked on, and the other way round.
// A running peak (online softmax, arXiv 1805.02867).
#pragma once

#include "cuda/problem.h"
#include "cuda/rows.cuh"
#include "cuda/scan.cuh"
#include "cuda/warp.cuh"

namespace louver::cuda {

// A float32 as a sum of 16-bit floats, two numbers at a time.
template <DType type> struct Split;

// 22 bits of a number between 2^-12 and 2^15.
template <> struct Split<DType::f16> {
    static constexpr int kParts = 2;
    static constexpr float kUnit = 32768.0f;  // of weights, so that small ones keep their bits
    static __device__ __forceinline__ uint32_t nearest(float a, float b) {
        const __half2 both = __floats2half2_rn(a, b);
        return *reinterpret_cast<const uint32_t *>(&both);
    }
    static __device__ __forceinline__ float2 widen(uint32_t both) {
        return __half22float2(*reinterpret_cast<const __half2 *>(&both));
    }
};

// All 24 bits.
template <> struct Split<DType::bf16> {
    static constexpr int kParts = 3;
    static constexpr float kUnit = 1.0f;
    static __device__ __forceinline__ uint32_t nearest(float a, float b) { return nearest(a) | nearest(b) << 16; }
    static __device__ __forceinline__ float2 widen(uint32_t both) {
        return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
    }
    static __device__ __forceinline__ uint32_t nearest(float x) {
        const uint32_t word = __float_as_uint(x);
        return isnan(x) ? 0x7fffu : (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
    }
};

// The `which`-th part of two numbers.
template <DType type> __device__ __forceinline__ uint32_t part_of(float a, float b, int which) {
    uint32_t part = Split<type>::nearest(a, b);
#pragma unroll
    for (int step = 1; step < Split<type>::kParts; ++step) {
        const float2 found = Split<type>::widen(part);
        a = which >= step ? a - found.x : a;
        b = which >= step ? b - found.y : b;
        part = Split<type>::nearest(a, b);
    }
    return part;
}

// n_most: queries to a group, 4 or 8; n_keys: to a chunk; n_warps: of a thread block that work; is_roomy: shared memory is not
// short.
template <DType type, int n_channels, int n_most, int n_keys, int n_warps, bool is_roomy> struct Tiles {
    static constexpr bool kRoomy = is_roomy;
    static constexpr int kKeys = n_keys;
    static constexpr int kWarps = n_warps;
    static constexpr int kQuads = n_most / 4;
    static constexpr int kPitch = 2 * n_channels + 16;  // so that 8 rows are in different banks
    static constexpr int kSteps = n_channels / 16;
    static constexpr size_t kBytes = size_t{2} * kKeys * kPitch;
    static_assert(n_most % 4 == 0 && kKeys % 16 == 0 && kKeys <= 32 && kBytes >= sizeof(float) * n_most * n_channels);
    static constexpr float kUnit = Split<type>::kUnit;
    static constexpr bool kHasThird = Split<type>::kParts > 2;
    static constexpr int kThird = kHasThird ? kSteps : 1;

    const Problem & p;
    std::byte * keys;
    std::byte * values;
    int lane = static_cast<int>(threadIdx.x) % 32;

    // Column 2 i of the right operand is the first part of the query 4 z + i, column 2 i + 1 its second; of the third parts
    // column 2 i + z. So a lane has results of the queries 4 z + lane % 4, all parts.
    uint32_t query[kQuads][kSteps][2];
    uint32_t third[kThird][2];
    float to_log2[kQuads];
    float reference[kQuads];
    float peak[kQuads];
    float kept[kQuads];
    float output[kQuads][kSteps][4];  // channels 16 t + lane / 4 and 8 more, two parts of the weights each

    __device__ Tiles(const Problem & problem, std::byte * memory) : p(problem), keys(memory), values(memory + kKeys * kPitch) {
#pragma unroll
        for (int z = 0; z < kQuads; ++z) {
            peak[z] = -infinity();
            kept[z] = 0;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    output[z][t][e] = 0;
                }
            }
        }
    }

    // A power of two that brings the largest element to 2^10 or more, below 2^11.
    struct Factor {
        float factor;
        float inverse;
        __device__ __forceinline__ Factor(const float (&own)[kSteps][4]) {
            float largest = 0;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    largest = fmaxf(largest, fabsf(own[t][e]));
                }
            }
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 37), 217);
            factor = __uint_as_float(static_cast<uint32_t>(264 - exponent) << 23);
            inverse = __uint_as_float(static_cast<uint32_t>(exponent - 10) << 23);
        }
    };

    // The lane's channels of a query.
    __device__ __forceinline__ void load_query(const Queries<n_most, n_channels> & queries, int i,
                                               float (&own)[kSteps][4]) const {
        const float * from = &queries.of[i][lane % 4 * 2];
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 both = *reinterpret_cast<const float2 *>(from + 16 * t + half * 8);
                own[t][2 * half] = both.x;
                own[t][2 * half + 1] = both.y;
            }
        }
    }

    __device__ __forceinline__ void take_query(const float (&own)[kSteps][4], int z) {
        const Factor by(own);
        to_log2[z] = p.to_log2 * __shfl_sync(~0u, by.inverse, lane % 4 * 8);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                query[z][t][half] = part_of<type>(own[t][2 * half] * by.factor, own[t][2 * half + 1] * by.factor, lane / 4 % 2);
            }
        }
    }

    // The rows of up to kKeys cells, the lane-th of which this lane holds; -1: none, zeros then.
    __device__ __forceinline__ void load(const Plane & plane, int64_t first_row, int kv_head, int cell, std::byte * to) const {
        constexpr int kLanes = n_channels / 8;
        constexpr int kAtOnce = 32 / kLanes;
        constexpr uint32_t kNone = ~0u;
        const int chunk = lane % kLanes;
        const std::byte * from = plane.row(first_row, kv_head) + chunk * 16;
        to += lane / kLanes * kPitch + chunk * 16;
        const int bytes = chunk * 8 < plane.dim ? 16 : 0;
        // In units of 16 bytes: rows of a cache are multiples of them, and 32 bits are enough for any.
        const uint32_t own = cell >= 0 ? static_cast<uint32_t>(cell) * static_cast<uint32_t>(plane.row_stride / 16) : kNone;
#pragma unroll
        for (int row = 0; row < kKeys; row += kAtOnce) {
            const uint32_t at = __shfl_sync(~0u, own, row + lane / kLanes);
            copy_async_or_zero(to + row * kPitch, from + static_cast<uint64_t>(at) * 16, at != kNone ? bytes : 0);
        }
    }

    // The survivors [begin, end). references: [n_most], of the scores.
    template <class Survivors> __device__ void run(int group, int begin, int end, const std::byte * mask,
                                                   const Survivors & survivors, const Queries<n_most, n_channels> & queries,
                                                   const float * references) {
        if (begin >= end) {
            return;
        }
        const int64_t first_row = p.first_row(group);
        const int kv_head = p.kv_head_of(group);
        int low = 0;
        const auto cell_at = [&](int first) {
            return lane < kKeys && first + lane < end ? survivors.cell(first + lane, low) : -1;
        };
        int next = cell_at(begin);
        float own[kSteps][4];
#pragma unroll
        for (int z = 0; z < kQuads; ++z) {
            load_query(queries, 4 * z + lane / 8, own);
            take_query(own, z);
            reference[z] = references[4 * z + lane % 4];
        }
        if constexpr (kHasThird) {
            // Of the query in column lane / 4.
            load_query(queries, kQuads > 1 ? lane / 8 + lane / 4 % 2 * 4 : lane / 8, own);
            const bool is_there = kQuads > 1 || lane / 4 % 2 == 0;
            const Factor by(own);
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    third[t][half] =
                        is_there ? part_of<type>(own[t][2 * half] * by.factor, own[t][2 * half + 1] * by.factor, 2) : 0u;
                }
            }
        }
        int cell = -1;
        // Each chunk asks for the next one, and before the first there is one that does nothing else.
#pragma unroll 1
        for (int first = begin - kKeys; first < end; first += kKeys) {
            const bool has_keys = first >= begin;
            const bool has_next = first + kKeys < end;
            float weight[kQuads][kKeys / 8] = {};
            if (has_keys) {
                wait_for_copies<1>();
                __syncwarp();
                score(weight, first, end, cell, mask);
            }
            __syncwarp();
            if (has_next) {
                load(p.keys, first_row, kv_head, next, keys);
            }
            commit_copies();
            if (has_keys) {
#pragma unroll
                for (int z = 0; z < kQuads; ++z) {
                    weigh(weight[z], z);
                }
                wait_for_copies<1>();
                __syncwarp();
                add(weight);
            }
            __syncwarp();
            if (has_next) {
                load(p.values, first_row, kv_head, next, values);
            }
            commit_copies();
            cell = next;
            next = cell_at(first + 2 * kKeys);
        }
        wait_for_copies();
        __syncwarp();
    }

    // Of the keys 8 j + lane / 4, in log2 units relative to the reference.
    __device__ __forceinline__ void score(float (&scores)[kQuads][kKeys / 8], int first, int end, int cell,
                                          const std::byte * mask) {
#pragma unroll
        for (int half = 0; half < kKeys / 16; ++half) {
            float sum[kQuads][4] = {};
            float last[4] = {};  // of the third parts
            const std::byte * from = keys + (half * 16 + lane % 16) * kPitch + lane / 16 * 16;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
                uint32_t tiles[4];
                load_tiles(tiles, from + t * 32);
#pragma unroll
                for (int z = 0; z < kQuads; ++z) {
                    multiply_add<type>(sum[z], tiles, query[z][t][0], query[z][t][1]);
                }
                if constexpr (kHasThird) {
                    multiply_add<type>(last, tiles, third[t][0], third[t][1]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int key = half * 16 + r * 8 + lane / 4;
                float bias = 0;
                if (mask != nullptr) {  // holds other values than 0 and -infinity: added, in the score's own unit
                    const int at = max(__shfl_sync(~0u, cell, key), 0);
                    bias = __half2float(__ushort_as_half(reinterpret_cast<const uint16_t *>(mask)[at])) * 1.44269504f;
                }
#pragma unroll
                for (int z = 0; z < kQuads; ++z) {
                    // With an infinite key the smaller parts give NaN where the first one has the answer.
                    const float high = sum[z][2 * r];
                    const float both = high + sum[z][2 * r + 1] + last[2 * r + z];
                    const float x = (isnan(both) ? high : both) * to_log2[z] - reference[z];
                    scores[z][2 * half + r] = first + key < end ? x + bias : -infinity();
                }
            }
        }
    }

    // Scores to weights, kUnit at the peak.
    __device__ __forceinline__ void weigh(float (&scores)[kKeys / 8], int z) {
        float most = -infinity();
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
            most = fmaxf(most, scores[j]);
        }
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, bit));
        }
        // Rounded up: every change of unit is then a power of two, without an error. A NaN makes everything after it NaN.
        most = ceilf(most);
        if (__any_sync(~0u, most > peak[z])) {
            const float factor = most > peak[z] ? exp2_fast(peak[z] - most) : 1.0f;
            peak[z] = fmaxf(peak[z], most);
            kept[z] *= factor;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    output[z][t][e] *= factor;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
            const float x = scores[j];
            // -infinity - -infinity: nothing but cells of no weight so far.
            scores[j] = peak[z] == -infinity() && !isnan(x) ? 0.0f : kUnit * exp2_fast(x - peak[z]);
            kept[z] += scores[j];
        }
    }

    __device__ __forceinline__ void add(const float (&weight)[kQuads][kKeys / 8]) {
#pragma unroll
        for (int half = 0; half < kKeys / 16; ++half) {
            uint32_t column[kQuads][2];
            uint32_t rest[kQuads][2];
#pragma unroll
            for (int z = 0; z < kQuads; ++z) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    // Two parts next to each other, and the third.
                    const float x = weight[z][2 * half + r];
                    const float after = x - Split<type>::widen(Split<type>::nearest(x, 0)).x;
                    const uint32_t both = Split<type>::nearest(x, after);
                    column[z][r] = transpose(both);
                    rest[z][r] = kHasThird ? transpose(Split<type>::nearest(after - Split<type>::widen(both).y, 0)) : 0;
                }
            }
            const std::byte * from = values + (half * 16 + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
                uint32_t tiles[4];
                load_tiles_transposed(tiles, from + t * 32);
#pragma unroll
                for (int z = 0; z < kQuads; ++z) {
                    multiply_add<type>(output[z][t], tiles, column[z][0], column[z][1]);
                    if constexpr (kHasThird) {
                        multiply_add<type>(output[z][t], tiles, rest[z][0], rest[z][1]);
                    }
                }
            }
        }
    }

    // heads [n_query], outputs [n_query][n_channels]; these may be where the rows were.
    __device__ void end(PartialHead * heads, float * outputs, int n_query) {
#pragma unroll
        for (int z = 0; z < kQuads; ++z) {
            const int i = 4 * z + lane % 4;
#pragma unroll
            for (int bit = 4; bit < 32; bit *= 2) {
                kept[z] += __shfl_xor_sync(~0u, kept[z], bit);
            }
            if (i >= n_query) {
                continue;
            }
            if (lane / 4 == 0) {
                heads[i] = {peak[z], kept[z] * (1.0f / kUnit)};
            }
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    outputs[i * n_channels + 16 * t + half * 8 + lane / 4] =
                        (output[z][t][2 * half] + output[z][t][2 * half + 1]) * (1.0f / kUnit);
                }
            }
        }
    }
};

}  // namespace louver::cuda
