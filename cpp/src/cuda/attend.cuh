// Attention of a decode step, in one kernel. A group's blocks of cells are dealt out to the thread blocks of its shares; each
// scans its own, drops what its part of epsilon allows, and attends to the rest, while other warps of it see to what is dropped.
// The last thread block of a group to end puts the group together, and the last one of a KV head encodes what has become
// complete.
#pragma once

#include "cuda/attend_rows.cuh"
#include "cuda/attend_tiles.cuh"
#include "cuda/combine.cuh"
#include "cuda/drop.cuh"
#include "cuda/finish.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/select.cuh"

namespace louver::cuda {

template <class Worker> constexpr int kAttendWarps = Worker::kWarps + kDropWarps;
template <class Worker> constexpr int kAttendThreads = 32 * kAttendWarps<Worker>;

template <class Worker, int n_channels, int n_most> struct Shared {
    Queries<n_most, n_channels> queries;
    float least[n_most];
    float reference[n_most];
    int threshold[n_most];
    DropShared<n_most> drop;
    PartialHead head[Worker::kWarps][n_most];
    StageArrivals arrivals[kAttendWarps<Worker>];
    Survivors<kAttendWarps<Worker>> survivors;
    CombineShared<n_most, n_channels> combine;
    int n_scanned;
    int n_failed;  // shares of the group
    int n_pending;
    bool is_last;
    int sinks_end;
    int recent_begin;
    // Behind it ShareCells, if there is room; and then, one after another: what the scan wants, Regions, floats [n_most][shares +
    // kSharesAtOnce], EncodeShared.
};
template <class Worker, int n_channels, int n_most>
constexpr size_t kSharedBytes = (sizeof(Shared<Worker, n_channels, n_most>) + 15) / 16 * 16;

// What the scan wants: a ring to each warp, of smaller parts if the workers are few for want of shared memory.
template <class Worker, int n_tiles, int n_most> struct ScanMemory {
    using Scratch = ScanShared<n_most, kAttendWarps<Worker>>;
    using Ring = Stage<n_tiles, n_tiles <= 4 && Worker::kRoomy ? 2 : 1>;
    static constexpr size_t kScratch = (sizeof(Scratch) + 15) / 16 * 16;
    static constexpr size_t kBytes = kScratch + kAttendWarps<Worker> * sizeof(Ring);
};

// The workers' memory, in floats, where each has its output in the end; and behind that, or behind all, what warps add for
// dropped cells.
template <class Worker, int n_channels, int n_most> struct Regions {
    static constexpr size_t kOutput = size_t{n_most} * n_channels;
    static constexpr size_t kStride = Worker::kBytes / sizeof(float);
    static constexpr bool kInside = kStride >= 2 * kOutput && Worker::kWarps >= kDropWarps;
    static constexpr size_t kAdded = kInside ? kOutput : Worker::kWarps * kStride;
    static constexpr size_t kAddedStride = kInside ? kStride : kOutput;
    static constexpr size_t kEnd = Worker::kWarps * kStride + (kInside ? 0 : kDropWarps * kOutput);
};

// What the warps found, as one share of the group, with what is added for the dropped cells.
template <class Worker, int n_channels, int n_most>
__device__ __forceinline__ void write_share(const Problem & p, int share, int n_query,
                                            const Shared<Worker, n_channels, n_most> & s, const float * regions) {
    using Layout = Regions<Worker, n_channels, n_most>;
    float * part = p.part + static_cast<int64_t>(share) * kPartStride;
    // Loops that go round a few times: each instruction of them is paid for once.
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x); k < n_query * n_channels; k += kAttendThreads<Worker>) {
        const int i = k / n_channels;
        const int c = k % n_channels;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kDropWarps; ++w) {
            sum += regions[Layout::kAdded + w * Layout::kAddedStride + k];
        }
        // What is dropped is relative to the reference, and has to fit into the share's unit.
        float peak = sum != 0 ? -100.0f : -infinity();
#pragma unroll
        for (int w = 0; w < Worker::kWarps; ++w) {
            peak = fmaxf(peak, s.head[w][i].peak);
        }
        float kept = 0;
        sum = sum != 0 ? sum * exp2_fast(-peak) : 0.0f;
