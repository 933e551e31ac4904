// Exact attention over the survivors of all groups, in even shares, a thread block to each; a share is of one group, its warps
// take a run of the list each, and others see to a part of what the group drops. The last thread block of a group to end its
// share puts the group together.
#include "cuda/attend_rows.cuh"
#include "cuda/attend_tiles.cuh"
#include "cuda/combine.cuh"
#include "cuda/drop.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch.h"

namespace louver::cuda {
namespace {

template <class Worker> constexpr int kAttendWarps = Worker::kWarps + kDropWarps;
template <class Worker> constexpr int kAttendThreads = 32 * kAttendWarps<Worker>;

template <class Worker> struct Shared {
    DropShared drop;
    PartialHead head[Worker::kWarps][kMaxShared];
    CombineShared combine;
    bool is_last;
    // Behind it Regions; and of ints
    // [n_group * n_select] survivors of each part of the lists,
    // [n_group] of each group,
    // [n_select + 1] before each part of this group's list, and [n_select] where the part lies, less that.
    // In the place of all this in the end floats [n_most][n_attend].
};
template <class Worker> constexpr size_t kSharedBytes = (sizeof(Shared<Worker>) + 15) / 16 * 16;

// The workers' memory, in floats: in the end each has its output there, and behind it what a warp adds for dropped cells, if
// there is room for that.
template <class Worker, int n_channels, int n_most> struct Regions {
    static constexpr size_t kOutput = size_t{n_most} * n_channels;
    static constexpr size_t kStride = Worker::kBytes / sizeof(float);
    static constexpr bool kInside = kStride >= 2 * kOutput && Worker::kWarps >= kDropWarps;
    static constexpr size_t kAdded = kInside ? kOutput : Worker::kWarps * kStride;
    static constexpr size_t kAddedStride = kInside ? kStride : kOutput;
    static constexpr size_t kEnd = Worker::kWarps * kStride + (kInside ? 0 : kDropWarps * kOutput);
};

// Part of a group's survivors, and of the blocks whose other cells are dropped.
struct Share {
    SharesOfGroup of;
    int number;  // among these
    int begin;
    int end;
};

// Survivors to a share, so that there are as many shares as thread blocks at most: every group's last one may be short, and no
// group has fewer than it takes to see to what it drops.
__device__ __forceinline__ int share_length(const Problem & p, const int * groups) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int length = 0;;) {
        int total = 0;
        int n_large = 0;
        for (int group = lane; group < p.n_group; group += 32) {
            const bool is_large = groups[group] > p.least_shares * length;
            total += is_large ? groups[group] : 0;
            n_large += is_large ? 1 : 0;
        }
        total = __reduce_add_sync(~0u, total);
        n_large = __reduce_add_sync(~0u, n_large);
        const int n_even = p.n_attend - n_large - (p.n_group - n_large) * p.least_shares;
        const int longer = max((total + n_even - 1) / n_even, 1);
        if (longer <= length) {
            return length;
        }
        length = longer;
    }
}

// By a whole thread block.
__device__ __forceinline__ Share find_share(const Problem & p, int * parts, int * groups) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    for (int group = thread / 32; group < p.n_group; group += static_cast<int>(blockDim.x) / 32) {
        int sum = 0;
        for (int k = group * p.n_select + lane; k < (group + 1) * p.n_select; k += 32) {
            parts[k] = p.n_survivors[k];
            sum += parts[k];
        }
        sum = __reduce_add_sync(~0u, sum);
        if (lane == 0) {
            groups[group] = sum;
        }
    }
    __syncthreads();
    const int length = share_length(p, groups);
    const int number = static_cast<int>(blockIdx.x);
    int before = 0;
    for (int first = 0; first < p.n_group; first += 32) {
        const int group = first + lane;
        const int survivors = group < p.n_group ? groups[group] : 0;
        const int n = group < p.n_group ? max((survivors + length - 1) / length, p.least_shares) : 0;
        const int place = before + exclusive_sum(n);
        const unsigned own = __ballot_sync(~0u, place <= number && number < place + n);
        if (own != 0) {
            const int from = __ffs(static_cast<int>(own)) - 1;
            Share share;
            share.of = {first + from, __shfl_sync(~0u, place, from), __shfl_sync(~0u, n, from),
                        __shfl_sync(~0u, survivors, from)};
            share.number = number - share.of.first;
            share.begin = min(share.number * length, share.of.survivors);
            share.end = min(share.begin + length, share.of.survivors);
            return share;
        }
        before += __reduce_add_sync(~0u, n);
    }
    return {{-1, 0, 0, 0}, 0, 0, 0};
}

