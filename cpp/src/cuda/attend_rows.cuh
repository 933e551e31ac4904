// Attention of a warp over rows of any type, in float32: several lanes share a row, 8 of its channels to each. A running peak
// (online softmax, arXiv 1805.02867).
#pragma once

#include "cuda/problem.h"
#include "cuda/rows.cuh"
#include "cuda/scan.cuh"
#include "cuda/warp.cuh"

namespace louver::cuda {

template <DType type> __device__ __forceinline__ int bytes_of(int dim) {
    return type == DType::f32 ? dim * 4 : type == DType::q8_0 ? dim / 32 * 34 : dim * 2;
}

__device__ __forceinline__ void prefetch_row(const std::byte * row, int bytes) {
    constexpr int kLine = 128;
    for (int first = 0; first < bytes; first += kLine) {
        prefetch(row + first);
    }
}

// n_most: queries to a group; is_roomy: shared memory is not short.
template <DType type, int n_channels, int n_most, bool is_roomy> struct Rows {
    static constexpr int kWarps = n_most > 4 || n_channels > 128 ? 4 : 12;
    static constexpr bool kRoomy = is_roomy;
    static constexpr int width = n_channels / 8;  // lanes to a row
    // Rows in flight: as many as the registers hold.
    static constexpr int kAhead = 4;
    static constexpr size_t kBytes = sizeof(float) * n_most * n_channels;

    const Problem & p;
    int lane = static_cast<int>(threadIdx.x) % 32;
    int channel = lane % width * 8;
    bool has_key = channel < p.keys.dim;
    bool has_value = channel < p.values.dim;

    float query[n_most][8];
    float reference[n_most];
    float peak[n_most];
    float kept[n_most];
    float output[n_most][8];

    __device__ Rows(const Problem & problem, std::byte *) : p(problem) {}

    // The survivors [begin, end); references: [n_most], of the scores.
    template <class Survivors, int n_all>
    __device__ void run(int group, int begin, int end, const std::byte * mask, const Survivors & survivors,
                        const Queries<n_all, n_channels> & queries, const float * references) {
        const int64_t first_row = p.first_row(group);
        const int kv_head = p.kv_head_of(group);
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            peak[i] = -infinity();
            kept[i] = 0;
            reference[i] = references[i];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                output[i][e] = 0;
                query[i][e] = queries.of[i][channel + e];
            }
        }
        int low = 0;
        for (int first = begin; first < end; first += 32) {
            const int rank = first + lane % width * (32 / width) + lane / width;
            attend(first_row, kv_head, rank < end ? survivors.cell(rank, low) : -1, mask);
        }
    }

    // Up to 32 cells, of which this lane holds the lane % width * kRows + lane / width-th; -1: none.
    __device__ void attend(int64_t first_row, int kv_head, int cell, const std::byte * mask) {
        float score[n_most];
        // The values and the later keys come to L2 while the first keys are on their way here.
        if (cell >= 0) {
            if (lane % width >= kAhead) {
                prefetch_row(p.keys.row(first_row + cell, kv_head), bytes_of<type>(p.keys.dim));
            }
            prefetch_row(p.values.row(first_row + cell, kv_head), bytes_of<type>(p.values.dim));
        }
#pragma unroll 1  // the code is run through once or twice: fetching it takes longer than what a longer body would save
        for (int first = 0; first < width; first += kAhead) {
            Eight<type> rows[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                const int at = __shfl_sync(~0u, cell, lane / width * width + first + u);
                if (at >= 0 && has_key) {
                    rows[u].load(p.keys.row(first_row + at, kv_head), channel);
                } else {
                    rows[u].clear();
                }
            }
            float sums[n_most][kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                float key[8];
                rows[u].widen(key);
#pragma unroll
                for (int i = 0; i < n_most; ++i) {
                    float sum = 0;
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        sum = fmaf(query[i][e], key[e], sum);
                    }
                    sums[i][u] = sum;
                }
            }
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                const float sum = transposed_sum<kAhead, width>(sums[i]);
                if (lane % width / kAhead == first / kAhead) {
                    score[i] = sum;
                }
            }
        }
        // A mask of other values than 0 and -infinity is added, in the score's own unit.
        const float bias = mask != nullptr && cell >= 0
                               ? __half2float(__ushort_as_half(reinterpret_cast<const uint16_t *>(mask)[cell])) * 1.44269504f
                               : 0.0f;
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            const float x = cell >= 0 ? score[i] * p.to_log2 - reference[i] + bias : -infinity();
            // Rounded up: every change of unit is then a power of two, without an error. A NaN makes everything after it NaN.
            const float most = ceilf(largest_of_warp(x));
            if (most > peak[i]) {
                const float factor = exp2_fast(peak[i] - most);
                peak[i] = most;
                kept[i] *= factor;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    output[i][e] *= factor;
                }
            }
            // -infinity - -infinity: nothing but cells of no weight so far.
            score[i] = peak[i] == -infinity() && !isnan(x) ? 0.0f : exp2_fast(x - peak[i]);
            kept[i] += score[i];
        }
#pragma unroll 1
        for (int first = 0; first < width; first += kAhead) {
            Eight<type> rows[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                const int at = __shfl_sync(~0u, cell, lane / width * width + first + u);
                if (at >= 0 && has_value) {
                    rows[u].load(p.values.row(first_row + at, kv_head), channel);
                } else {
                    rows[u].clear();
                }
            }
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                float value[8];
                rows[u].widen(value);
#pragma unroll
                for (int i = 0; i < n_most; ++i) {
                    const float weight = __shfl_sync(~0u, score[i], lane / width * width + first + u);
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        output[i][e] = fmaf(weight, value[e], output[i][e]);
                    }
                }
            }
        }
    }

    // Adds the rows of the warp up: heads [n_query], outputs [n_query][n_channels].
    __device__ void end(PartialHead * heads, float * outputs, int n_query) {
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            kept[i] = sum_of_warp(kept[i]);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
#pragma unroll
                for (int bit = width; bit < 32; bit *= 2) {
                    output[i][e] += __shfl_xor_sync(~0u, output[i][e], bit);
                }
            }
            if (i < n_query) {
                if (lane == 0) {
                    heads[i] = {peak[i], kept[i]};
                }
                if (lane < width && has_value) {
                    float4 * to = reinterpret_cast<float4 *>(outputs + i * n_channels + channel);
                    to[0] = make_float4(output[i][0], output[i][1], output[i][2], output[i][3]);
                    to[1] = make_float4(output[i][4], output[i][5], output[i][6], output[i][7]);
                }
            }
        }
    }
};

}  // namespace louver::cuda
