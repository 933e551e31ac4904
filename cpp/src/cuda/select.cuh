// From the bins to the survivors of a share, and what the others weigh. A cell is dropped only if every query of the group has it
// below its threshold; a threshold is the highest whose bins, each cell counted with the weight at its bin's upper edge, add up
// to at most epsilon of the mass: the mass oracle (louver/mass_oracle.h) with all weights as its sample, and so with nothing left
// to verify. Each share drops at most epsilon of what is its own, and of an even part of what the probes weigh; so all shares
// drop at most epsilon of the whole, and none waits for another.
#pragma once

#include "cuda/drop.cuh"
#include "cuda/scan.cuh"

namespace louver::cuda {

// By a warp, the same in all lanes. The sums are of float32, of what is not negative and nothing is taken away from: 15 roundings
// at most, relative to the sum, which kWeightError covers.
__device__ __forceinline__ int mass_threshold(const uint32_t * histogram, const float * edge, float most) {
    constexpr int kOwn = kBins / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float target = most * (1.0f - 4 * static_cast<float>(kWeightError));
    float sums[kOwn];
    float sum = 0;
#pragma unroll
    for (int b = 0; b < kOwn; ++b) {
        const int bin = lane * kOwn + b;
        sum = fmaf(static_cast<float>(histogram[bin]), edge[bin], sum);
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

// The survivors of a share, each warp's in a list of its own.
template <int n_warps> struct Survivors {
    int32_t * list;  // of the share
    int n_own;       // blocks
    int before[n_warps + 1];

    // First of the blocks that a warp lists.
    __device__ __forceinline__ int begin(int warp) const { return n_own * warp / n_warps; }
    __device__ __forceinline__ int n() const { return before[n_warps]; }
    // Where in global memory the number of a survivor's cell is, by its rank.
    __device__ __forceinline__ const int32_t * operator()(int rank) const {
        int low = 0;  // the last list that begins at or before the rank
        int high = n_warps;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (before[middle] <= rank ? low : high) = middle;
        }
        return list + begin(low) * kBlockCells + (rank - before[low]);
    }
};

// 4 bytes of 0 or 255 as 4 bits.
__device__ __forceinline__ uint32_t as_bits(uint32_t bytes) { return (bytes & 0x08040201u) * 0x01010101u >> 24 & 0xfu; }

// What a warp works on at once, 8 cells to a lane: lane / 8 is the block, lane % 8 the byte of its words.
template <int n_most> struct SelectCells {
    uint64_t seen = 0;
    uint64_t indexed = 0;
    uint2 bins[n_most];
    float slack[n_most];
    float longest = 0;

    // Nothing waits for anything here: where there is no block, another is read and not taken, and a query that is not there has
    // the bins of the last one, which changes nothing.
    __device__ __forceinline__ void load(const Problem & p, int group, const OwnBlocks & own, int first, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const bool is_there = first + lane / 8 < end;
        const int block = own.at(min(first + lane / 8, end - 1));
        const int n_query = p.n_query_of(group);
        seen = is_there ? p.visible_of(group)[block] : 0;
        const int64_t slot = p.slot_of(group, block);
        indexed = p.planes.indexed[slot];
        longest = p.planes.bounds[slot].value_norm;
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            const int64_t of = (static_cast<int64_t>(group) * p.n_shared + min(i, n_query - 1)) * p.n_blocks + block;
            bins[i] = *reinterpret_cast<const uint2 *>(p.bins + of * kBlockCells + lane % 8 * 8);
            slack[i] = p.slack[of];
        }
    }
};

// By a whole thread block, which has to meet before its results are used. Fills all of the survivors but list and n_own, and what
// each warp drops. thresholds: [n_query] first bins that are kept, kAttendAll for all cells; null: none is kept.
template <int n_most, int n_warps>
__device__ __forceinline__ void select_share(const Problem & p, int group, const OwnBlocks & own, const int * thresholds,
                                             Survivors<n_warps> & survivors, DropShared<n_most, n_warps> & drop) {
    constexpr int kAtOnce = 4;  // blocks to a warp: 8 lanes to each, 8 cells to a lane
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int byte = lane % 8;
    const int sinks_end = p.sight[p.row_of_group(group)].sinks_end;
    const int recent_begin = p.sight[p.row_of_group(group)].recent_begin;
    const int begin = survivors.begin(warp);
    const int end = survivors.begin(warp + 1);
    SelectCells<n_most> cells;
    if (begin < end) {
        cells.load(p, group, own, begin, end);
    }
    const int n_query = p.n_query_of(group);
    const bool all = thresholds != nullptr && thresholds[0] == kAttendAll;
    uint32_t threshold[n_most];  // in each of 4 bytes
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
        threshold[i] = all || thresholds == nullptr ? 0u : static_cast<uint32_t>(thresholds[min(i, n_query - 1)]) * 0x01010101u;
    }
    int32_t * list = survivors.list + begin * kBlockCells;
    int n = 0;
    const bool drops_some = thresholds != nullptr && !all;
    float dropped[n_most] = {};       // of the lane's cells
    float compensation[n_most] = {};  // of the lane's block, by its first lane
    float longest = 0;
#pragma unroll 1
    for (int first = begin; first < end; first += kAtOnce) {
        const int block = own.at(min(first + lane / 8, end - 1));
        SelectCells<n_most> next;
        if (first + kAtOnce < end) {
            next.load(p, group, own, first + kAtOnce, end);
        }
        uint32_t keep = static_cast<uint32_t>(cells.seen >> (8 * byte)) & 0xffu;
        if (!all) {
            const int cell = block * kBlockCells + byte * 8;
            const int sinks = min(max(sinks_end - cell, 0), 8);
            const int recent = min(max(cell + 8 - recent_begin, 0), 8);
            uint32_t need = ~static_cast<uint32_t>(cells.indexed >> (8 * byte)) | ((1u << sinks) - 1) | ~(0xffu >> recent);
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                need |= as_bits(__vcmpgeu4(cells.bins[i].x, threshold[i])) | as_bits(__vcmpgeu4(cells.bins[i].y, threshold[i]))
                                                                                 << 4;
            }
            keep &= thresholds == nullptr ? 0u : need;
        }
        if (first + lane / 8 < end) {
            const int64_t at = static_cast<int64_t>(group) * p.n_blocks + block;
            reinterpret_cast<uint8_t *>(p.kept + at)[byte] = static_cast<uint8_t>(keep);
            if (p.check && byte == 0) {
                p.bounded[at] = all ? 0 : cells.seen & cells.indexed;
            }
        }
        const uint32_t drops = drops_some ? static_cast<uint32_t>(cells.seen >> (8 * byte)) & 0xffu & ~keep : 0u;
        float weight[n_most] = {};
        if (__any_sync(~0u, drops != 0)) {
            // The last bin, which nothing is dropped of, stands for what is not dropped.
            const uint32_t kept_bytes[2] = {~as_bytes(drops), ~as_bytes(drops >> 4)};
            longest = drops != 0 ? fmaxf(longest, cells.longest) : longest;
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                if (i >= n_query) {
                    continue;
                }
                const float most =
                    edges(drop.edge, cells.bins[i].x | kept_bytes[0]) + edges(drop.edge, cells.bins[i].y | kept_bytes[1]);
                dropped[i] += most;
                // The slack's middle, where the score most likely is.
                weight[i] = drops != 0 && p.compensate ? most * (kMeanOfBin * exp2_fast(-cells.slack[i])) : 0.0f;
            }
#pragma unroll
            for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
                for (int i = 0; i < n_most; ++i) {
                    weight[i] += __shfl_xor_sync(~0u, weight[i], bit);
                }
            }
        }
        if (drops_some && byte == 0 && first + lane / 8 < end) {
            float * to = p.weights + (static_cast<int64_t>(group) * p.n_blocks + block) * kMaxShared;
#pragma unroll
            for (int i = 0; i < n_most; i += 4) {
                *reinterpret_cast<float4 *>(to + i) = make_float4(weight[i], weight[i + 1], weight[i + 2], weight[i + 3]);
            }
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                compensation[i] += weight[i];
            }
        }
        const int found = __popc(keep);
        int at = n + exclusive_sum(found);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            if ((keep >> e & 1) != 0) {
                list[at++] = block * kBlockCells + byte * 8 + e;
            }
        }
        n += __reduce_add_sync(~0u, found);
        cells = next;
    }
    if (lane == 0) {
        survivors.before[warp + 1] = n;
    }
    drop.note(dropped, compensation, longest);
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
