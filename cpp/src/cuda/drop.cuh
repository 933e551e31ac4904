// What the dropped cells of a share weigh at most, and what is added for them: their blocks' mean values, with the weight that
// the cells most likely have.
#pragma once

#include "cuda/certify.cuh"
#include "cuda/scan.cuh"

namespace louver::cuda {

inline constexpr int kDropWarps = 4;  // that add mean values, while the others attend

// n_warps: of the thread block.
template <int n_most, int n_warps> struct DropShared {
    float edge[kBins];  // the weight at each bin's upper edge, but for kEdgeFactor
    // Of each warp's blocks, then of all.
    float dropped[n_warps][n_most];
    float compensation[n_warps][n_most];
    float value_norm[n_warps];
    float all_dropped[n_most];
    float all_compensation[n_most];
    float longest;

    // By a whole thread block.
    __device__ __forceinline__ void fill_edges() {
        for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += n_warps * 32) {
            edge[bin] =
                bin == kBins - 1 ? 0.0f : exp2_fast(static_cast<float>(bin + 1 - kReferenceBin) * (1.0f / kBinsPerOctave));
        }
    }

    // By each warp.
    __device__ __forceinline__ void note(const float (&of_dropped)[n_most], const float (&of_compensation)[n_most],
                                         float longest_value) {
        const int warp = static_cast<int>(threadIdx.x) / 32;
        const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
        for (int i = 0; i < n_most; i += 4) {
            float both[8];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                both[k] = of_dropped[i + k];
                both[4 + k] = of_compensation[i + k];
            }
            const float sum = sum_of_warp(both);
            if (lane % 4 == 0) {
                (lane < 16 ? dropped : compensation)[warp][i + lane / 4 % 4] = sum;
            }
        }
        longest_value = largest_of_warp(longest_value);
        if (lane == 0) {
            value_norm[warp] = longest_value;
        }
    }

    // By warp `worker` of kDropWarps, once the thread block has met. Every sum of n_own blocks is rounded up for its additions.
    __device__ __forceinline__ void add_up(int worker, int n_own) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const bool is_there = lane < n_warps;
        const int warp = is_there ? lane : 0;
        const float rounding = 1.0f + 0x1p-23f * static_cast<float>(n_own + 32);
#pragma unroll 1
        for (int i = worker; i < n_most; i += kDropWarps) {
            const float sum = sum_of_warp(is_there ? dropped[warp][i] : 0.0f);
            const float added = sum_of_warp(is_there ? compensation[warp][i] : 0.0f);
            const float most = largest_of_warp(value_norm[warp]);
            if (lane == 0) {
                all_dropped[i] = sum * (kEdgeFactor * rounding);
                all_compensation[i] = added;
                longest = most;
            }
        }
    }
};

// 4 bits as 4 bytes of 0 or 255.
__device__ __forceinline__ uint32_t as_bytes(uint32_t bits) { return ((bits & 0xfu) * 0x00204081u & 0x01010101u) * 0xffu; }

// The weights at the upper edges of 4 bins.
__device__ __forceinline__ float edges(const float * edge, uint32_t bins) {
    return (edge[bins & 0xffu] + edge[bins >> 8 & 0xffu]) + (edge[bins >> 16 & 0xffu] + edge[bins >> 24]);
}

// The mean values of the first `n` of the blocks, each times its weights; by warp `worker` of kDropWarps. sums: [n_most]
// [n_channels], all of them written once the thread block has met, because they may lie where others work; those behind the
// values' last channel have no meaning.
template <int n_most, int n_channels>
__device__ __forceinline__ void add_means(const Problem & p, int group, const OwnBlocks & own, int n, int worker, float * sums) {
    constexpr int kWords = n_channels / 64;  // of 2 channels, to a lane
    constexpr int kAtOnce = n_most * kWords <= 8 ? 8 : 4;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int channel = min(lane * 2 * kWords, p.planes.value_dim - 2 * kWords);
    const int64_t first_slot = p.slot_of(group, 0);
    const float * weights = p.weights + static_cast<int64_t>(group) * p.n_blocks * kMaxShared;
    float added[n_most][kWords][2] = {};
#pragma unroll 1
    for (int first = worker; first < n; first += kDropWarps * kAtOnce) {
        uint32_t means[kAtOnce][kWords];
        float4 weight[kAtOnce][n_most / 4];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int j = first + u * kDropWarps;
            const int block = own.at(min(j, n - 1));
            const uint16_t * from = p.planes.means_of(first_slot + block) + channel;
            if constexpr (kWords == 1) {
                means[u][0] = *reinterpret_cast<const uint32_t *>(from);
            } else if constexpr (kWords == 2) {
                const uint2 words = *reinterpret_cast<const uint2 *>(from);
                means[u][0] = words.x;
                means[u][1] = words.y;
            } else {
                const uint4 words = *reinterpret_cast<const uint4 *>(from);
                means[u][0] = words.x;
                means[u][1] = words.y;
                means[u][2] = words.z;
                means[u][3] = words.w;
            }
#pragma unroll
            for (int i = 0; i < n_most / 4; ++i) {
                weight[u][i] = *reinterpret_cast<const float4 *>(weights + static_cast<int64_t>(block) * kMaxShared + 4 * i);
                if (j >= n) {
                    weight[u][i] = {0, 0, 0, 0};
                }
            }
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                const float4 & four = weight[u][i / 4];
                const float by = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
#pragma unroll
                for (int w = 0; w < kWords; ++w) {
                    added[i][w][0] = fmaf(by, __uint_as_float(means[u][w] << 16), added[i][w][0]);
                    added[i][w][1] = fmaf(by, __uint_as_float(means[u][w] & 0xffff0000u), added[i][w][1]);
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            *reinterpret_cast<float2 *>(sums + i * n_channels + (lane * kWords + w) * 2) =
                make_float2(added[i][w][0], added[i][w][1]);
        }
    }
}

}  // namespace louver::cuda
