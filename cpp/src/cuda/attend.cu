// Exact attention over the survivors of all groups, in even shares, a thread block to each; a share is of one group, its warps
// take a run of the list each. The last thread block of a group to end its share puts the group together.
#include "cuda/attend_rows.cuh"
#include "cuda/attend_tiles.cuh"
#include "cuda/combine.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch.h"

namespace louver::cuda {
namespace {

static_assert(kAttendWarps * 32 == kEncodeThreads && kAttendWarps == kMaxShared);

struct Shared {
    PartialHead head[kAttendWarps][kMaxShared];
    double kept[kAttendWarps][kMaxShared];
    float squared[kMaxShared];
    bool is_last;
    // Behind it, [Worker::kWarps] the workers' memory; and of ints
    // [n_group * n_select] survivors of each part of the lists,
    // [n_group] of each group,
    // [n_select + 1] before each part of this group's list, and [n_select] where the part lies, less that.
};
constexpr size_t kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;

// Part of a group's survivors.
struct Share {
    int group;  // -1: there are fewer shares than thread blocks
    int first;  // number of the group's first share,
    int n;      // and how many it has: 1 at least
    int begin;
    int end;
    int n_group;  // survivors of the group
};

// By a whole thread block.
__device__ __forceinline__ Share find_share(const Problem & p, int * parts, int * groups) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    for (int k = thread; k < p.n_group * p.n_select; k += kAttendWarps * 32) {
        parts[k] = p.n_survivors[k];
    }
    __syncthreads();
    for (int group = thread / 32; group < p.n_group; group += kAttendWarps) {
        int sum = 0;
        for (int k = lane; k < p.n_select; k += 32) {
            sum += parts[group * p.n_select + k];
        }
        sum = __reduce_add_sync(~0u, sum);
        if (lane == 0) {
            groups[group] = sum;
        }
    }
    __syncthreads();
    int total = 0;
    for (int group = lane; group < p.n_group; group += 32) {
        total += groups[group];
    }
    total = __reduce_add_sync(~0u, total);
    // Every group's last share may be a short one.
    const int n_even = p.n_attend - p.n_group;
    const int length = max((total + n_even - 1) / n_even, 1);
    const int number = static_cast<int>(blockIdx.x);
    int before = 0;
    for (int first = 0; first < p.n_group; first += 32) {
        const int group = first + lane;
        const int survivors = group < p.n_group ? groups[group] : 0;
        const int n = group < p.n_group ? max((survivors + length - 1) / length, 1) : 0;
        const int place = before + exclusive_sum(n);
        const unsigned own = __ballot_sync(~0u, place <= number && number < place + n);
        if (own != 0) {
            const int from = __ffs(static_cast<int>(own)) - 1;
            Share share;
            share.group = first + from;
            share.first = __shfl_sync(~0u, place, from);
            share.n = __shfl_sync(~0u, n, from);
            share.n_group = __shfl_sync(~0u, survivors, from);
            share.begin = (number - share.first) * length;
            share.end = min(share.begin + length, share.n_group);
            return share;
        }
        before += __reduce_add_sync(~0u, n);
    }
    return {-1, 0, 0, 0, 0, 0};
}

// What the warps found, as one share of the group; with its part of what select adds for the dropped cells.
template <int n_channels, int n_most> class Merge {
  public:
    // Before the warps meet: what select added is on its way meanwhile.
    __device__ __forceinline__ Merge(const Problem & p, const Share & share, int n_query, bool all)
        : p_(p), n_query_(n_query), all_(all) {
        const int dim = p.values.dim;
        const int n_added = !all && p.compensate ? p.n_select : 0;
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            const int i = min(query_of(item), n_query - 1);
            const int c = min(channel_of(item), dim - 1);
            added_[item] = 0;
#pragma unroll 2
            for (int part = static_cast<int>(blockIdx.x) - share.first; part < n_added; part += share.n) {
                added_[item] += p.added[((static_cast<int64_t>(share.group) * p.n_select + part) * p.n_shared + i) * dim + c];
            }
        }
    }

    __device__ __forceinline__ void write(const Shared & s, const float * outputs, size_t stride) const {
        const int number = static_cast<int>(blockIdx.x);
        const int dim = p_.values.dim;
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            const int i = query_of(item);
            const int c = channel_of(item);
            if (i >= n_query_) {
                continue;
            }
            // What is dropped is relative to the reference, and has to fit into the share's unit.
            float peak = all_ ? -infinity() : -100.0f;
#pragma unroll
            for (int w = 0; w < kAttendWarps; ++w) {
                peak = fmaxf(peak, s.head[w][i].peak);
            }
            float kept = 0;
            float sum = added_[item] != 0 ? added_[item] * exp2_fast(-peak) : 0.0f;
#pragma unroll
            for (int w = 0; w < kAttendWarps; ++w) {
                const PartialHead head = s.head[w][i];
                const float factor = head.peak == -infinity() ? 0.0f : exp2_fast(head.peak - peak);
                // A NaN has no peak.
                kept += isnan(head.kept) ? head.kept : head.kept * factor;
                sum += factor == 0.0f ? 0.0f : outputs[w * stride + static_cast<size_t>(i * n_channels + c)] * factor;
            }
            if (c == 0) {
                p_.partial[number * p_.n_shared + i] = {peak, kept};
            }
            if (c < dim) {
                p_.part[(static_cast<int64_t>(number) * p_.n_shared + i) * dim + c] = sum;
            }
        }
    }

  private:
    // A warp has 32 channels of a query at a time.
    static constexpr int kPerQuery = n_channels / 32;
    static constexpr int kItems = (n_most * kPerQuery + kAttendWarps - 1) / kAttendWarps;

    static __device__ __forceinline__ int number_of(int item) { return static_cast<int>(threadIdx.x) / 32 + item * kAttendWarps; }
    static __device__ __forceinline__ int query_of(int item) { return number_of(item) / kPerQuery; }
    static __device__ __forceinline__ int channel_of(int item) {
        return number_of(item) % kPerQuery * 32 + static_cast<int>(threadIdx.x) % 32;
    }

    const Problem & p_;
    int n_query_;
    bool all_;
    float added_[kItems];
};

