// What a search does with the scan's bins, and what attention needs of values that come with a call (cuda/device_index.h).
#include <cub/device/device_scan.cuh>

#include "cuda/device_index.h"
#include "cuda/encode.cuh"
#include "cuda/kernel.cuh"
#include "cuda/rows.cuh"
#include "cuda/warp.cuh"
#include "index/scorer.h"

namespace louver::cuda {
namespace {

constexpr int kWarps = 8;

struct Score {
    double value;
    double magnitude;  // the sum of its terms' magnitudes
};

// q.k by a warp, the same in all lanes and in every call. The product of two float32 is exact in float64.
template <DType type> __device__ Score score_of(const float * query, const std::byte * row, int dim) {
    Score score{0, 0};
    for (int c = static_cast<int>(threadIdx.x) % 32; c < dim; c += 32) {
        const double term = static_cast<double>(query[c]) * static_cast<double>(element<type>(row, c));
        score.value += term;
        score.magnitude += fabs(term);
    }
    return {sum_of_warp(score.value), sum_of_warp(score.magnitude)};
}

// Whether q.k >= tau, in exact arithmetic, by one thread: index/exact_score.cpp, which has the proof. Contraction changes nothing
// there, since the products are exact.
template <DType type>
__device__ __noinline__ bool reaches_exactly(const float * query, const std::byte * row, int dim, double tau) {
    double component[kMaxKernelDim + 1];
    int n = 0;
    for (int c = 0; c <= dim; ++c) {
        double term = c < dim ? static_cast<double>(query[c]) * static_cast<double>(element<type>(row, c)) : -tau;
        int kept = 0;
        for (int i = 0; i < n; ++i) {
            const double sum = term + component[i];
            const double virtual_component = sum - term;
            const double error = (term - (sum - virtual_component)) + (component[i] - virtual_component);
            if (error != 0) {
                component[kept++] = error;
            }
            term = sum;
        }
        if (term != 0) {
            component[kept++] = term;
        }
        n = kept;
    }
    return n == 0 || component[n - 1] > 0;
}

// By a warp. A score that is not finite comes from a key that is not.
template <DType type> __device__ bool matches(const float * query, const std::byte * row, int dim, double tau, bool & exact) {
    const Score score = score_of<type>(query, row, dim);
    exact = false;
    if (!isfinite(score.value)) {
        return true;
    }
    if (isfinite(tau) && fabs(score.value - tau) <= score_margin(score.magnitude, dim)) {
        exact = true;
        int reaches = 0;
        if (threadIdx.x % 32 == 0) {
            reaches = reaches_exactly<type>(query, row, dim, tau) ? 1 : 0;
        }
        return __shfl_sync(~0u, reaches, 0) != 0;
    }
    return score.value >= tau;
}

// The queries of a group in shared memory.
struct Queries {
    float of[kMaxShared][kMaxKernelDim];

