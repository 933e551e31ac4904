// What the dropped cells of a group weigh at most, and what is added for them: their blocks' mean values, with the weight that
// the cells most likely have. By the warps of attend that gather nothing, while the others wait for memory.
#pragma once

#include "cuda/certify.cuh"
#include "cuda/scan.cuh"

namespace louver::cuda {

inline constexpr int kDropWarps = 4;

struct DropShared {
    float edge[kBins];  // the weight at each bin's upper edge, but for upper_edge's last factor
    float dropped[kDropWarps][kMaxShared];
    float compensation[kDropWarps][kMaxShared];
    float value_norm[kDropWarps];
};

// By a whole thread block.
__device__ __forceinline__ void fill_edges(DropShared & s) {
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += static_cast<int>(blockDim.x)) {
        s.edge[bin] = bin == kBins - 1 ? 0.0f : exp2_fast(static_cast<float>(bin + 1 - kReferenceBin) * (1.0f / kBinsPerOctave));
    }
}

// 4 bits as 4 bytes of 0 or 255.
__device__ __forceinline__ uint32_t as_bytes(uint32_t bits) { return ((bits & 0xfu) * 0x00204081u & 0x01010101u) * 0xffu; }

// The weights at the upper edges of 4 bins.
__device__ __forceinline__ float edges(const float * edge, uint32_t bins) {
    return (edge[bins & 0xffu] + edge[bins >> 8 & 0xffu]) + (edge[bins >> 16 & 0xffu] + edge[bins >> 24]);
}

// n_most: queries to a group; n_channels: of a value, at most.
template <int n_most, int n_channels> class Drop {
  public:
    __device__ __forceinline__ Drop(const Problem & p, int group, const OwnBlocks & own)
        : p_(p), group_(group), own_(own), first_slot_(p.slot_of(group, 0)) {}

    // The first `end` of the blocks, by warp `worker` of kDropWarps; sums [n_most][n_channels], where other warps may have what they work
    // on: the thread block meets before they are written.
    __device__ __forceinline__ void run(int end, int worker, DropShared & s, float * sums) const {
        float added[n_most][kPairs][2] = {};  // channels j * 64 + 2 * lane and the next
        float dropped[n_most] = {};           // of the lane's block, as the next
        float compensation[n_most] = {};
        float value_norm = 0;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        int first = worker * kAtOnce;
        Cells cells;
        if (first < end) {
            load(cells, first, end);
        }
#pragma unroll 1
        for (; first < end; first += kDropWarps * kAtOnce) {
            Cells next;
            if (first + kDropWarps * kAtOnce < end) {
                load(next, first + kDropWarps * kAtOnce, end);
            }
            const uint32_t drops = cells.drops();
            if (__any_sync(~0u, drops != 0)) {
                // The last bin, which nothing is dropped of, stands for what is not dropped.
                const uint32_t kept_bytes[2] = {~as_bytes(drops), ~as_bytes(drops >> 4)};
                value_norm = drops != 0 ? fmaxf(value_norm, cells.longest) : value_norm;
                float weight[n_most];
#pragma unroll
                for (int i = 0; i < n_most; ++i) {
                    const float most =
                        edges(s.edge, cells.bins[i].x | kept_bytes[0]) + edges(s.edge, cells.bins[i].y | kept_bytes[1]);
                    dropped[i] += most;
                    // The slack's middle, where the score most likely is.
                    weight[i] = drops != 0 && p_.compensate ? most * (kMeanOfBin * exp2_fast(-cells.slack[i])) : 0.0f;
#pragma unroll
                    for (int bit = 1; bit < 8; bit *= 2) {
                        weight[i] += __shfl_xor_sync(~0u, weight[i], bit);
                    }
                    compensation[i] += weight[i];
                }
#pragma unroll
                for (int b = 0; b < kAtOnce; ++b) {
#pragma unroll
                    for (int i = 0; i < n_most; ++i) {
                        const float of_block = __shfl_sync(~0u, weight[i], 8 * b);
#pragma unroll
                        for (int j = 0; j < kPairs; ++j) {
                            added[i][j][0] = fmaf(of_block, __uint_as_float(cells.means[b][j] << 16), added[i][j][0]);
                            added[i][j][1] = fmaf(of_block, __uint_as_float(cells.means[b][j] & 0xffff0000u), added[i][j][1]);
                        }
                    }
                }
            }
            cells = next;
        }
        __syncthreads();
        // In an order that does not depend on timing.
#pragma unroll
        for (int i = 0; i < n_most; i += 4) {
            float both[8] = {};
#pragma unroll
            for (int k = 0; k < min(4, n_most - i); ++k) {
                both[k] = dropped[i + k];
                both[4 + k] = lane % 8 == 0 ? compensation[i + k] : 0.0f;
            }
            const float sum = sum_of_warp(both);
            if (lane % 4 == 0) {
                (lane < 16 ? s.dropped : s.compensation)[worker][i + lane / 4 % 4] = sum;
            }
        }
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                *reinterpret_cast<float2 *>(sums + i * n_channels + j * 64 + lane * 2) =
                    make_float2(added[i][j][0], added[i][j][1]);
            }
        }
        value_norm = largest_of_warp(value_norm);
        if (lane == 0) {
            s.value_norm[worker] = value_norm;
        }
    }

  private:
    static constexpr int kAtOnce = 4;  // blocks to a warp: 8 lanes to each, 8 cells to a lane
    static constexpr int kPairs = n_channels / 64;

    // What a warp works on at once: lane / 8 is the block, lane % 8 the byte of its words.
    struct Cells {
        uint64_t seen = 0;
        uint64_t kept = 0;
        uint2 bins[n_most];
        float slack[n_most];
        float longest = 0;
        uint32_t means[kAtOnce][kPairs];

        __device__ __forceinline__ uint32_t drops() const {
            return static_cast<uint32_t>((seen & ~kept) >> (static_cast<int>(threadIdx.x) % 8 * 8)) & 0xffu;
        }
    };

    // Nothing waits for anything here: where there is no block or query, another is read and not taken, or changes nothing.
    __device__ __forceinline__ void load(Cells & cells, int first, int end) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int n_query = p_.n_query_of(group_);
        const bool is_there = first + lane / 8 < end;
        const int block = own_.at(min(first + lane / 8, end - 1));
        cells.seen = is_there ? p_.visible_of(group_)[block] : 0;
        cells.kept = p_.kept[static_cast<int64_t>(group_) * p_.n_blocks + block];
        cells.longest = p_.planes.bounds[first_slot_ + block].value_norm;
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            const int64_t of = (static_cast<int64_t>(group_) * p_.n_shared + min(i, n_query - 1)) * p_.n_blocks + block;
            cells.bins[i] = *reinterpret_cast<const uint2 *>(p_.bins + of * kBlockCells + lane % 8 * 8);
            cells.slack[i] = p_.slack[of];
        }
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                const int c = min(j * 64 + lane * 2, p_.planes.value_dim - 2);
                cells.means[b][j] =
                    p_.compensate
                        ? __ldg(reinterpret_cast<const uint32_t *>(p_.planes.means_of(first_slot_ + own_.at(min(first + b, end - 1))) + c))
                        : 0u;
            }
        }
    }

    const Problem & p_;
    int group_;
    const OwnBlocks & own_;
    int64_t first_slot_;
};

}  // namespace louver::cuda