template <class Worker, DType type, int n_channels, int n_most>
__global__ void __launch_bounds__(kAttendWarps * 32, Worker::kBlocksPerProcessor) attend(const __grid_constant__ Problem p) {
    wait_for_previous();
    std::byte * memory = shared_memory();
    if (static_cast<int>(blockIdx.x) >= p.n_attend) {
        encode_pending<type>(p, static_cast<int>(blockIdx.x) - p.n_attend, *reinterpret_cast<EncodeShared *>(memory));
        return;
    }
    Shared & s = *reinterpret_cast<Shared *>(memory);
    std::byte * regions = memory + kSharedBytes;
    int * parts = reinterpret_cast<int *>(regions + Worker::kWarps * Worker::kBytes);
    int * groups = parts + p.n_group * p.n_select;
    int * before = groups + p.n_group;
    int * place = before + p.n_select + 1;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Share share = find_share(p, parts, groups);
    if (share.group < 0) {
        return;
    }
    const int group = share.group;
    // Cleared for the next step: select is through with them, and a scan that was given up has counted too.
    if (share.first == static_cast<int>(blockIdx.x)) {
        for (int k = static_cast<int>(threadIdx.x); k < p.n_shared * kBins; k += kAttendWarps * 32) {
            p.histogram[static_cast<int64_t>(group) * p.n_shared * kBins + k] = 0;
        }
        if (static_cast<int>(threadIdx.x) < p.n_shared) {
            p.lower[group * p.n_shared + static_cast<int>(threadIdx.x)] = {0, 0};
        }
    }
    Worker worker(p, regions + static_cast<size_t>(warp) * Worker::kBytes);
    if (warp == 0) {
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
    const bool works = warp < Worker::kWarps;
    if (works) {
        worker.begin(group);
    }
    __syncthreads();
    const int32_t * list = p.survivors + static_cast<int64_t>(group) * p.n_blocks * kBlockCells;
    const auto place_of = [&](int rank) {
        int low = 0;  // the last part that begins at or before the rank
        int high = p.n_select;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (before[middle] <= rank ? low : high) = middle;
        }
        return list + place[low] + rank;
    };
    const int row = p.row_of_group(group);
    const std::byte * mask = p.sight[row].plain != 0 || p.mask.data == nullptr
                                 ? nullptr
                                 : p.mask.data + row % p.n_token * p.mask.token_stride + row / p.n_token * p.mask.stream_stride;
    const int n_query = p.n_query_of(group);
    float * outputs = reinterpret_cast<float *>(regions);
    constexpr size_t kStride = Worker::kBytes / sizeof(float);
    if (works) {
        const int length = share.end - share.begin;
        worker.run(p.first_row(group), p.kv_head_of(group), share.begin + length * warp / Worker::kWarps,
                   share.begin + length * (warp + 1) / Worker::kWarps, mask, place_of);
        worker.end(s.head[warp], outputs + static_cast<size_t>(warp) * kStride, n_query);
    } else if (lane < n_query) {
        s.head[warp][lane] = {-infinity(), 0};
    }
    const Merge<n_channels, n_most> merge(p, share, n_query, p.threshold[group * p.n_shared] == kAttendAll);
    __syncthreads();
    merge.write(s, outputs, kStride);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        s.is_last = atomicAdd(&p.arrived[group], 1) == share.n - 1;
        if (s.is_last) {
            p.arrived[group] = 0;
        }
    }
    __syncthreads();
    if (s.is_last) {
        __threadfence();
        combine_group<n_channels, n_most>(p, group, share.first, share.n, share.n_group, outputs, s.kept, s.squared);
    }
}

template <class Worker, int n_channels, int n_most> size_t bytes_of(const Problem & p) {
    constexpr size_t kRegions = Worker::kWarps * Worker::kBytes;
    static_assert(kRegions >= sizeof(float) * kAttendWarps * n_most * n_channels);  // where a group is put together in the end
    const size_t ints = static_cast<size_t>(p.n_group * p.n_select + p.n_group + 2 * p.n_select + 1);
    return std::max(kSharedBytes + kRegions + ints * sizeof(int), sizeof(EncodeShared));
}

// f.template operator()<Worker, type, n_channels, n_most>(), whose bytes of shared memory the device has if there is such a
// worker.
template <DType type, int n_channels, class F> void with_worker(const Problem & p, F && f) {
    if constexpr (on_tensor_cores(type)) {
        using Small = Tiles<type, n_channels, n_channels <= 64 ? 32 : 16, n_channels <= 128 ? 8 : 4>;
        using Large = Tiles<type, n_channels, n_channels <= 128 ? 32 : 16, 8>;
        const auto with = [&]<int n_most>() {
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
                      {grid, kAttendWarps * 32, bytes_of<Worker, n_channels, n_most>(p), p.overlaps}, stream, p);
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
