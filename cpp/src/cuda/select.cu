// From the bins to the survivors. A cell is dropped for a group only if every query has it below its threshold; a threshold is
// the highest whose bins, each cell counted with the weight at its bin's upper edge, add up to at most epsilon of the mass: the
// mass oracle (louver/mass_oracle.h) with all weights as its sample, and so with nothing left to verify.
#include "cuda/certify.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace louver::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kAtOnce = 4;  // blocks to a warp: 8 lanes to each, 8 cells to a lane

struct Shared {
    int threshold[kMaxShared];
    float edge[kBins];  // the weight at each bin's upper edge, but for upper_edge's last factor
    float dropped[kWarps][kMaxShared];
    float compensation[kWarps][kMaxShared];
    float value_norm[kWarps];
};
constexpr size_t kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
// Behind it the warps' added values, [kWarps][n_most][64 n_pairs]; and for each block of the share the survivors as bits, and how
// many there are before them.
constexpr size_t kBytesPerBlock = sizeof(uint64_t) + sizeof(int);

// A query's threshold, by a warp: what it is worked out from is on its way once this exists.
struct Oracle {
    static constexpr int kOwn = kBins / 32;
    uint32_t counts[kOwn];  // of bins lane * kOwn on
    Mass lower;

    __device__ __forceinline__ Oracle(const Problem & p, int query) {
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
            sum += static_cast<double>(counts[b]) * static_cast<double>(upper_edge(lane * kOwn + b));
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

// 4 bytes of 0 or 255 as 4 bits, and the other way round.
__device__ __forceinline__ uint32_t as_bits(uint32_t bytes) { return (bytes & 0x08040201u) * 0x01010101u >> 24 & 0xfu; }
__device__ __forceinline__ uint32_t as_bytes(uint32_t bits) { return ((bits & 0xfu) * 0x00204081u & 0x01010101u) * 0xffu; }

// The weights at the upper edges of 4 bins.
__device__ __forceinline__ float edges(const float * edge, uint32_t bins) {
    return (edge[bins & 0xffu] + edge[bins >> 8 & 0xffu]) + (edge[bins >> 16 & 0xffu] + edge[bins >> 24]);
}

// What a warp works on at once, 8 cells to a lane: lane / 8 is the block, lane % 8 the byte of its words.
template <int n_most, int n_pairs> struct Cells {
    uint64_t seen = 0;
    uint64_t indexed = 0;
    uint2 bins[n_most];
    float slack[n_most];
    float longest = 0;
    uint32_t means[kAtOnce][n_pairs];

    // Of blocks [first, end) what was there before the scan. Nothing waits for anything here: where there is no block, another
    // is read and not taken.
    __device__ __forceinline__ void load_index(const Problem & p, int group, int64_t first_slot, int first, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const bool is_there = first + lane / 8 < end;
        const int block = is_there ? first + lane / 8 : end - 1;
        seen = is_there ? p.visible_of(group)[block] : 0;
        indexed = p.planes.indexed[first_slot + block];
        longest = p.planes.bounds[first_slot + block].value_norm;
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
#pragma unroll
            for (int j = 0; j < n_pairs; ++j) {
                const int c = min(j * 64 + lane * 2, p.planes.value_dim - 2);
                means[b][j] =
                    p.compensate
                        ? __ldg(reinterpret_cast<const uint32_t *>(p.planes.means_of(first_slot + min(first + b, end - 1)) + c))
                        : 0u;
            }
        }
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
            slack[i] = p.slack[of];
        }
    }
};