// What the warps found, as one share of the group, with what is added for the dropped cells.
template <class Worker, int n_channels, int n_most>
__device__ __forceinline__ void write_share(const Problem & p, int n_query, const Shared<Worker> & s, const float * regions) {
    using Memory = Regions<Worker, n_channels, n_most>;
    const int64_t number = static_cast<int64_t>(blockIdx.x) * p.n_shared;
    const int dim = p.values.dim;
    for (int k = static_cast<int>(threadIdx.x); k < n_query * n_channels; k += kAttendThreads<Worker>) {
        const int i = k / n_channels;
        const int c = k % n_channels;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kDropWarps; ++w) {
            sum += regions[Memory::kAdded + w * Memory::kAddedStride + k];
        }
        // What is dropped is relative to the reference, and has to fit into the share's unit.
        float peak = sum != 0 ? -100.0f : -infinity();
#pragma unroll
        for (int w = 0; w < Worker::kWarps; ++w) {
            peak = fmaxf(peak, s.head[w][i].peak);
        }
        float kept = 0;
        sum = sum != 0 ? sum * exp2_fast(-peak) : 0.0f;
#pragma unroll
        for (int w = 0; w < Worker::kWarps; ++w) {
            const PartialHead head = s.head[w][i];
            const float factor = head.peak == -infinity() ? 0.0f : exp2_fast(head.peak - peak);
            // A NaN has no peak.
            kept += isnan(head.kept) ? head.kept : head.kept * factor;
            sum += factor == 0.0f ? 0.0f : regions[w * Memory::kStride + k] * factor;
        }
        if (c < dim) {
            p.part[(number + i) * dim + c] = sum;
        }
        if (c == 0) {
            p.partial[number + i] = {peak, kept};
            float dropped = 0;
            float compensation = 0;
#pragma unroll
            for (int w = 0; w < kDropWarps; ++w) {
                dropped += s.drop.dropped[w][i];
                compensation += s.drop.compensation[w][i];
            }
            p.dropped[number + i] = dropped * kEdgeFactor;
            p.compensation[number + i] = compensation;
        }
    }
    if (threadIdx.x == 0) {
        float longest = 0;
#pragma unroll
        for (int w = 0; w < kDropWarps; ++w) {
            longest = fmaxf(longest, s.drop.value_norm[w]);
        }
        p.value_norm[blockIdx.x] = longest;
    }
}

// Where the survivors of a group are in its list, by their rank; by a whole thread block, which has to meet before it is used.
struct Places {
    const int32_t * list;
    int n_parts;
    int * before;
    int * place;

    __device__ __forceinline__ Places(const Problem & p, int group, const int * parts, int * memory)
        : list(p.survivors + static_cast<int64_t>(group) * p.n_blocks * kBlockCells),
          n_parts(p.n_select),
          before(memory),
          place(memory + p.n_select + 1) {
        const int lane = static_cast<int>(threadIdx.x);
        if (lane >= 32) {
            return;
        }
        int sum = 0;
        for (int first = 0; first < p.n_select; first += 32) {
            const int part = first + lane;
            const int n = part < p.n_select ? parts[group * p.n_select + part] : 0;
            const int begin = sum + exclusive_sum(n);
            if (part < p.n_select) {
                before[part] = begin;
                place[part] = p.select_begin(part) * kBlockCells - begin;
            }
            sum += __reduce_add_sync(~0u, n);
        }
    }

    __device__ __forceinline__ const int32_t * operator()(int rank) const {
        int low = 0;  // the last part that begins at or before the rank
        int high = n_parts;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (before[middle] <= rank ? low : high) = middle;
        }
        return list + place[low] + rank;
    }
};

template <class Worker, DType type, int n_channels, int n_most> __global__ void __launch_bounds__(kAttendThreads<Worker>, 1)
    attend(const __grid_constant__ Problem p) {
    std::byte * memory = shared_memory();
    Shared<Worker> & s = *reinterpret_cast<Shared<Worker> *>(memory);
    const int number = static_cast<int>(blockIdx.x);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    if (number < p.n_attend) {
        fill_edges(s.drop);
    }
    wait_for_previous();
    if (number >= p.n_attend) {
        if (thread < kEncodeThreads) {
            encode_pending<type>(p, number - p.n_attend, *reinterpret_cast<EncodeShared *>(memory));
        }
        return;
    }
    using Memory = Regions<Worker, n_channels, n_most>;
    float * regions = reinterpret_cast<float *>(memory + kSharedBytes<Worker>);
    int * parts = reinterpret_cast<int *>(regions + Memory::kEnd);
    int * groups = parts + p.n_group * p.n_select;
    const Share share = find_share(p, parts, groups);
    if (share.of.group < 0) {
        return;
    }
    const int group = share.of.group;
    const Places place_of(p, group, parts, groups + p.n_group);
    if (share.number == 0) {
        // Cleared for the next step: select is through with them, and a scan that was given up has counted too.
        for (int k = thread; k < p.n_shared * kBins; k += kAttendThreads<Worker>) {
            p.histogram[static_cast<int64_t>(group) * p.n_shared * kBins + k] = 0;
        }
        if (thread < p.n_shared) {
            p.lower[group * p.n_shared + thread] = {0, 0};
        }
    }
    __syncthreads();
    if (warp < Worker::kWarps) {
        const int row = p.row_of_group(group);
        const std::byte * mask =
            p.sight[row].plain != 0 || p.mask.data == nullptr
                ? nullptr
                : p.mask.data + row % p.n_token * p.mask.token_stride + row / p.n_token * p.mask.stream_stride;
        const int length = share.end - share.begin;
        float * output = regions + warp * Memory::kStride;
        Worker worker(p, reinterpret_cast<std::byte *>(output));
        worker.run(group, share.begin + length * warp / Worker::kWarps, share.begin + length * (warp + 1) / Worker::kWarps, mask,
                   place_of);
        worker.end(s.head[warp], output, p.n_query_of(group));
        __syncthreads();
    } else {
        const int worker = warp - Worker::kWarps;
        const auto block = [&](int which) { return static_cast<int>(static_cast<int64_t>(p.n_blocks) * which / share.of.n); };
        const Drop<n_most, n_channels> drop(p, group);
        drop.run(block(share.number), block(share.number + 1), worker, s.drop,
                 regions + Memory::kAdded + worker * Memory::kAddedStride);
    }
    __syncthreads();
    write_share<Worker, n_channels, n_most>(p, p.n_query_of(group), s, regions);
    __syncthreads();
    if (thread == 0) {
        __threadfence();
        s.is_last = atomicAdd(&p.arrived[group], 1) == share.of.n - 1;
        if (s.is_last) {
            p.arrived[group] = 0;
        }
    }
    __syncthreads();
    if (s.is_last) {
        __threadfence();
        combine_group<n_channels, n_most, kAttendWarps<Worker>>(p, share.of, s.combine, regions);
    }
}

