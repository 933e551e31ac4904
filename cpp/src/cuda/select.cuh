// From the bins to the survivors of a share. A cell is dropped only if every query of the group has it below its threshold; a
// threshold is the highest whose bins, each cell counted with the weight at its bin's upper edge, add up to at most epsilon of
// the mass: the mass oracle (louver/mass_oracle.h) with all weights as its sample, and so with nothing left to verify. Each share
// drops at most epsilon of what is its own, and of an even part of what the probes weigh; so all shares drop at most epsilon of
// the whole, and none waits for another.
#pragma once

#include "cuda/scan.cuh"
#include "cuda/share_cells.cuh"

namespace louver::cuda {

// By a warp, the same in all lanes. The sums are of float32, of what is not negative and nothing is taken away from: 16 roundings
// at most, relative to the sum, which kWeightError covers with what the edges are off by.
__device__ __forceinline__ int mass_threshold(const uint32_t * histogram, float most) {
    constexpr int kOwn = kBins / 32;
    static_assert(kOwn == kBinsPerOctave);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float target = most * (1.0f - 4 * static_cast<float>(kWeightError));
    // 2^(k / 8) for the upper edges of the lane's octave.
    constexpr float kEdges[kOwn] = {1.0905077f, 1.1892071f, 1.2968396f, 1.4142136f, 1.5422108f, 1.6817928f, 1.8340081f, 2.0f};
    const float octave = exp2_fast(static_cast<float>(lane - kReferenceBin / kBinsPerOctave));
    float sums[kOwn];
    float sum = 0;
#pragma unroll
    for (int b = 0; b < kOwn; ++b) {
        sum = fmaf(static_cast<float>(histogram[lane * kOwn + b]), kEdges[b] * octave, sum);
        sums[b] = sum;
    }
    float up_to = sum;  // and all lanes before
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(~0u, up_to, step);
        up_to += lane >= step ? other : 0.0f;
    }
    const float previous = __shfl_up_sync(~0u, up_to, 1);
    const float before = lane > 0 ? previous : 0.0f;
    int first_kept = kBins - 1;
#pragma unroll
    for (int b = kOwn - 1; b >= 0; --b) {
        if (!(before + sums[b] <= target)) {  // a NaN keeps
            first_kept = min(first_kept, lane * kOwn + b);
        }
    }
    return __reduce_min_sync(~0u, first_kept);
}

// The survivors of a share, each warp's in a list of its own: of the blocks from begin(warp) on, by cell.
template <int n_warps> struct Survivors {
    uint16_t * list;  // of the share
    OwnBlocks own;
    int before[n_warps + 1];

    static_assert((kMostOwnBlocks + n_warps - 1) / n_warps * kBlockCells <= 1 << 16);

    // First of the blocks that a warp lists.
    __device__ __forceinline__ int begin(int warp) const { return own.n * warp / n_warps; }
    __device__ __forceinline__ int n() const { return before[n_warps]; }

    // The cell of a survivor, by its rank. low: a list that begins at or before the rank; then the one it is in.
    __device__ __forceinline__ int cell(int rank, int & low) const {
        while (before[low + 1] <= rank) {
            ++low;
        }
        const int first = begin(low);
        const int number = list[first * kBlockCells + (rank - before[low])];
        return own.at(first + number / kBlockCells) * kBlockCells + number % kBlockCells;
    }
};

// 4 bytes of 0 or 255 as 4 bits.
__device__ __forceinline__ uint32_t as_bits(uint32_t bytes) { return (bytes & 0x08040201u) * 0x01010101u >> 24 & 0xfu; }

// By a whole thread block, which has to meet before its results are used. Fills all of the survivors but list and own, and
// the cells that are dropped. thresholds: [n_query] first bins that are kept, kAttendAll for all cells.
template <int n_most, int n_warps>
__device__ __forceinline__ void select_share(const Problem & p, int group, const ShareCells & cells,
                                             const int (&thresholds)[n_most], int sinks_end, int recent_begin, bool keeps_none,
                                             Survivors<n_warps> & survivors) {
    constexpr int kAtOnce = 4;  // blocks to a warp: 8 lanes to each, 8 cells to a lane
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int byte = lane % 8;
    const int begin = survivors.begin(warp);
    const int end = survivors.begin(warp + 1);
    const int n_query = p.n_query_of(group);
    const bool all = thresholds[0] == kAttendAll;
    uint16_t * list = cells.list + begin * kBlockCells;
    int n = 0;
    const bool drops_some = !keeps_none && !all;
#pragma unroll 1
    for (int first = begin; first < end; first += kAtOnce) {
        const int j = min(first + lane / 8, end - 1);
        const bool is_there = first + lane / 8 < end;
        const int block = survivors.own.at(j);
        const uint64_t seen = !is_there ? 0 : drops_some ? cells.seen[j] : p.visible_of(group)[block];
        uint32_t keep = keeps_none ? 0u : static_cast<uint32_t>(seen >> (8 * byte)) & 0xffu;
        if (drops_some) {
            const int cell = block * kBlockCells + byte * 8;
            const int sinks = min(max(sinks_end - cell, 0), 8);
            const int recent = min(max(cell + 8 - recent_begin, 0), 8);
            uint32_t need = ~static_cast<uint32_t>(cells.indexed[j] >> (8 * byte)) | ((1u << sinks) - 1) | ~(0xffu >> recent);
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                if (i < n_query) {
                    const uint32_t threshold = static_cast<uint32_t>(thresholds[i]) * 0x01010101u;
                    const uint2 bins = *reinterpret_cast<const uint2 *>(cells.bins + (j * n_most + i) * kBlockCells + byte * 8);
                    need |= as_bits(__vcmpgeu4(bins.x, threshold)) | as_bits(__vcmpgeu4(bins.y, threshold)) << 4;
                }
            }
            keep &= need;
        }
        if (is_there) {
            reinterpret_cast<uint8_t *>(cells.dropped + j)[byte] = static_cast<uint8_t>((seen >> (8 * byte) & 0xffu) & ~keep);
            const int64_t at = static_cast<int64_t>(group) * p.n_blocks + block;
            reinterpret_cast<uint8_t *>(p.kept + at)[byte] = static_cast<uint8_t>(keep);
            if (p.check && byte == 0) {
                p.bounded[at] = all ? 0 : seen & p.planes.indexed[p.slot_of(group, block)];
            }
        }
        const int found = __popc(keep);
        int at = n + exclusive_sum(found);
#pragma unroll 1
        for (int e = 0; e < 8; ++e) {
            if ((keep >> e & 1) != 0) {
                list[at++] = static_cast<uint16_t>((j - begin) * kBlockCells + byte * 8 + e);
            }
        }
        n += __reduce_add_sync(~0u, found);
    }
    if (lane == 0) {
        survivors.before[warp + 1] = n;
    }
    __syncthreads();
    if (warp == 0) {
        static_assert(n_warps <= 32);
        const int own_n = lane < n_warps ? survivors.before[lane + 1] : 0;
        const int sum = exclusive_sum(own_n);
        __syncwarp();
        if (lane < n_warps) {
            survivors.before[lane] = sum;
        }
        if (lane == n_warps - 1) {
            survivors.before[n_warps] = sum + own_n;
        }
    }
}

}  // namespace louver::cuda
