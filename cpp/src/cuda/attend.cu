// Exact attention over the survivors of all groups, in even shares: a warp takes a run of the list, one group at a time, with a
// running peak (online softmax, arXiv 1805.02867). Several lanes share a row, 8 of its channels to each.
#include "cuda/certify.cuh"
#include "cuda/combine.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace louver::cuda {
namespace {

constexpr int kWarps = 8;
static_assert(kWarps * 32 == kEncodeThreads && kWarps == kMaxShared);

struct Shared {
    PartialHead head[kWarps][kMaxShared];
    alignas(16) float output[kWarps][kMaxShared][kMaxKernelDim];
    int counts[kWarps];
    bool is_last;
    // Behind it, [n_group * n_select + 1]: survivors before each part of the list.
};

// Sums n values over `width` lanes: lane l holds the sum of value l % n after it.
template <int n, int width> __device__ __forceinline__ float transposed_sum(float (&values)[n]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int left = n, bit = 1; left > 1; left /= 2, bit *= 2) {
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int j = 0; j < left / 2; ++j) {
            const float keep = upper ? values[2 * j + 1] : values[2 * j];
            const float give = upper ? values[2 * j] : values[2 * j + 1];
            values[j] = keep + __shfl_xor_sync(~0u, give, bit);
        }
    }
#pragma unroll
    for (int bit = n; bit < width; bit *= 2) {
        values[0] += __shfl_xor_sync(~0u, values[0], bit);
    }
    return values[0];
}

template <DType type> __device__ __forceinline__ int bytes_of(int dim) {
    return type == DType::f32 ? dim * 4 : type == DType::q8_0 ? dim / 32 * 34 : dim * 2;
}

__device__ __forceinline__ void prefetch_row(const std::byte * row, int bytes) {
    constexpr int kLine = 128;
    for (int first = 0; first < bytes; first += kLine) {
        prefetch(row + first);
    }
}

// width: lanes to a row; n_most: queries to a group.
template <DType type, int width, int n_most> struct Worker {
    // Rows in flight: as many as the registers hold.
    static constexpr int kAhead = 4;

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

    __device__ explicit Worker(const Problem & problem) : p(problem) {}

    __device__ void begin(int group) {
        const int n_query = p.n_query_of(group);
        const bool all = p.threshold[group * p.n_shared] == kAttendAll;
        const float * first = p.query_of(group, 0);
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            peak[i] = -infinity();
            kept[i] = 0;
            reference[i] = i < n_query && !all ? p.reference[group * p.n_shared + i] : 0.0f;
            // Where there is none, another is loaded and not taken: a branch around each element would be most of the code.
            const auto * q = reinterpret_cast<const float *>(reinterpret_cast<const std::byte *>(first) +
                                                             min(i, n_query - 1) * p.query_head_stride);
            const bool is_there = i < n_query && has_key;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                output[i][e] = 0;
                const float x = q[has_key ? channel + e : e];
                query[i][e] = is_there ? x : 0.0f;
            }
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

    // Adds the rows of the warp up, into the warp's part of shared memory.
    __device__ void end(Shared & s, int n_query) {
        const int warp = static_cast<int>(threadIdx.x) / 32;
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
                    s.head[warp][i] = {peak[i], kept[i]};
                }
                if (lane < width && has_value) {
                    float4 * to = reinterpret_cast<float4 *>(&s.output[warp][i][channel]);
                    to[0] = make_float4(output[i][0], output[i][1], output[i][2], output[i][3]);
                    to[1] = make_float4(output[i][4], output[i][5], output[i][6], output[i][7]);
                }
            }
        }
    }
};

// The survivors before each of the list's parts, by a whole thread block.
__device__ __forceinline__ void count_before(const Problem & p, int * before, int (&counts)[kWarps]) {
    const int thread = static_cast<int>(threadIdx.x);
    const int n_parts = p.n_group * p.n_select;
    const int own = (n_parts + kWarps * 32 - 1) / (kWarps * 32);
    const int first = min(thread * own, n_parts);
    const int last = min(first + own, n_parts);
    int sum = 0;
#pragma unroll 1
    for (int part = first; part < last; ++part) {
        sum += p.n_survivors[part];
    }
    int place = exclusive_sum(sum);
    if (thread % 32 == 31) {
        counts[thread / 32] = place + sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < thread / 32; ++w) {
        place += counts[w];
    }
#pragma unroll 1
    for (int part = first; part < last; ++part) {
        before[part] = place;
        place += p.n_survivors[part];
    }
    if (thread == kWarps * 32 - 1) {
        before[n_parts] = place;
    }
    __syncthreads();
}