template <class Worker, int n_channels, int n_most> size_t bytes_of(const Problem & p) {
    constexpr size_t kRegions = Regions<Worker, n_channels, n_most>::kEnd * sizeof(float);
    static_assert(kAttendThreads<Worker> >= kEncodeThreads);
    const size_t ints = static_cast<size_t>(p.n_group * p.n_select + p.n_group + 2 * p.n_select + 1) * sizeof(int);
    const size_t factors = static_cast<size_t>(n_most * p.n_attend) * sizeof(float);
    return std::max(kSharedBytes<Worker> + std::max(kRegions + ints, factors), sizeof(EncodeShared));
}

// f.template operator()<Worker, type, n_channels, n_most>(), whose bytes of shared memory the device has if there is such a
// worker.
template <DType type, int n_channels, class F> void with_worker(const Problem & p, F && f) {
    if constexpr (on_tensor_cores(type)) {
        const auto with = [&]<int n_most>() {
            // As many warps as the registers hold, which a quarter of a thread's numbers of queries and outputs takes.
            constexpr int kNumbers = n_channels * n_most * Split<type>::kParts / 8;
            constexpr int kWarps = kNumbers <= 128 ? 12 : kNumbers <= 256 ? 8 : 4;
            using Large = Tiles<type, n_channels, n_most, 16, kWarps>;
            using Small = Tiles<type, n_channels, n_most, 16, kWarps == 4 ? 4 : n_channels <= 128 ? 8 : 4>;
            if (bytes_of<Large, n_channels, n_most>(p) <= p.most_shared) {
                f.template operator()<Large, type, n_channels, n_most>();
            } else {
                f.template operator()<Small, type, n_channels, n_most>();
            }
        };
        p.n_shared <= 4 ? with.template operator()<4>() : with.template operator()<8>();
    } else {
        with_queries(p.n_shared,
                     [&]<int n_most>() { f.template operator()<Rows<type, n_channels, n_most>, type, n_channels, n_most>(); });
    }
}

template <class F> void with_worker(const Problem & p, F && f) {
    const int dim = max(p.keys.dim, p.values.dim);
    with_type(p.keys.type, [&]<DType type>() {
        dim <= 64 ? with_worker<type, 64>(p, f) : dim <= 128 ? with_worker<type, 128>(p, f) : with_worker<type, 256>(p, f);
    });
}

}  // namespace

size_t attend_bytes(const Problem & p) {
    size_t bytes = 0;
    with_worker(p,
                [&]<class Worker, DType type, int n_channels, int n_most>() { bytes = bytes_of<Worker, n_channels, n_most>(p); });
    return bytes;
}

void launch_attend(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_attend + kEncoders));
    with_worker(p, [&]<class Worker, DType type, int n_channels, int n_most>() {
        launch_kernel(attend<Worker, type, n_channels, n_most>,
                      {grid, kAttendThreads<Worker>, bytes_of<Worker, n_channels, n_most>(p), p.overlaps}, stream, p);
    });
}

bool fits(const Problem & p) {
    if (static_cast<int64_t>(p.n_group) * p.n_blocks >= (int64_t{1} << 31) / kBlockCells) {
        return false;  // survivors are counted in 32 bits
    }
    if (p.n_blocks > 1 << kMostBlockBits) {
        return false;
    }
    return std::max({scan_bytes(p), select_bytes(p), attend_bytes(p)}) <= p.most_shared;
}

}  // namespace louver::cuda
