// What the dropped cells of a share weigh at most, and what is added for them: their blocks' mean values, with the weight that
// the cells most likely have.
#pragma once

#include "cuda/certify.cuh"
#include "cuda/scan.cuh"
#include "cuda/share_cells.cuh"

namespace louver::cuda {

inline constexpr int kDropWarps = 4;  // that see to what is dropped, while the others attend

// What each of these warps found.
template <int n_most> struct DropShared {
    float weight[kDropWarps][n_most];        // upper bound
    float compensation[kDropWarps][n_most];  // weight that is added
    float value_norm[kDropWarps];            // of any value
};

// By warp `worker` of kDropWarps, while the others attend. n_query: 0 if nothing is dropped. sums: [n_most][n_channels], the mean
// values times their weights, all of them written once the thread block has met, because they may lie where others work; those
// behind the values' last channel have no meaning.
template <int n_most, int n_channels>
__device__ __forceinline__ void add_dropped(const Problem & p, int group, const OwnBlocks & own, const ShareCells & cells,
                                            int n_query, int worker, DropShared<n_most> & found, float * sums) {
    constexpr int kWords = n_channels / 64;  // of 2 channels, to a lane
    constexpr int kAtOnce = 4;               // blocks: 8 lanes to each, 8 cells to a lane
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int byte = lane % 8;
    const int channel = min(lane * 2 * kWords, p.planes.value_dim - 2 * kWords);
    const int64_t first_slot = p.slot_of(group, 0);
    const int n = n_query > 0 ? own.n : 0;
    float added[n_most][kWords][2] = {};
    float all[n_most] = {};           // of the lane's cells
    float compensation[n_most] = {};  // of the lane's blocks, the same in 8 lanes
    float longest = 0;
#pragma unroll 1
    for (int first = worker * kAtOnce; first < n; first += kDropWarps * kAtOnce) {
        const int j = min(first + lane / 8, n - 1);
        const uint32_t drops = first + lane / 8 < n ? reinterpret_cast<const uint8_t *>(cells.dropped + j)[byte] : 0u;
        const uint32_t drop_some = __ballot_sync(~0u, drops != 0);  // 8 lanes to a block
        uint32_t means[kAtOnce][kWords] = {};                       // a block's that nothing is dropped of may be anything
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            if ((drop_some >> 8 * u & 0xffu) == 0 || !p.compensate) {
                continue;
            }
            const uint16_t * from = p.planes.means_of(first_slot + own.at(first + u)) + channel;
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
        }
        longest = drops != 0 ? fmaxf(longest, cells.longest[j]) : longest;
        float weight[n_most] = {};
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            if (i >= n_query) {
                continue;
            }
            const uint2 bins = *reinterpret_cast<const uint2 *>(cells.bins + (j * n_most + i) * kBlockCells + byte * 8);
            float most = 0;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float chord = chord_of(e < 4 ? bins.x : bins.y, e % 4);
                if ((drops >> e & 1) != 0) {
                    most += chord;
                }
            }
            all[i] += most;
            // The slack's middle, where the score most likely is. Where nothing is dropped the slack has no meaning.
            weight[i] = drops != 0 && p.compensate ? most * (kMeanOfBin * exp2_fast(-cells.slack[j * n_most + i])) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            if (i >= n_query) {
                continue;
            }
#pragma unroll
            for (int bit = 1; bit < 8; bit *= 2) {
                weight[i] += __shfl_xor_sync(~0u, weight[i], bit);
            }
            compensation[i] += weight[i];
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            float by[n_most];
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                by[i] = __shfl_sync(~0u, weight[i], 8 * u);
            }
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                const float low = __uint_as_float(means[u][w] << 16);
                const float high = __uint_as_float(means[u][w] & 0xffff0000u);
#pragma unroll
                for (int i = 0; i < n_most; ++i) {
                    added[i][w][0] = fmaf(by[i], low, added[i][w][0]);
                    added[i][w][1] = fmaf(by[i], high, added[i][w][1]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
        all[i] = sum_of_warp(all[i]);
        compensation[i] += __shfl_xor_sync(~0u, compensation[i], 8);
        compensation[i] += __shfl_xor_sync(~0u, compensation[i], 16);
        if (lane == 0) {
            found.weight[worker][i] = all[i];
            found.compensation[worker][i] = compensation[i];
        }
    }
    longest = largest_of_warp(longest);
    if (lane == 0) {
        found.value_norm[worker] = longest;
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