    __device__ void load(const Problem & p, int group) {
        const int dim = p.planes.key_dim;
        for (int k = static_cast<int>(threadIdx.x); k < p.n_query_of(group) * dim; k += kWarps * 32) {
            of[k / dim][k % dim] = p.query_of(group, k / dim)[k % dim];
        }
        __syncthreads();
    }
};

// A warp to a block of cells, for all queries of a group.
template <DType type> __global__ void __launch_bounds__(kWarps * 32)
    decide(const __grid_constant__ Problem p, const __grid_constant__ SearchOp op) {
    __shared__ Queries queries;
    const int group = static_cast<int>(blockIdx.y);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    queries.load(p, group);
    const int n_query = p.n_query_of(group);
    const int kv_head = p.kv_head_of(group);
    const bool gave_up = p.attend_all[group] != 0;
    unsigned long long n_scored = 0;
    unsigned long long n_exact = 0;
    for (int block = static_cast<int>(blockIdx.x) * kWarps + warp; block < p.n_blocks;
         block += static_cast<int>(gridDim.x) * kWarps) {
        const int64_t first = static_cast<int64_t>(block) * kBlockCells;
        const int64_t n_cells = p.n_kv - first;
        const uint64_t all = n_cells >= kBlockCells ? ~uint64_t{0} : (uint64_t{1} << n_cells) - 1;
        const uint64_t bounded = gave_up ? 0 : p.visible_of(group)[block];
        for (int i = 0; i < n_query; ++i) {
            uint64_t candidates = all & ~bounded;
            if (bounded != 0) {
                const int64_t at = (static_cast<int64_t>(group) * p.n_shared + i) * p.n_blocks + block;
                const uint8_t * bins = p.bins + at * kBlockCells;
                const uint32_t low = __ballot_sync(~0u, bins[lane] >= kReferenceBin);
                const uint32_t high = __ballot_sync(~0u, bins[lane + 32] >= kReferenceBin);
                candidates |= bounded & (low | static_cast<uint64_t>(high) << 32);
            }
            const double tau = op.tau[group * p.n_shared + i];
            uint64_t hits = 0;
            for (uint64_t left = candidates; left != 0; left &= left - 1) {
                const int cell = __ffsll(static_cast<long long>(left)) - 1;
                bool exact;
                if (matches<type>(queries.of[i], p.keys.row(first + cell, kv_head), p.planes.key_dim, tau, exact)) {
                    hits |= uint64_t{1} << cell;
                }
                n_exact += exact ? 1 : 0;
            }
            n_scored += static_cast<unsigned long long>(__popcll(static_cast<long long>(candidates)));
            if (lane == 0) {
                const int64_t at = static_cast<int64_t>(p.head_of(group, i)) * p.n_blocks + block;
                op.hits[at] = hits;
                op.counts[at] = __popcll(static_cast<long long>(hits));
            }
        }
    }
    if (lane == 0 && n_scored != 0) {
        atomicAdd(op.n_scored, n_scored);
        atomicAdd(op.n_exact, n_exact);
    }
}

template <DType type> __global__ void __launch_bounds__(kWarps * 32)
    write(const __grid_constant__ Problem p, const __grid_constant__ SearchOp op, int64_t * ids, double * scores) {
    __shared__ Queries queries;
    const int group = static_cast<int>(blockIdx.y);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    queries.load(p, group);
    const int kv_head = p.kv_head_of(group);
    for (int block = static_cast<int>(blockIdx.x) * kWarps + warp; block < p.n_blocks;
         block += static_cast<int>(gridDim.x) * kWarps) {
        for (int i = 0; i < p.n_query_of(group); ++i) {
            const int64_t at = static_cast<int64_t>(p.head_of(group, i)) * p.n_blocks + block;
            const double tau = op.tau[group * p.n_shared + i];
            int64_t place = op.places[at];
            for (uint64_t left = op.hits[at]; left != 0; left &= left - 1, ++place) {
                const int64_t cell = static_cast<int64_t>(block) * kBlockCells + __ffsll(static_cast<long long>(left)) - 1;
                const double score = score_of<type>(queries.of[i], p.keys.row(cell, kv_head), p.planes.key_dim).value;
                if (lane == 0) {
                    ids[place] = cell;
                    // It matches, so rounding alone can have put a finite score below tau.
                    scores[place] = isfinite(score) ? fmax(score, tau) : score;
                }
            }
        }
    }
}

dim3 grid_of(const Problem & p) {
    constexpr int kMost = 1024;
    return dim3(static_cast<unsigned>(min((p.n_blocks + kWarps - 1) / kWarps, kMost)), static_cast<unsigned>(p.n_group));
}

// A thread block to a block of a head.
template <DType type> __global__ void __launch_bounds__(kWarps * 32)
    summarize(const __grid_constant__ Problem p, const BlockBounds * of_keys) {
    __shared__ float longest_of[kWarps];
    __shared__ double squares_of[kWarps];
    const int block = static_cast<int>(blockIdx.x);
    const int head = static_cast<int>(blockIdx.y);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t slot = p.planes.slot(0, head, block);
    const int64_t first = static_cast<int64_t>(block) * kBlockCells;
    const int n_cells = static_cast<int>(min(static_cast<int64_t>(kBlockCells), p.n_kv - first));

    bool finite = true;
    float longest = 0;
    for (int cell = warp; cell < n_cells; cell += kWarps) {
        const double squared = squared_norm<type>(p.values.row(first + cell, head), p.values.dim);
        finite = finite && isfinite(squared);
        longest = fmaxf(longest, rounded_up(sqrt(squared)));
    }
    const uint64_t indexed = p.planes.indexed[slot];
    double squares = 0;
    for (int c = static_cast<int>(threadIdx.x); c < p.values.dim; c += kWarps * 32) {
        float sum = 0;
        for (uint64_t left = indexed; left != 0; left &= left - 1) {
            sum += element<type>(p.values.row(first + __ffsll(static_cast<long long>(left)) - 1, head), c);
        }
        uint16_t mean = indexed != 0 ? bf16_nearest(sum / static_cast<float>(__popcll(static_cast<long long>(indexed)))) : 0;
        if (!isfinite(bf16_float(mean))) {
            mean = 0;  // any mean is right: its norm is part of the bound
        }
        p.planes.means_of(slot)[c] = mean;
        squares += static_cast<double>(bf16_float(mean)) * static_cast<double>(bf16_float(mean));
    }
    squares = sum_of_warp(squares);
    if (lane == 0) {
        longest_of[warp] = longest;
        squares_of[warp] = squares;
    }
    const bool all_finite = __syncthreads_and(finite ? 1 : 0) != 0;
    if (threadIdx.x != 0) {
        return;
    }
    squares = 0;
    for (int w = 0; w < kWarps; ++w) {
        longest = fmaxf(longest, longest_of[w]);
        squares += squares_of[w];
    }
    BlockBounds bounds = of_keys[slot];
    bounds.value_norm = fmaxf(longest, rounded_up(sqrt(squares)));
    p.planes.bounds[slot] = bounds;
    if (!all_finite || p.planes.not_finite[slot] != 0) {
        for (int part = 0; part < p.n_part; ++part) {
            p.attend_all[head * p.n_part + part] = 1;
        }
    }
}

template <class Element> __global__ void pack(const __grid_constant__ StridedKeys from, Element * to) {
    const int64_t n = from.n_head_kv * from.n * from.dim;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        const int64_t row = i / from.dim;
        const std::byte * at =
            from.base + row / from.n * from.head_stride + row % from.n * from.row_stride + i % from.dim * from.element_stride;
        to[i] = *reinterpret_cast<const Element *>(at);
    }
}

}  // namespace