#pragma unroll 4
        for (int w = 0; w < Worker::kWarps; ++w) {
            const PartialHead head = s.head[w][i];
            const float factor = head.peak == -infinity() ? 0.0f : exp2_fast(head.peak - peak);
            // A NaN has no peak.
            kept += isnan(head.kept) ? head.kept : head.kept * factor;
            sum += factor == 0.0f ? 0.0f : regions[w * Layout::kStride + k] * factor;
        }
        if (c < p.values.dim) {
            part[i * kMaxKernelDim + c] = sum;
        }
        if (c == 0) {
            float dropped = 0;
            float compensation = 0;
            for (int w = 0; w < kDropWarps; ++w) {
                dropped += s.drop.weight[w][i];
                compensation += s.drop.compensation[w][i];
            }
            // Rounded up for as many additions as were one after another.
            dropped *= 1.0f + 0x1p-23f * static_cast<float>(s.survivors.own.n + 32);
            p.of_share[static_cast<int64_t>(share) * kMaxShared + i] = {peak,       kept,           dropped, compensation,
                                                                        s.least[i], s.threshold[i], {}};
        }
    }
    if (threadIdx.x == 0) {
        float longest = 0;
        for (const float norm : s.drop.value_norm) {
            longest = fmaxf(longest, norm);
        }
        p.counts[share] = {s.n_scanned, s.survivors.n(), longest, 0};
    }
}

// What the scan finds of a share.
template <int n_most> struct KeepCells {
    const Problem & p;
    int group;
    int n;
    const ShareCells & cells;

    __device__ __forceinline__ void words(int j, const Words & words) const {
        if (j < n) {
            cells.seen[j] = words.visible;
            cells.indexed[j] = words.indexed;
        }
    }
    __device__ __forceinline__ void longest(int j, float norm) const { cells.longest[j] = norm; }
    __device__ __forceinline__ void bins(int j, int block, int i, float slack, uint64_t of_cells) const {
        const int byte = static_cast<int>(threadIdx.x) % 32 / 4;
        reinterpret_cast<uint64_t *>(cells.bins + (j * n_most + i) * kBlockCells)[byte] = of_cells;
        if (byte == 0) {
            cells.slack[j * n_most + i] = slack;
        }
        if (p.check) {
            store_bins(p, group, i, block, of_cells);
        }
    }
};

