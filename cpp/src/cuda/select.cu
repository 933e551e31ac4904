// From the bins to the survivors. A cell is dropped for a group only if every query has it below its threshold; a threshold is
// the highest whose bins, each cell counted with the weight at its bin's upper edge, add up to at most epsilon of the mass: the
// mass oracle (louver/mass_oracle.h) with all weights as its sample, and so with nothing left to verify.
#include "cuda/certify.cuh"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace louver::cuda {
namespace {

constexpr int kWarps = 8;

struct Shared {
    int threshold[kMaxShared];
    float added[kMaxShared][kMaxKernelDim];
    float dropped[kWarps][kMaxShared];
    float compensation[kWarps][kMaxShared];
    float value_norm[kWarps];
};
constexpr size_t kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
// Behind it, for each block of the share: the survivors as bits, and how many there are before them.
constexpr size_t kBytesPerBlock = sizeof(uint64_t) + sizeof(int);

// By a warp. All of its lanes return the same.
__device__ int threshold_of(const Problem & p, int group, int i, double & least) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    double lower = 0;
    for (int part = lane; part < p.n_scan; part += 32) {
        lower += p.lower[(static_cast<int64_t>(group) * p.n_scan + part) * p.n_shared + i];
    }
    least = sum_of_warp(lower);
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

// n_most: queries to a group, n_pairs: pairs of channels to a lane, at most.
template <int n_most, int n_pairs> __global__ void __launch_bounds__(kWarps * 32) select(const __grid_constant__ Problem p) {
    extern __shared__ std::byte memory[];
    Shared & s = *reinterpret_cast<Shared *>(memory);
    uint64_t * bits = reinterpret_cast<uint64_t *>(memory + kSharedBytes);
    const int group = static_cast<int>(blockIdx.y);
    const int split = static_cast<int>(blockIdx.x);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int begin = p.select_begin(split);
    const int end = p.select_begin(split + 1);
    int * places = reinterpret_cast<int *>(bits + (end - begin));
    const uint64_t * visible = p.visible_of(group);
    const int stream = p.stream_of(group);
    const int kv_head = p.kv_head_of(group);
    const Sight & sight = p.sight[p.row_of_group(group)];
    const bool all =
        (!(p.epsilon > 0) && p.given == nullptr) || p.attend_all[group] != 0 || (p.spares_uniform && *p.uniform_of(group) > 0);

    if (warp < n_query) {
        double least = 0;
        const int threshold = all ? kAttendAll : p.given != nullptr ? kReferenceBin : threshold_of(p, group, warp, least);
        if (lane == 0) {
            s.threshold[warp] = threshold;
            if (split == 0) {
                p.threshold[group * p.n_shared + warp] = threshold;
                p.least[group * p.n_shared + warp] = least;
            }
        }
    }
    __syncthreads();

    float added[n_most][n_pairs][2] = {};  // channels j * 64 + 2 * lane and the next
    float dropped[n_most] = {};
    float compensation[n_most] = {};
    float value_norm = 0;
    for (int block = begin + warp; block < end; block += kWarps) {
        const uint64_t seen = visible[block];
        uint64_t keep = seen;
        if (seen != 0 && !all) {
            const int64_t slot = p.planes.slot(stream, kv_head, block);
            const uint64_t cells = seen & p.planes.indexed[slot];
            const int64_t at = static_cast<int64_t>(group) * p.n_shared * p.n_blocks + block;
            uint32_t needed[2];
            int bins[n_most][2];
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                if (i < n_query) {
                    const uint8_t * of = p.bins + (at + static_cast<int64_t>(i) * p.n_blocks) * kBlockCells + lane;
                    bins[i][0] = of[0];
                    bins[i][1] = of[32];
                }
            }
            bool drops[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int bit = half * 32 + lane;
                const int cell = block * kBlockCells + bit;
                bool need = (cells >> bit & 1) == 0 || cell < sight.sinks_end || cell >= sight.recent_begin;
#pragma unroll
                for (int i = 0; i < n_most; ++i) {
                    need = need || (i < n_query && bins[i][half] >= s.threshold[i]);
                }
                needed[half] = __ballot_sync(~0u, need);
                drops[half] = !need;
            }
            keep = seen & (needed[0] | static_cast<uint64_t>(needed[1]) << 32);
            if (keep != seen) {
                float mean[n_pairs][2];
#pragma unroll
                for (int j = 0; j < n_pairs; ++j) {
                    const int c = j * 64 + lane * 2;
                    const uint32_t pair = p.compensate && c < p.planes.value_dim
                                              ? __ldg(reinterpret_cast<const uint32_t *>(p.planes.means_of(slot) + c))
                                              : 0u;
                    mean[j][0] = __uint_as_float(pair << 16);
                    mean[j][1] = __uint_as_float(pair & 0xffff0000u);
                }
                value_norm = fmaxf(value_norm, p.planes.bounds[slot].value_norm);
#pragma unroll
                for (int i = 0; i < n_most; ++i) {
                    if (i < n_query) {
                        const float most =
                            sum_of_warp((drops[0] ? upper_edge(bins[i][0]) : 0.0f) + (drops[1] ? upper_edge(bins[i][1]) : 0.0f));
                        dropped[i] += most;
                        if (p.compensate) {
                            // The slack's middle, where the score most likely is.
                            const float slack = p.slack[at + static_cast<int64_t>(i) * p.n_blocks];
                            const float weight = most * kMeanOfBin * exp2_fast(-slack);
                            compensation[i] += weight;
#pragma unroll
                            for (int j = 0; j < n_pairs; ++j) {
                                added[i][j][0] = fmaf(weight, mean[j][0], added[i][j][0]);
                                added[i][j][1] = fmaf(weight, mean[j][1], added[i][j][1]);
                            }
                        }
                    }
                }
            }
        }
        if (lane == 0) {
            bits[block - begin] = keep;
            p.kept[static_cast<int64_t>(group) * p.n_blocks + block] = keep;
        }
    }
    // The warps' sums, in an order that does not depend on timing.
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
        if (lane == 0) {
            s.dropped[warp][i] = dropped[i];
            s.compensation[warp][i] = compensation[i];
        }
    }
    if (lane == 0) {
        s.value_norm[warp] = value_norm;
    }
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) {
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
#pragma unroll
                for (int j = 0; j < n_pairs; ++j) {
                    float * at = &s.added[i][j * 64 + lane * 2];
                    at[0] = (w == 0 ? 0.0f : at[0]) + added[i][j][0];
                    at[1] = (w == 0 ? 0.0f : at[1]) + added[i][j][1];
                }
            }
        }
        __syncthreads();
    }
    const int64_t part = static_cast<int64_t>(group) * p.n_select + split;
    for (int i = 0; i < n_query; ++i) {
        for (int c = static_cast<int>(threadIdx.x); c < p.planes.value_dim; c += kWarps * 32) {
            p.added[(part * p.n_shared + i) * p.planes.value_dim + c] = s.added[i][c];
        }
    }
    if (static_cast<int>(threadIdx.x) < n_query) {
        float sum = 0;
        float weight = 0;
        for (int w = 0; w < kWarps; ++w) {
            sum += s.dropped[w][threadIdx.x];
            weight += s.compensation[w][threadIdx.x];
        }
        p.dropped[part * p.n_shared + threadIdx.x] = sum;
        p.compensation[part * p.n_shared + threadIdx.x] = weight;
    }

    // The survivors in a list, in their order.
    if (warp == 0) {
        int before = 0;
        for (int first = 0; first < end - begin; first += 32) {
            const int b = first + lane;
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

template <int n_most> void launch(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_select), static_cast<unsigned>(p.n_group));
    const size_t bytes = kSharedBytes + static_cast<size_t>((p.n_blocks + p.n_select - 1) / p.n_select) * kBytesPerBlock;
    const auto run = [&](auto kernel) {
        if (bytes > 48 * 1024) {
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                  "launch_select");
        }
        kernel<<<grid, kWarps * 32, bytes, stream>>>(p);
    };
    p.planes.value_dim <= 64    ? run(select<n_most, 1>)
    : p.planes.value_dim <= 128 ? run(select<n_most, 2>)
                                : run(select<n_most, 4>);
    check(cudaGetLastError(), "launch_select");
}

}  // namespace

void launch_select(const Problem & p, cudaStream_t stream) { p.n_shared <= 4 ? launch<4>(p, stream) : launch<8>(p, stream); }

}  // namespace louver::cuda
