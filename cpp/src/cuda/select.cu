// From the bins to the survivors. A cell is dropped for a group only if every query has it below its threshold; a threshold is
// the highest whose bins, each cell counted with the weight at its bin's upper edge, add up to at most epsilon of the mass: the
// mass oracle (louver/mass_oracle.h) with all weights as its sample, and so with nothing left to verify.
#include "cuda/certify.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch.h"

namespace louver::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kAtOnce = 4;  // blocks to a warp: 8 lanes to each, 8 cells to a lane

struct Shared {
    int threshold[kMaxShared];
    int n_kept[kWarps];
    // Behind it [blocks of the share] what is kept.
};
constexpr size_t kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;

// A query's threshold, by a warp: what it is worked out from is on its way once it is loaded.
struct Oracle {
    static constexpr int kOwn = kBins / 32;
    double edge[kOwn];      // of bins lane * kOwn on,
    uint32_t counts[kOwn];  // and the cells in them
    Mass lower;

    __device__ __forceinline__ Oracle() {
#pragma unroll
        for (int b = 0; b < kOwn; ++b) {
            edge[b] = static_cast<double>(upper_edge(static_cast<int>(threadIdx.x) % 32 * kOwn + b));
        }
    }

    __device__ __forceinline__ void load(const Problem & p, int query) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const uint4 * histogram =
            reinterpret_cast<const uint4 *>(p.histogram + static_cast<int64_t>(query) * kBins + lane * kOwn);
        static_assert(kOwn % 4 == 0);
#pragma unroll
        for (int b = 0; b < kOwn; b += 4) {
            const uint4 four = histogram[b / 4];
            counts[b] = four.x;
            counts[b + 1] = four.y;
            counts[b + 2] = four.z;
            counts[b + 3] = four.w;
        }
        lower = p.lower[query];
    }

    __device__ __forceinline__ double least() const {
        return static_cast<double>(lower.small) * static_cast<double>(kSmallUnit) +
               static_cast<double>(lower.large) * static_cast<double>(kLargeUnit);
    }

    // The same in all lanes.
    __device__ __forceinline__ int threshold(float epsilon) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const double target = static_cast<double>(epsilon) * least() * (1.0 - 4 * kWeightError);
        double sums[kOwn];
        double sum = 0;
#pragma unroll
        for (int b = 0; b < kOwn; ++b) {
            sum += static_cast<double>(counts[b]) * edge[b];
            sums[b] = sum;
        }
        const double before = exclusive_sum(sum);
        int first_kept = kBins - 1;
#pragma unroll
        for (int b = kOwn - 1; b >= 0; --b) {
            if (!(before + sums[b] <= target)) {  // a NaN keeps
                first_kept = min(first_kept, lane * kOwn + b);
            }
        }
        return __reduce_min_sync(~0u, first_kept);
    }
};

// 4 bytes of 0 or 255 as 4 bits.
__device__ __forceinline__ uint32_t as_bits(uint32_t bytes) { return (bytes & 0x08040201u) * 0x01010101u >> 24 & 0xfu; }

// What a warp works on at once, 8 cells to a lane: lane / 8 is the block, lane % 8 the byte of its words.
template <int n_most> struct Cells {
    uint64_t seen = 0;
    uint64_t indexed = 0;
    uint2 bins[n_most];

    // Of blocks [first, end) what was there before the scan. Nothing waits for anything here: where there is no block, another
    // is read and not taken.
    __device__ __forceinline__ void load_index(const Problem & p, int group, int first, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const bool is_there = first + lane / 8 < end;
        const int block = is_there ? first + lane / 8 : end - 1;
        seen = is_there ? p.visible_of(group)[block] : 0;
        indexed = p.planes.indexed[p.slot_of(group, block)];
    }

    // What the scan found. A query that is not there has the bins of the last one, which changes nothing.
    __device__ __forceinline__ void load_bins(const Problem & p, int group, int first, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int block = min(first + lane / 8, end - 1);
        const int n_query = p.n_query_of(group);
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            const int64_t of = (static_cast<int64_t>(group) * p.n_shared + min(i, n_query - 1)) * p.n_blocks + block;
            bins[i] = *reinterpret_cast<const uint2 *>(p.bins + of * kBlockCells + lane % 8 * 8);
        }
    }
};