// near_bytes: what is kept of a share has in shared memory; 0: it is in global memory.
template <class Worker, DType type, int n_channels, int n_tiles, int n_most>
__global__ void __launch_bounds__(kAttendThreads<Worker>, 1) attend(const __grid_constant__ Problem p, const int near_bytes) {
    std::byte * memory = shared_memory();
    auto & s = *reinterpret_cast<Shared<Worker, n_channels, n_most> *>(memory);
    memory += kSharedBytes<Worker, n_channels, n_most>;
    std::byte * near = memory;  // of what is kept of the share, if there is room for it
    memory += near_bytes;
    float * regions = reinterpret_cast<float *>(memory);
    using Layout = Regions<Worker, n_channels, n_most>;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const GroupShares shares = p.shares_of(static_cast<int>(blockIdx.x));
    const int group = shares.group;
    const int n_query = p.n_query_of(group);
    const int row = p.row_of_group(group);
    // All that comes from memory is asked for before any of it is waited for.
    const int plain = p.sight[row].plain;
    const int wanted = p.attend_all[group];
    const int spared = *p.uniform_of(group);
    const LoadedQuery<n_channels> query(p, group);
    const LoadedProbes<type, n_channels, kAttendWarps<Worker>> probes(p, group);
    const bool is_plain = plain != 0;
    const bool asked = wanted != 0;
    const bool scans = p.epsilon > 0 && is_plain && !asked && !(p.spares_uniform && spared > 0);
    int share = static_cast<int>(blockIdx.x) - shares.first;
    OwnBlocks own = blocks_of(p, shares, share);
    const auto cells_of = [&](int of_share, int n) {
        const int64_t first = static_cast<int64_t>(group) * p.n_blocks + p.deal_of(shares).begin_of(of_share);
        return ShareCells(near_bytes > 0 ? near : p.far_cells + first * bytes_of_share_block(kMaxShared), n, n_most);
    };
    ShareCells cells = cells_of(share, own.n);
    if (thread == 0) {  // while they are near
        s.sinks_end = p.sight[row].sinks_end;
        s.recent_begin = p.sight[row].recent_begin;
    }
    using Scan = ScanMemory<Worker, n_tiles, n_most>;
    auto & scan = *reinterpret_cast<typename Scan::Scratch *>(memory);
    bool begun = false;  // the same in all thread blocks of the group, as what follows from it
    bool is_sound = true;
    if (scans) {
        auto & ring = reinterpret_cast<typename Scan::Ring *>(memory + Scan::kScratch)[warp];
        is_sound = scan_share<n_tiles>(p, group, own, query, probes, s.queries, scan, ring, s.arrivals[warp],
                                       KeepCells<n_most>{p, group, own.n, cells}, begun);
    } else {
        query.store(s.queries);
    }
    bool met = asked || (p.epsilon > 0 && !is_plain) || (scans && !begun);
    const bool failed = begun && !is_sound;  // this share: its last thread block will attend to all of the group
    if (begun && warp < n_query) {
        const float least = least_mass(scan, warp, shares.n);
        const int threshold = mass_threshold(scan.histogram[warp], p.epsilon * least);
        if (thread % 32 == 0) {
            s.threshold[warp] = threshold;
            s.least[warp] = least;
        }
    }
    if (!begun && thread < n_query) {
        s.threshold[thread] = kAttendAll;
        s.least[thread] = 0;
    }
    if (thread < n_most) {
        s.reference[thread] = begun ? scan.reference[thread] : 0.0f;
        if (share == 0 && thread < n_query) {
            p.reference[group * p.n_shared + thread] = s.reference[thread];
        }
    }
    if (thread == 0) {
        s.n_scanned = begun ? scan.scanned : 0;
        s.survivors.list = cells.list;
        s.survivors.own = own;
    }
    __syncthreads();

#pragma unroll 1
    for (bool whole = false;;) {
        select_share<n_most>(p, group, cells, s.threshold, s.sinks_end, s.recent_begin, failed && !whole, s.survivors);
        __syncthreads();
        if (warp < Worker::kWarps) {
            const std::byte * mask = is_plain || p.mask.data == nullptr ? nullptr
                                                                        : p.mask.data + row % p.n_token * p.mask.token_stride +
                                                                              row / p.n_token * p.mask.stream_stride;
            const int n = s.survivors.n();
            float * output = regions + warp * Layout::kStride;
            Worker worker(p, reinterpret_cast<std::byte *>(output));
            worker.run(group, n * warp / Worker::kWarps, n * (warp + 1) / Worker::kWarps, mask, s.survivors, s.queries,
                       s.reference);
            worker.end(s.head[warp], output, n_query);
            __syncthreads();
        } else {
            const int worker = warp - Worker::kWarps;
            add_dropped<n_most, n_channels>(p, group, own, cells, begun && !failed && !whole ? n_query : 0, worker, s.drop,
                                            regions + Layout::kAdded + worker * Layout::kAddedStride);
        }
        __syncthreads();
        write_share<Worker, n_channels, n_most>(p, shares.first + share, n_query, s, regions);
        __syncthreads();
        if (whole) {
            if (++share == shares.n) {
                break;
            }
        } else {
            if (thread == 0) {
                constexpr int kFailed = 1 << 16;
                const int before = arrive(&p.arrived[group], 1 + (failed ? kFailed : 0));
                s.is_last = before % kFailed == shares.n - 1;
                s.n_failed = before / kFailed + (failed ? 1 : 0);
                if (s.is_last) {
                    p.arrived[group] = 0;
                }
            }
            __syncthreads();
            if (!s.is_last) {
                return;
            }
            if (s.n_failed == 0) {
                break;
            }
            // Something was met that is not finite, and not by all: once more, share by share, everything.
            whole = met = true;
            share = 0;
            if (thread < n_most) {
                s.threshold[thread] = kAttendAll;
                s.reference[thread] = 0;
                s.least[thread] = 0;
            }
        }
        own = blocks_of(p, shares, share);
        cells = cells_of(share, own.n);
        if (thread == 0) {
            s.n_scanned = 0;
            s.survivors.list = cells.list;
            s.survivors.own = own;
        }
        __syncthreads();
    }
    const bool is_alone = p.groups_of_pair() == 1;
    const int pending = thread == 0 && is_alone ? __ldcg(p.n_pending + p.pair_of(group)) : 0;  // arrives meanwhile
    combine_group<n_channels, n_most, kAttendWarps<Worker>>(p, group, shares.first, shares.n, met ? 1 : 0, s.reference, s.combine,
                                                            regions);
    if (thread == 0) {
        s.is_last = true;
        s.n_pending = pending;
        if (!is_alone) {
            int32_t & combined = p.combined[p.pair_of(group)];
            s.is_last = arrive(&combined, 1) == p.groups_of_pair() - 1;
            if (s.is_last) {
                combined = 0;
                s.n_pending = __ldcg(p.n_pending + p.pair_of(group));
            }
        }
    }
    __syncthreads();
    if (!s.is_last) {
        return;
    }
    note_uniform(p, group);
    if (s.n_pending > 0 && thread < kEncodeThreads) {
        encode_pending<type>(p, group, s.n_pending, *reinterpret_cast<EncodeShared *>(memory));
    }
}

