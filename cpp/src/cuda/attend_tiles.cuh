// Attention of a warp over rows of 16-bit floats, on the tensor cores, with the accuracy of float32: queries and weights are
// cut into parts of 16 bits, a row of the left operand to each, and keys and values are the right operand as they are stored. A
// chunk's keys are on their way into shared memory while the values of the chunk before are worked on, and the other way round.
// A running peak (online softmax, arXiv 1805.02867).
#pragma once

#include "cuda/problem.h"
#include "cuda/rows.cuh"
#include "cuda/warp.cuh"

namespace louver::cuda {

// A float32 as a sum of 16-bit floats; pairs of them as the tensor cores take them.
template <DType type> struct Split;

// 22 bits of a number between 2^-12 and 2^15.
template <> struct Split<DType::f16> {
    static constexpr int kParts = 2;
    static constexpr float kUnit = 32768.0f;  // of weights, so that small ones keep their bits
    __device__ static __forceinline__ void pair(float a, float b, uint32_t (&parts)[3]) {
        const __half high_a = __float2half_rn(a);
        const __half high_b = __float2half_rn(b);
        parts[0] = bits(high_a, high_b);
        parts[1] = bits(__float2half_rn(a - __half2float(high_a)), __float2half_rn(b - __half2float(high_b)));
        parts[2] = 0;
    }
    __device__ static __forceinline__ uint32_t bits(__half a, __half b) {
        return __half_as_ushort(a) | static_cast<uint32_t>(__half_as_ushort(b)) << 16;
    }
};

// All 24 bits.
template <> struct Split<DType::bf16> {
    static constexpr int kParts = 3;
    static constexpr float kUnit = 1.0f;
    __device__ static __forceinline__ void pair(float a, float b, uint32_t (&parts)[3]) {
#pragma unroll
        for (int part = 0; part < 3; ++part) {
            const uint32_t high_a = nearest(a);
            const uint32_t high_b = nearest(b);
            parts[part] = high_a | high_b << 16;
            a -= bf16_float(static_cast<uint16_t>(high_a));
            b -= bf16_float(static_cast<uint16_t>(high_b));
        }
    }
    __device__ static __forceinline__ uint32_t nearest(float x) {
        const uint32_t word = __float_as_uint(x);
        return isnan(x) ? 0x7fffu : (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
    }
};

// n_keys: to a chunk; n_warps: of a thread block that work.
template <DType type, int n_channels, int n_keys, int n_warps> struct Tiles {
    static constexpr int kKeys = n_keys;
    static constexpr int kWarps = n_warps;
    static constexpr int kPitch = 2 * n_channels + 16;  // so that 8 rows are in different banks
    static constexpr int kSteps = n_channels / 16;
    static constexpr int kBlocksPerProcessor = 1;
    static constexpr size_t kRowBytes = size_t{2} * kKeys * kPitch;
    static constexpr size_t kBytes = kRowBytes + 2 * 32 * sizeof(int);
    static_assert(kKeys % 16 == 0 && kKeys <= 32 && kBytes >= sizeof(float) * kMaxShared * n_channels);
    static constexpr float kUnit = Split<type>::kUnit;
    static constexpr int kExtra = Split<type>::kParts > 2 ? kSteps : 1;

    const Problem & p;
    std::byte * keys;
    std::byte * values;
    int (*cells)[32];  // of the chunks to come, which arrive with rows: an answer takes longer than a chunk
    int lane = static_cast<int>(threadIdx.x) % 32;

    // A lane works for the query lane / 4: row lane / 4 of the left operand is its first part, row lane / 4 + 8 its second.
    uint32_t query[kSteps][4];
    uint32_t third[kExtra][2];
    float to_log2 = 0;
    float reference = 0;
    float peak = 0;
    float kept = 0;
    float output[2 * kSteps][4];

    __device__ Tiles(const Problem & problem, std::byte * memory)
        : p(problem), keys(memory), values(memory + kKeys * kPitch), cells(reinterpret_cast<int (*)[32]>(memory + kRowBytes)) {}

    __device__ void begin(int group) {
        const int i = lane / 4;
        const bool is_there = i < p.n_query_of(group);
        const bool all = p.threshold[group * p.n_shared] == kAttendAll;
        const float * from = p.query_of(group, is_there ? i : 0);
        const auto at = [&](int c) { return is_there && c < p.keys.dim ? from[c] : 0.0f; };
        float own[kSteps][4];
        float largest = 0;
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                own[t][e] = at(16 * t + e / 2 * 8 + lane % 4 * 2 + e % 2);
                largest = fmaxf(largest, fabsf(own[t][e]));
            }
        }
        const float scanned_with = p.reference[group * p.n_shared + (is_there ? i : 0)];
        reference = is_there && !all ? scanned_with : 0.0f;
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        // A power of two that brings the largest element to 2^10 or more, below 2^11.
        const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 37), 217);
        const float factor = __uint_as_float(static_cast<uint32_t>(264 - exponent) << 23);
        to_log2 = p.to_log2 * __uint_as_float(static_cast<uint32_t>(exponent - 10) << 23);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t parts[3];
                Split<type>::pair(own[t][2 * half] * factor, own[t][2 * half + 1] * factor, parts);
                query[t][2 * half] = parts[0];
                query[t][2 * half + 1] = parts[1];
                if constexpr (Split<type>::kParts > 2) {
                    third[t][half] = parts[2];
                }
            }
        }
        peak = -infinity();
        kept = 0;