// n_most: queries to a group, at most.
template <int n_most> __global__ void __launch_bounds__(kWarps * 32) select(const __grid_constant__ Problem p) {
    std::byte * memory = shared_memory();
    Shared & s = *reinterpret_cast<Shared *>(memory);
    uint64_t * kept = reinterpret_cast<uint64_t *>(memory + kSharedBytes);
    const int group = static_cast<int>(blockIdx.y);
    const int split = static_cast<int>(blockIdx.x);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int share = p.select_begin(split);
    const int length = p.select_begin(split + 1) - share;
    // A warp has a run of the share's blocks.
    const int begin = share + length * warp / kWarps;
    const int end = share + length * (warp + 1) / kWarps;
    const int sinks_end = p.sight[p.row_of_group(group)].sinks_end;
    const int recent_begin = p.sight[p.row_of_group(group)].recent_begin;
    // The first cells are on their way while the thresholds are worked out, and those of the index while the scan still runs.
    Cells<n_most> cells;
    if (begin < end) {
        cells.load_index(p, group, begin, end);
    }
    Oracle oracle;
    wait_for_previous();
    const int own = group * p.n_shared + min(warp, n_query - 1);
    oracle.load(p, own);
    if (begin < end) {
        cells.load_bins(p, group, begin, end);
    }
    const bool all = !(p.epsilon > 0) || p.attend_all[group] != 0 || (p.spares_uniform && *p.uniform_of(group) > 0);
    if (warp < n_query) {
        // Worked out even where it is not wanted, so that nothing waits to know that.
        const int found = oracle.threshold(p.epsilon);
        const int threshold = all ? kAttendAll : found;
        if (lane == 0) {
            s.threshold[warp] = threshold;
            if (split == 0) {
                p.threshold[own] = threshold;
                p.least[own] = oracle.least();
            }
        }
    }
    __syncthreads();

    uint32_t threshold[n_most];  // in each of 4 bytes
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
        threshold[i] = all ? 0u : static_cast<uint32_t>(s.threshold[min(i, n_query - 1)]) * 0x01010101u;
    }
    const int byte = lane % 8;
    const auto kept_of = [&](int block) { return reinterpret_cast<uint8_t *>(kept + (block - share)) + byte; };
    int n_kept = 0;
#pragma unroll 1
    for (int first = begin; first < end; first += kAtOnce) {
        const int block = first + lane / 8;
        Cells<n_most> next;
        if (first + kAtOnce < end) {
            next.load_index(p, group, first + kAtOnce, end);
            next.load_bins(p, group, first + kAtOnce, end);
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
            keep &= need;
        }
        n_kept += __popc(keep);
        if (block < end) {
            *kept_of(block) = static_cast<uint8_t>(keep);
            reinterpret_cast<uint8_t *>(p.kept + static_cast<int64_t>(group) * p.n_blocks + block)[byte] =
                static_cast<uint8_t>(keep);
        }
        cells = next;
    }
    n_kept = __reduce_add_sync(~0u, n_kept);
    if (lane == 0) {
        s.n_kept[warp] = n_kept;
    }
    __syncthreads();
    // The survivors in their order.
    int place = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        place += w < warp ? s.n_kept[w] : 0;
    }
    if (threadIdx.x == (kWarps - 1) * 32) {
        p.n_survivors[static_cast<int64_t>(group) * p.n_select + split] = place + n_kept;
    }
    int32_t * list = p.survivors + (static_cast<int64_t>(group) * p.n_blocks + share) * kBlockCells;
#pragma unroll 1
    for (int first = begin; first < end; first += kAtOnce) {
        const int block = first + lane / 8;
        const uint32_t keep = block < end ? *kept_of(block) : 0u;
        const int n = __popc(keep);
        int at = place + exclusive_sum(n);
        place += __reduce_add_sync(~0u, n);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            if ((keep >> e & 1) != 0) {
                list[at++] = block * kBlockCells + byte * 8 + e;
            }
        }
    }
}

}  // namespace

size_t select_bytes(const Problem & p) {
    return kSharedBytes + static_cast<size_t>((p.n_blocks + p.n_select - 1) / p.n_select) * sizeof(uint64_t);
}

void launch_select(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_select), static_cast<unsigned>(p.n_group));
    with_queries(p.n_shared, [&]<int n_most>() {
        // It reads the index before it waits, which is right behind a scan alone: that has waited for whoever wrote it.
        launch_kernel(select<n_most>, {grid, kWarps * 32, select_bytes(p), p.overlaps && p.epsilon > 0}, stream, p);
    });
}

}  // namespace louver::cuda