template <class Worker, int n_channels, int n_tiles, int n_most> size_t bytes_of(const Problem & p) {
    static_assert(kAttendThreads<Worker> >= kEncodeThreads);
    return kSharedBytes<Worker, n_channels, n_most> +
           std::max({ScanMemory<Worker, n_tiles, n_most>::kBytes, Regions<Worker, n_channels, n_most>::kEnd * sizeof(float),
                     static_cast<size_t>(n_most * (p.most_shares() + kSharesAtOnce)) * sizeof(float), sizeof(EncodeShared)});
}

// What is kept of the longest share takes, where there is room for it behind `bytes`.
template <int n_most> size_t near_bytes_of(const Problem & p, size_t bytes) {
    const size_t near = static_cast<size_t>(p.even.n_of(0)) * bytes_of_share_block(n_most);
    return bytes + near <= p.most_shared ? near : 0;
}

// f.template operator()<Worker, n_channels, n_tiles, n_most>(), whose bytes of shared memory the device has if there is such a
// worker.
template <DType type, class F> void with_worker(const Problem & p, F && f) {
    const auto choose = [&]<class Large, class Small, int n_channels, int n_tiles, int n_most>() {
        if (bytes_of<Large, n_channels, n_tiles, n_most>(p) <= p.most_shared) {
            f.template operator()<Large, n_channels, n_tiles, n_most>();
        } else {
            f.template operator()<Small, n_channels, n_tiles, n_most>();
        }
    };
    const auto of_shape = [&]<int n_channels, int n_tiles>() {
        if constexpr (on_tensor_cores(type)) {
            const auto with = [&]<int n_most>() {
                // As many warps as the registers hold, which a quarter of a thread's numbers of queries and outputs takes.
                constexpr int kNumbers = n_channels * n_most * Split<type>::kParts / 8;
                constexpr int kWarps = kNumbers <= 128 ? 12 : kNumbers <= 256 ? 8 : 4;
                using Large = Tiles<type, n_channels, n_most, 16, kWarps, true>;
                using Small = Tiles<type, n_channels, n_most, 16, kWarps == 4 ? 4 : n_channels <= 128 ? 8 : 4, false>;
                choose.template operator()<Large, Small, n_channels, n_tiles, n_most>();
            };
            p.n_shared <= 4 ? with.template operator()<4>() : with.template operator()<8>();
        } else {
            const auto with = [&]<int n_rows>() {
                using Large = Rows<type, n_channels, n_rows, true>;
                using Small = Rows<type, n_channels, n_rows, false>;
                choose.template operator()<Large, Small, n_channels, n_tiles, n_rows <= 4 ? 4 : 8>();
            };
            switch (p.n_shared) {
                case 1: return with.template operator()<1>();
                case 2:
                case 3: return with.template operator()<3>();
                case 4: return with.template operator()<4>();
                default: return with.template operator()<kMaxShared>();
            }
        }
    };
    switch (p.planes.n_tiles) {
        case 2: return of_shape.template operator()<64, 2>();
        case 3: return of_shape.template operator()<128, 3>();
        case 4: return of_shape.template operator()<128, 4>();
        default: return of_shape.template operator()<256, 8>();
    }
}

template <DType type> size_t attend_bytes(const Problem & p) {
    size_t bytes = 0;
    with_worker<type>(p, [&]<class Worker, int n_channels, int n_tiles, int n_most>() {
        bytes = bytes_of<Worker, n_channels, n_tiles, n_most>(p);
    });
    return bytes;
}

template <DType type> void launch_attend(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_share));
    with_worker<type>(p, [&]<class Worker, int n_channels, int n_tiles, int n_most>() {
        const size_t bytes = bytes_of<Worker, n_channels, n_tiles, n_most>(p);
        const size_t near = near_bytes_of<n_most>(p, bytes);
        launch_kernel(attend<Worker, type, n_channels, n_tiles, n_most>, {grid, kAttendThreads<Worker>, bytes + near}, stream, p,
                      static_cast<int>(near));
    });
}

}  // namespace louver::cuda