void launch_decide(const Problem & p, const SearchOp & op, cudaStream_t stream) {
    with_type(p.keys.type, [&]<DType type>() { launch_kernel(decide<type>, {grid_of(p), kWarps * 32}, stream, p, op); });
}

void launch_count(const SearchOp & op, int64_t n, Memory & scratch, cudaStream_t stream) {
    size_t bytes = 0;
    check(cub::DeviceScan::ExclusiveSum(nullptr, bytes, op.counts, op.places, n, stream), "launch_count");
    if (bytes > scratch.bytes()) {
        scratch = Memory(bytes);
    }
    check(cub::DeviceScan::ExclusiveSum(scratch.as<void>(), bytes, op.counts, op.places, n, stream), "launch_count");
}

void launch_write(const Problem & p, const SearchOp & op, int64_t * ids, double * scores, cudaStream_t stream) {
    with_type(p.keys.type, [&]<DType type>() {
        launch_kernel(write<type>, {grid_of(p), kWarps * 32}, stream, p, op, ids, scores);
    });
}

void launch_summarize(const Problem & p, const BlockBounds * of_keys, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_blocks), static_cast<unsigned>(p.n_head_kv));
    with_type(p.keys.type, [&]<DType type>() { launch_kernel(summarize<type>, {grid, kWarps * 32}, stream, p, of_keys); });
}

void launch_pack(const StridedKeys & from, std::byte * to, cudaStream_t stream) {
    const dim3 grid(1024);
    if (row_bytes(from.type, 1) == 4) {
        launch_kernel(pack<uint32_t>, {grid, 256}, stream, from, reinterpret_cast<uint32_t *>(to));
    } else {
        launch_kernel(pack<uint16_t>, {grid, 256}, stream, from, reinterpret_cast<uint16_t *>(to));
    }
}

}  // namespace louver::cuda