// n_most: queries to a group, n_pairs: pairs of channels to a lane, at most.
template <int n_most, int n_pairs> __global__ void __launch_bounds__(kWarps * 32) select(const __grid_constant__ Problem p) {
    std::byte * memory = shared_memory();
    Shared & s = *reinterpret_cast<Shared *>(memory);
    constexpr int kWidth = 64 * n_pairs;
    float * added_by_warps = reinterpret_cast<float *>(memory + kSharedBytes);
    uint64_t * bits = reinterpret_cast<uint64_t *>(added_by_warps + kWarps * n_most * kWidth);
    const int group = static_cast<int>(blockIdx.y);
    const int split = static_cast<int>(blockIdx.x);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int begin = p.select_begin(split);
    const int end = p.select_begin(split + 1);
    int * places = reinterpret_cast<int *>(bits + (end - begin));
    const int64_t first_slot = p.slot_of(group, 0);
    const int sinks_end = p.sight[p.row_of_group(group)].sinks_end;
    const int recent_begin = p.sight[p.row_of_group(group)].recent_begin;

    static_assert(kWarps * 32 == kBins);
    const int bin = static_cast<int>(threadIdx.x);
    s.edge[bin] = bin == kBins - 1 ? 0.0f : exp2_fast(static_cast<float>(bin + 1 - kReferenceBin) * (1.0f / kBinsPerOctave));
    // The first cells are on their way while the thresholds are worked out, and those of the index while the scan still runs.
    constexpr int kStride = kWarps * kAtOnce;
    int first = begin + warp * kAtOnce;
    Cells<n_most, n_pairs> cells;
    if (first < end) {
        cells.load_index(p, group, first_slot, first, end);
    }
    wait_for_previous();
    const int own = group * p.n_shared + min(warp, n_query - 1);
    const Oracle oracle(p, own);
    if (first < end) {
        cells.load_bins(p, group, first, end);
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
    float added[n_most][n_pairs][2] = {};  // channels j * 64 + 2 * lane and the next
    float dropped[n_most] = {};            // of the lane's block, as the next
    float compensation[n_most] = {};
    float value_norm = 0;
    const int sub = lane / 8;
    const int byte = lane % 8;
    for (; first < end; first += kStride) {
        const int block = first + sub;
        const bool is_there = block < end;
        Cells<n_most, n_pairs> next;
        if (first + kStride < end) {
            next.load_index(p, group, first_slot, first + kStride, end);
            next.load_bins(p, group, first + kStride, end);
        }
        const uint32_t seen = static_cast<uint32_t>(cells.seen >> (8 * byte)) & 0xffu;
        uint32_t keep = seen;
        if (!all && __any_sync(~0u, seen != 0)) {
            const int cell = block * kBlockCells + byte * 8;
            const int sinks = min(max(sinks_end - cell, 0), 8);
            const int recent = min(max(cell + 8 - recent_begin, 0), 8);
            uint32_t need = ~static_cast<uint32_t>(cells.indexed >> (8 * byte)) | ((1u << sinks) - 1) | ~(0xffu >> recent);
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                need |= as_bits(__vcmpgeu4(cells.bins[i].x, threshold[i])) | as_bits(__vcmpgeu4(cells.bins[i].y, threshold[i]))
                                                                                 << 4;
            }
            keep = seen & need;
            const uint32_t drops = seen & ~need;
            if (__any_sync(~0u, drops != 0)) {
                float weight[n_most];
                // The last bin, which nothing is dropped of, stands for what is not dropped.
                const uint32_t kept_bytes[2] = {~as_bytes(drops), ~as_bytes(drops >> 4)};
                value_norm = drops != 0 ? fmaxf(value_norm, cells.longest) : value_norm;
#pragma unroll
                for (int i = 0; i < n_most; ++i) {
                    const float most =
                        edges(s.edge, cells.bins[i].x | kept_bytes[0]) + edges(s.edge, cells.bins[i].y | kept_bytes[1]);
                    dropped[i] += most;
                    // The slack's middle, where the score most likely is.
                    weight[i] = drops != 0 && p.compensate ? most * (kMeanOfBin * exp2_fast(-cells.slack[i])) : 0.0f;
                }
                if (p.compensate) {
#pragma unroll
                    for (int i = 0; i < n_most; ++i) {
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
                            for (int j = 0; j < n_pairs; ++j) {
                                added[i][j][0] = fmaf(of_block, __uint_as_float(cells.means[b][j] << 16), added[i][j][0]);
                                added[i][j][1] = fmaf(of_block, __uint_as_float(cells.means[b][j] & 0xffff0000u), added[i][j][1]);
                            }
                        }
                    }
                }
            }
        }
        if (is_there) {
            reinterpret_cast<uint8_t *>(bits + (block - begin))[byte] = static_cast<uint8_t>(keep);
            reinterpret_cast<uint8_t *>(p.kept + static_cast<int64_t>(group) * p.n_blocks + block)[byte] =
                static_cast<uint8_t>(keep);
        }
        cells = next;
    }
    // The warps' sums, in an order that does not depend on timing.