template <DType type, int width, int n_most> __global__ void __launch_bounds__(kWarps * 32, n_most <= 4 ? 2 : 1)
    attend(const __grid_constant__ Problem p) {
    wait_for_previous();
    std::byte * memory = shared_memory();
    if (static_cast<int>(blockIdx.x) >= p.n_attend) {
        encode_pending<type>(p, static_cast<int>(blockIdx.x) - p.n_attend, *reinterpret_cast<EncodeShared *>(memory));
        return;
    }
    Shared & s = *reinterpret_cast<Shared *>(memory);
    int * before = reinterpret_cast<int *>(memory + sizeof(Shared));
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_parts = p.n_group * p.n_select;
    count_before(p, before, s.counts);
    const int total = before[n_parts];
    const Shares shares(total, p.n_attend);
    const int block_begin = shares.begin(static_cast<int>(blockIdx.x));
    const int block_end = shares.begin(static_cast<int>(blockIdx.x) + 1);
    const int begin = block_begin + (block_end - block_begin) * warp / kWarps;
    const int end = block_begin + (block_end - block_begin) * (warp + 1) / kWarps;

    Worker<type, width, n_most> worker(p);
    for (int group = 0; group < p.n_group; ++group) {
        const int group_begin = before[group * p.n_select];
        const int group_end = before[(group + 1) * p.n_select];
        const int n_query = p.n_query_of(group);
        if (group_begin == group_end && static_cast<int>(blockIdx.x) == group % p.n_attend && warp < n_query) {
            combine_query(p, group, warp, group_begin, group_end, total);  // nothing is visible
        }
        if (max(group_begin, block_begin) >= min(group_end, block_end)) {
            continue;  // the same for the whole thread block
        }
        const int row = p.row_of_group(group);
        const std::byte * mask =
            p.sight[row].plain != 0 || p.mask.data == nullptr
                ? nullptr
                : p.mask.data + row % p.n_token * p.mask.token_stride + row / p.n_token * p.mask.stream_stride;
        const int * parts = before + group * p.n_select;
        worker.begin(group);
        const int stop = min(group_end, end);
        for (int first = max(group_begin, begin); first < stop; first += 32) {
            const int rank = first + lane % width * (32 / width) + lane / width;
            int cell = -1;
            if (rank < stop) {
                int low = 0;  // the last part that begins at or before the rank
                int high = p.n_select;
                while (high - low > 1) {
                    const int middle = (low + high) / 2;
                    (parts[middle] <= rank ? low : high) = middle;
                }
                cell = p.survivors[(static_cast<int64_t>(group) * p.n_blocks + p.select_begin(low)) * kBlockCells +
                                   (rank - parts[low])];
            }
            worker.attend(p.first_row(group), p.kv_head_of(group), cell, mask);
        }
        worker.end(s, n_query);
        __syncthreads();
        const int64_t slot = static_cast<int64_t>(blockIdx.x) + group;  // rises along the list, so no other has it
        for (int i = warp; i < n_query; i += kWarps) {
            float peak = -infinity();
            for (int w = 0; w < kWarps; ++w) {
                peak = fmaxf(peak, s.head[w][i].peak);
            }
            float kept = 0;
            float factor[kWarps];
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const PartialHead head = s.head[w][i];
                factor[w] = head.peak == -infinity() ? 0.0f : exp2_fast(head.peak - peak);
                // A NaN has no peak.
                kept += isnan(head.kept) ? head.kept : head.kept * factor[w];
            }
            if (lane == 0) {
                p.partial[slot * p.n_shared + i] = {peak, kept};
            }
            for (int c = lane; c < p.values.dim; c += 32) {
                float sum = 0;
#pragma unroll
                for (int w = 0; w < kWarps; ++w) {
                    sum += factor[w] == 0.0f ? 0.0f : s.output[w][i][c] * factor[w];
                }
                p.part[(slot * p.n_shared + i) * p.values.dim + c] = sum;
            }
        }
        // Whoever comes last puts the group together.
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            const int n_shares = shares.of(group_end - 1) - shares.of(group_begin) + 1;
            s.is_last = atomicAdd(&p.arrived[group], 1) == n_shares - 1;
            if (s.is_last) {
                p.arrived[group] = 0;
            }
        }
        __syncthreads();
        if (s.is_last && warp < n_query) {
            __threadfence();
            combine_query(p, group, warp, group_begin, group_end, total);
        }
    }
}

template <DType type, int width, int n_most> void launch(const Problem & p, cudaStream_t stream) {
    const size_t bytes = sizeof(Shared) + static_cast<size_t>(p.n_group * p.n_select + 1) * sizeof(int);
    const int n_blocks = p.n_attend + kEncoders;
    launch_kernel(attend<type, width, n_most>, {dim3(static_cast<unsigned>(n_blocks)), kWarps * 32, bytes, p.overlaps}, stream,
                  p);
}

template <DType type, int width> void launch(const Problem & p, cudaStream_t stream) {
    switch (p.n_shared) {
        case 1: return launch<type, width, 1>(p, stream);
        case 2: return launch<type, width, 2>(p, stream);
        case 3: return launch<type, width, 3>(p, stream);
        case 4: return launch<type, width, 4>(p, stream);
        default: return launch<type, width, 8>(p, stream);
    }
}

}  // namespace

void launch_attend(const Problem & p, cudaStream_t stream) {
    const int dim = max(p.keys.dim, p.values.dim);
    with_type(p.keys.type, [&]<DType type>() {
        dim <= 64 ? launch<type, 8>(p, stream) : dim <= 128 ? launch<type, 16>(p, stream) : launch<type, 32>(p, stream);
    });
}

}  // namespace louver::cuda
