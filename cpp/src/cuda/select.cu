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

// By a warp. All of its lanes return the same.
__device__ int threshold_of(const Problem & p, int group, int i, double & least) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Mass & lower = p.lower[group * p.n_shared + i];
    least = static_cast<double>(lower.small) * static_cast<double>(kSmallUnit) +
            static_cast<double>(lower.large) * static_cast<double>(kLargeUnit);
    const double target = static_cast<double>(p.epsilon) * least * (1.0 - 4 * kWeightError);

    constexpr int kOwn = kBins / 32;
    const uint32_t * histogram = p.histogram + (static_cast<int64_t>(group) * p.n_shared + i) * kBins + lane * kOwn;
    double sums[kOwn];
    double sum = 0;
#pragma unroll
    for (int b = 0; b < kOwn; ++b) {
        sum += static_cast<double>(histogram[b]) * static_cast<double>(upper_edge(lane * kOwn + b));
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

    // Blocks [first, end). Nothing waits for anything here: where there are no bins, what is read is not taken.
    __device__ __forceinline__ void load(const Problem & p, int group, int64_t first_slot, int first, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const bool is_there = first + lane / 8 < end;
        const int block = is_there ? first + lane / 8 : end - 1;
        const int n_query = p.n_query_of(group);
        seen = is_there ? p.visible_of(group)[block] : 0;
        indexed = p.planes.indexed[first_slot + block];
        longest = p.planes.bounds[first_slot + block].value_norm;
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            const int64_t of = (static_cast<int64_t>(group) * p.n_shared + min(i, n_query - 1)) * p.n_blocks + block;
            bins[i] = *reinterpret_cast<const uint2 *>(p.bins + of * kBlockCells + lane % 8 * 8);
            slack[i] = p.slack[of];
        }
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
};

// n_most: queries to a group, n_pairs: pairs of channels to a lane, at most.
template <int n_most, int n_pairs> __global__ void __launch_bounds__(kWarps * 32) select(const __grid_constant__ Problem p) {
    wait_for_previous();
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
    const Sight & sight = p.sight[p.row_of_group(group)];
    const bool all = !(p.epsilon > 0) || p.attend_all[group] != 0 || (p.spares_uniform && *p.uniform_of(group) > 0);

    static_assert(kWarps * 32 == kBins);
    const int bin = static_cast<int>(threadIdx.x);
    s.edge[bin] = bin == kBins - 1 ? 0.0f : exp2_fast(static_cast<float>(bin + 1 - kReferenceBin) * (1.0f / kBinsPerOctave));
    // The first cells are on their way while the thresholds are worked out.
    constexpr int kStride = kWarps * kAtOnce;
    int first = begin + warp * kAtOnce;
    Cells<n_most, n_pairs> cells;
    if (first < end) {
        cells.load(p, group, first_slot, first, end);
    }
    if (warp < n_query) {
        // Worked out even where it is not wanted, so that nothing waits to know that.
        double least = 0;
        const int found = threshold_of(p, group, warp, least);
        const int threshold = all ? kAttendAll : found;
        if (lane == 0) {
            s.threshold[warp] = threshold;
            if (split == 0) {
                p.threshold[group * p.n_shared + warp] = threshold;
                p.least[group * p.n_shared + warp] = least;
            }
        }
    }
    __syncthreads();

    uint32_t threshold[n_most];  // in each of 4 bytes
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
        threshold[i] = i < n_query && !all ? static_cast<uint32_t>(s.threshold[i]) * 0x01010101u : 0u;
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
            next.load(p, group, first_slot, first + kStride, end);
        }
        const uint32_t seen = static_cast<uint32_t>(cells.seen >> (8 * byte)) & 0xffu;
        uint32_t keep = seen;
        if (!all && __any_sync(~0u, seen != 0)) {
            const int cell = block * kBlockCells + byte * 8;
            const int sinks = min(max(sight.sinks_end - cell, 0), 8);
            const int recent = min(max(cell + 8 - sight.recent_begin, 0), 8);
            uint32_t need = ~static_cast<uint32_t>(cells.indexed >> (8 * byte)) | ((1u << sinks) - 1) | ~(0xffu >> recent);
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                if (i < n_query) {
                    need |= as_bits(__vcmpgeu4(cells.bins[i].x, threshold[i])) |
                            as_bits(__vcmpgeu4(cells.bins[i].y, threshold[i])) << 4;
                }
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
                    weight[i] = 0;
                    if (i < n_query) {
                        const float most =
                            edges(s.edge, cells.bins[i].x | kept_bytes[0]) + edges(s.edge, cells.bins[i].y | kept_bytes[1]);
                        dropped[i] += most;
                        if (p.compensate) {
                            // The slack's middle, where the score most likely is.
                            weight[i] = drops != 0 ? most * (kMeanOfBin * exp2_fast(-cells.slack[i])) : 0.0f;
#pragma unroll
                            for (int bit = 1; bit < 8; bit *= 2) {
                                weight[i] += __shfl_xor_sync(~0u, weight[i], bit);
                            }
                            compensation[i] += weight[i];
                        }
                    }
                }
                if (p.compensate) {
#pragma unroll
                    for (int b = 0; b < kAtOnce; ++b) {
#pragma unroll
                        for (int i = 0; i < n_most; ++i) {
                            if (i < n_query) {
                                const float of_block = __shfl_sync(~0u, weight[i], 8 * b);
#pragma unroll
                                for (int j = 0; j < n_pairs; ++j) {
                                    added[i][j][0] = fmaf(of_block, __uint_as_float(cells.means[b][j] << 16), added[i][j][0]);
                                    added[i][j][1] =
                                        fmaf(of_block, __uint_as_float(cells.means[b][j] & 0xffff0000u), added[i][j][1]);
                                }
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
    for (int i = 0; i < n_most; ++i) {
        const float all_dropped = sum_of_warp(dropped[i]);
        const float all_compensation = sum_of_warp(byte == 0 ? compensation[i] : 0.0f);
        if (lane == 0) {
            s.dropped[warp][i] = all_dropped;
            s.compensation[warp][i] = all_compensation;
        }
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
    for (int k = static_cast<int>(threadIdx.x); k < n_query * kWidth; k += kWarps * 32) {
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) {
            sum += added_by_warps[w * n_most * kWidth + k];
        }
        if (k % kWidth < p.planes.value_dim) {
            p.added[(part * p.n_shared + k / kWidth) * p.planes.value_dim + k % kWidth] = sum;
        }
    }
    if (static_cast<int>(threadIdx.x) < n_query) {
        float sum = 0;
        float weight = 0;
        for (int w = 0; w < kWarps; ++w) {
            sum += s.dropped[w][threadIdx.x];
            weight += s.compensation[w][threadIdx.x];
        }
        p.dropped[part * p.n_shared + threadIdx.x] = sum * kEdgeFactor;
        p.compensation[part * p.n_shared + threadIdx.x] = weight;
    }

    // The survivors in a list, in their order.
    if (warp == 0) {
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
        }
    } else if (warp == 1 && lane == 0) {
        float longest = 0;
        for (int w = 0; w < kWarps; ++w) {
            longest = fmaxf(longest, s.value_norm[w]);
        }
        p.value_norm[part] = longest;
    }
    __syncthreads();
    int32_t * list = p.survivors + (static_cast<int64_t>(group) * p.n_blocks + begin) * kBlockCells;
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
        launch_kernel(select<n_most, n_pairs>, {grid, kWarps * 32, select_bytes(p), p.overlaps}, stream, p);
    });
}

}  // namespace louver::cuda