#pragma unroll
    for (int i = 0; i < n_most; i += 4) {
        float both[8] = {};
#pragma unroll
        for (int k = 0; k < min(4, n_most - i); ++k) {
            both[k] = dropped[i + k];
            both[4 + k] = byte == 0 ? compensation[i + k] : 0.0f;
        }
        const float sum = sum_of_warp(both);
        if (lane % 4 == 0) {
            (lane < 16 ? s.dropped : s.compensation)[warp][i + lane / 4 % 4] = sum;
        }
    }
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
#pragma unroll
        for (int j = 0; j < n_pairs; ++j) {
            *reinterpret_cast<float2 *>(added_by_warps + (warp * n_most + i) * kWidth + j * 64 + lane * 2) =
                make_float2(added[i][j][0], added[i][j][1]);
        }
    }
    value_norm = largest_of_warp(value_norm);
    if (lane == 0) {
        s.value_norm[warp] = value_norm;
    }
    __syncthreads();
    const int64_t part = static_cast<int64_t>(group) * p.n_select + split;
    if (warp == 0) {  // where the survivors of each block have their place in the list
        int before = 0;
        for (int from = 0; from < end - begin; from += 32) {
            const int b = from + lane;
            const int n = b < end - begin ? __popcll(static_cast<long long>(bits[b])) : 0;
            const int place = before + exclusive_sum(n);
            if (b < end - begin) {
                places[b] = place;
            }
            before += __reduce_add_sync(~0u, n);
        }
        if (lane == 0) {
            p.n_survivors[part] = before;
            float longest = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                longest = fmaxf(longest, s.value_norm[w]);
            }
            p.value_norm[part] = longest;
        }
    } else {
        const int thread = static_cast<int>(threadIdx.x) - 32;
        for (int k = thread; k < n_query * kWidth; k += (kWarps - 1) * 32) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                sum += added_by_warps[w * n_most * kWidth + k];
            }
            if (k % kWidth < p.planes.value_dim) {
                p.added[(part * p.n_shared + k / kWidth) * p.planes.value_dim + k % kWidth] = sum;
            }
        }
        if (thread < n_query) {
            float sum = 0;
            float weight = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                sum += s.dropped[w][thread];
                weight += s.compensation[w][thread];
            }
            p.dropped[part * p.n_shared + thread] = sum * kEdgeFactor;
            p.compensation[part * p.n_shared + thread] = weight;
        }
    }
    __syncthreads();
    // The survivors in their order.
    int32_t * list = p.survivors + (static_cast<int64_t>(group) * p.n_blocks + begin) * kBlockCells;
#pragma unroll 2
    for (int b = warp; b < end - begin; b += kWarps) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t word = static_cast<uint32_t>(bits[b] >> (32 * half));
            const int before = half == 0 ? 0 : __popc(static_cast<uint32_t>(bits[b]));
            if ((word >> lane & 1) != 0) {
                list[places[b] + before + __popc(word & ((1u << lane) - 1))] = (begin + b) * kBlockCells + half * 32 + lane;
            }
        }
    }
}

// f.template operator()<n_most, n_pairs>()
template <class F> void with_shape(const Problem & p, F && f) {
    with_queries(p.n_shared, [&]<int n_most>() {
        p.planes.value_dim <= 64    ? f.template operator()<n_most, 1>()
        : p.planes.value_dim <= 128 ? f.template operator()<n_most, 2>()
                                    : f.template operator()<n_most, 4>();
    });
}

}  // namespace

size_t select_bytes(const Problem & p) {
    size_t bytes = kSharedBytes + static_cast<size_t>((p.n_blocks + p.n_select - 1) / p.n_select) * kBytesPerBlock;
    with_shape(p, [&]<int n_most, int n_pairs>() { bytes += kWarps * n_most * 64 * n_pairs * sizeof(float); });
    return bytes;
}

void launch_select(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_select), static_cast<unsigned>(p.n_group));
    with_shape(p, [&]<int n_most, int n_pairs>() {
        // It reads the index before it waits, which is right behind a scan alone: that has waited for whoever wrote it.
        const bool overlaps = p.overlaps && p.epsilon > 0;
        launch_kernel(select<n_most, n_pairs>, {grid, kWarps * 32, select_bytes(p), overlaps}, stream, p);
    });
}

}  // namespace louver::cuda