#pragma unroll
        for (int t = 0; t < 2 * kSteps; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                output[t][e] = 0;
            }
        }
    }

    // The rows of up to kKeys cells, the lane-th of which this lane holds; -1: none, zeros then.
    __device__ __forceinline__ void load(const Plane & plane, int64_t first_row, int kv_head, int cell, std::byte * to) const {
        constexpr int kLanes = n_channels / 8;
        constexpr int kAtOnce = 32 / kLanes;
        const int chunk = lane % kLanes;
        const std::byte * from = plane.row(first_row, kv_head) + chunk * 16;
        to += lane / kLanes * kPitch + chunk * 16;
        const bool has_chunk = chunk * 8 < plane.dim;
#pragma unroll
        for (int row = 0; row < kKeys; row += kAtOnce) {
            const int at = __shfl_sync(~0u, cell, row + lane / kLanes);
            const bool is_there = at >= 0 && has_chunk;
            copy_async_or_zero(to + row * kPitch, is_there ? from + at * plane.row_stride : from, is_there);
        }
    }

    // The survivors [begin, end) of the group; place_of says where in global memory the number of a survivor's cell is.
    template <class PlaceOf>
    __device__ void run(int64_t first_row, int kv_head, int begin, int end, const std::byte * mask, const PlaceOf & place_of) {
        if (begin >= end) {
            return;
        }
        const auto is_mine = [&](int first) { return lane < kKeys && first + lane < end; };
        // Every lane asks for what it reads.
        const auto ask = [&](int first, int slot) {
            if (is_mine(first)) {
                copy_async<4>(&cells[slot][lane], place_of(first + lane));
            }
        };
        int cell = is_mine(begin) ? *place_of(begin + lane) : -1;
        ask(begin + kKeys, 1);
        load(p.keys, first_row, kv_head, cell, keys);
        commit_copies();
        load(p.values, first_row, kv_head, cell, values);
        commit_copies();
        int slot = 0;
#pragma unroll 1
        for (int first = begin; first < end; first += kKeys) {
            const bool has_next = first + kKeys < end;
            float weight[kKeys / 8][2];
            wait_for_copies<1>();
            __syncwarp();
            score(weight, first, end, cell, mask);
            __syncwarp();
            const int next = is_mine(first + kKeys) ? cells[1 - slot][lane] : -1;
            if (has_next) {
                ask(first + 2 * kKeys, slot);
                load(p.keys, first_row, kv_head, next, keys);
            }
            commit_copies();
            weigh(weight);
            wait_for_copies<1>();
            __syncwarp();
            add(weight);
            __syncwarp();
            if (has_next) {
                load(p.values, first_row, kv_head, next, values);
            }
            commit_copies();
            cell = next;
            slot = 1 - slot;
        }
        wait_for_copies();
        __syncwarp();
    }

    // Of the keys 8 j + lane % 4 * 2 and the next, in log2 units relative to the reference.
    __device__ __forceinline__ void score(float (&scores)[kKeys / 8][2], int first, int end, int cell, const std::byte * mask) {
#pragma unroll
        for (int half = 0; half < kKeys / 16; ++half) {
            float sum[2][4] = {};
            float last[2][4] = {};  // of the third part
            const std::byte * from = keys + (half * 16 + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
                uint32_t tiles[4];
                load_tiles(tiles, from + t * 32);
                multiply_add<type>(sum[0], query[t], tiles[0], tiles[1]);
                multiply_add<type>(sum[1], query[t], tiles[2], tiles[3]);
                if constexpr (Split<type>::kParts > 2) {
                    const uint32_t rest[4] = {third[t][0], 0, third[t][1], 0};
                    multiply_add<type>(last[0], rest, tiles[0], tiles[1]);
                    multiply_add<type>(last[1], rest, tiles[2], tiles[3]);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int key = (2 * half + j) * 8 + lane % 4 * 2 + e;
                    // With an infinite key the smaller parts give NaN where the first one has the answer.
                    const float all = sum[j][e] + sum[j][2 + e] + last[j][e];
                    float x = (isnan(all) ? sum[j][e] : all) * to_log2 - reference;
                    if (mask != nullptr) {  // holds other values than 0 and -infinity: added, in the score's own unit
                        const int at = max(__shfl_sync(~0u, cell, key), 0);
                        x += __half2float(__ushort_as_half(reinterpret_cast<const uint16_t *>(mask)[at])) * 1.44269504f;
                    }
                    scores[2 * half + j][e] = first + key < end ? x : -infinity();
                }
            }
        }
    }

    // Scores to weights, kUnit at the peak.
    __device__ __forceinline__ void weigh(float (&scores)[kKeys / 8][2]) {
        float most = -infinity();
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
            most = fmaxf(most, fmaxf(scores[j][0], scores[j][1]));
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        // Rounded up: every change of unit is then a power of two, without an error. A NaN makes everything after it NaN.
        most = ceilf(most);
        if (__any_sync(~0u, most > peak)) {
            const float factor = most > peak ? exp2_fast(peak - most) : 1.0f;
            peak = fmaxf(peak, most);
            kept *= factor;
#pragma unroll
            for (int t = 0; t < 2 * kSteps; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    output[t][e] *= factor;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float x = scores[j][e];
                // -infinity - -infinity: nothing but cells of no weight so far.
                scores[j][e] = peak == -infinity() && !isnan(x) ? 0.0f : kUnit * exp2_fast(x - peak);
                kept += scores[j][e];
            }
        }
    }

    __device__ __forceinline__ void add(const float (&weight)[kKeys / 8][2]) {
#pragma unroll
        for (int half = 0; half < kKeys / 16; ++half) {
            uint32_t left[4];
            uint32_t rest[4] = {};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t parts[3];
                Split<type>::pair(weight[2 * half + j][0], weight[2 * half + j][1], parts);
                left[2 * j] = parts[0];
                left[2 * j + 1] = parts[1];
                rest[2 * j] = parts[2];
            }
            const std::byte * from = values + (half * 16 + lane / 8 % 2 * 8 + lane % 8) * kPitch + lane / 16 * 16;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
                uint32_t tiles[4];
                load_tiles_transposed(tiles, from + t * 32);
                multiply_add<type>(output[2 * t], left, tiles[0], tiles[1]);
                multiply_add<type>(output[2 * t + 1], left, tiles[2], tiles[3]);
                if constexpr (Split<type>::kParts > 2) {
                    multiply_add<type>(output[2 * t], rest, tiles[0], tiles[1]);
                    multiply_add<type>(output[2 * t + 1], rest, tiles[2], tiles[3]);
                }
            }
        }
    }

    // heads [n_query], outputs [n_query][n_channels]; these may be where the rows were.
    __device__ void end(PartialHead * heads, float * outputs, int n_query) {
        const int i = lane / 4;
        kept += __shfl_xor_sync(~0u, kept, 1);
        kept += __shfl_xor_sync(~0u, kept, 2);
        if (i >= n_query) {
            return;
        }
        if (lane % 4 == 0) {
            heads[i] = {peak, kept * (1.0f / kUnit)};
        }
#pragma unroll
        for (int t = 0; t < 2 * kSteps; ++t) {
            *reinterpret_cast<float2 *>(outputs + i * n_channels + 8 * t + lane % 4 * 2) =
                make_float2((output[t][0] + output[t][2]) * (1.0f / kUnit), (output[t][1] + output[t][3]) * (1.0f / kUnit));
        }
    }
};

}  // namespace louver::cuda
