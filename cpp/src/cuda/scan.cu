// Upper bounds of all scores of a group's queries: the identity and the slack of docs/guarantee.md ("The scan"), with signed
// codes, so that
//
//     q.k = q.m + h sum_c l_c (b_c - 128) + d.(b - 128) + q.r
//
// and the integer dot products on the tensor cores: 16 keys by 32 channels of codes at a time, times the levels of up to 4
// queries, the high and the low 8 bits of each a column of its own.
#include "cuda/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/rows.cuh"
#include "cuda/warp.cuh"
#include "kernels/bounds.h"

namespace louver::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kQuad = 4;  // queries to a pass of the tensor cores

// x + kMagic has round(x) in its low bits, for |x| < 2^22.
constexpr float kMagic = 0x1.8p23f;

struct Shared {
    alignas(16) float query[kMaxShared][kMaxKernelDim];
    uint32_t histogram[kMaxShared][kBins];
    float probe[kMaxShared][kProbes];
    float norm[kMaxShared];
    float reference[kMaxShared];
    double lower[kWarps][kMaxShared];  // of each warp
    float key_norm[kWarps];
    int scanned[kWarps];
    uint32_t others[kWarps];  // of 32 blocks those that have cells which are not indexed
    int failed;               // before the scan
};
constexpr size_t kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;

// Queries, norms and references, the same in every thread block of a group. False: something is not finite or too large, so that
// nothing is decided here. What begins the stream of codes is called once the few rows that are needed first are here.
template <class Stream> __device__ __forceinline__ bool begin(const Problem & p, int group, Shared & s, const Stream & stream) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int dim = p.planes.key_dim;
    static_assert(kWarps == kMaxShared);  // a query to a warp
    const int i = warp;
    const float * query = p.query_of(group, min(i, n_query - 1));
    float own[kMaxKernelDim / 32];
#pragma unroll
    for (int k = 0; k < kMaxKernelDim / 32; ++k) {
        const int c = lane + 32 * k;
        own[k] = i < n_query && c < dim ? query[c] : 0.0f;
    }
    const Sight & sight = p.sight[p.row_of_group(group)];
    const int n_probes = p.given != nullptr ? 0 : sight.n_probes;
    constexpr int kOwn = kProbes / kWarps;
    int cell[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        cell[k] = sight.probes[k * kWarps + warp];
    }
    float keys[kOwn][8] = {};
    with_type(p.keys.type, [&]<DType type>() {
        Eight<type> rows[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            rows[k].clear();
            if (k * kWarps + warp < n_probes && lane * 8 < dim) {
                rows[k].load(p.keys.row(p.first_row(group) + cell[k], p.kv_head_of(group)), lane * 8);
            }
        }
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            rows[k].widen(keys[k]);
        }
    });
    stream();
    double squared = 0;
#pragma unroll
    for (int k = 0; k < kMaxKernelDim / 32; ++k) {
        s.query[i][lane + 32 * k] = own[k];
        squared += static_cast<double>(own[k]) * static_cast<double>(own[k]);
    }
    squared = sum_of_warp(squared);
    if (lane == 0) {
        s.norm[i] = static_cast<float>(sqrt(squared)) * kNormInflation;
    }
    if (lane < kWarps) {
        s.lower[lane][i] = 0;
    }
#pragma unroll
    for (int b = lane; b < kBins; b += 32) {
        s.histogram[i][b] = 0;
    }
    if (threadIdx.x == 0) {
        s.failed = 0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll 1
        for (int of = 0; of < n_query; ++of) {
            float dot = 0;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                dot += s.query[of][lane * 8 + e] * keys[k][e];
            }
            dot = sum_of_warp(dot);
            if (lane == 0) {
                s.probe[of][k * kWarps + warp] = dot;
            }
        }
    }
    __syncthreads();
    if (i < n_query) {
        const bool is_probe = lane < n_probes;
        const float score = is_probe ? s.probe[i][lane] * p.to_log2 : -infinity();
        const float given = p.given != nullptr ? p.given[group * p.n_shared + i] : 0.0f;
        const float peak = n_probes > 0 ? largest_of_warp(score) : given;
        const bool finite = __all_sync(~0u, !is_probe || isfinite(score)) && isfinite(peak) && s.norm[i] <= kMaxQueryNorm;
        if (lane == 0) {
            s.reference[i] = peak;
            if (!finite) {
                s.failed = 1;
            }
            if (blockIdx.x == 0) {
                p.query_norm[group * p.n_shared + i] = s.norm[i];
                p.reference[group * p.n_shared + i] = peak;
            }
        }
    } else if (lane == 0) {
        s.reference[i] = 0;
    }
    __syncthreads();
    return s.failed == 0;
}

// What a warp has of the index: quarters of a block's codes, a ring; the grids of that block and the next. They are on their way
// into shared memory while the warp works on what it has; what a lane reads of the codes it copied itself.
template <int n_tiles> struct Grid {
    uint4 steps[8 * n_tiles];  // centres, then steps, in the order of grid_position
    float bounds[8];           // BlockBounds
};
template <int n_tiles> struct Stage {
    static constexpr int kQuarters = n_tiles <= 4 ? 4 : 2;  // of a block, under way or here
    uint4 codes[kQuarters * n_tiles][32];
    Grid<n_tiles> grid[2];
};

// A quarter of a block's codes.
template <int n_tiles>
__device__ __forceinline__ void fetch_codes(Stage<n_tiles> & stage, const Planes & planes, int64_t slot, int quarter) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint4 * codes = reinterpret_cast<const uint4 *>(planes.codes_of(slot)) + quarter * n_tiles * 32 + lane;
#pragma unroll
    for (int t = 0; t < n_tiles; ++t) {
        copy_async<16>(&stage.codes[quarter % Stage<n_tiles>::kQuarters * n_tiles + t][lane], codes + t * 32);
    }
}

template <int n_tiles> __device__ __forceinline__ void fetch_grid(Grid<n_tiles> & grid, const Planes & planes, int64_t slot) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint4 * steps = reinterpret_cast<const uint4 *>(planes.center_of(slot));
    for (int k = lane; k < 8 * n_tiles; k += 32) {
        copy_async<16>(&grid.steps[k], steps + k);
    }
    constexpr int kBounds = sizeof(BlockBounds) / sizeof(float);
    static_assert(kBounds <= 8);
    if (lane < kBounds) {
        copy_async<4>(&grid.bounds[lane], reinterpret_cast<const float *>(planes.bounds + slot) + lane);
    }
}

__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The bin of a place in its low byte. Half less and rounded to nearest is rounded down, but for a whole number, which may go to
// the bin it is the upper edge of.
__device__ __forceinline__ uint32_t bin_bits(float place) {
    return __float_as_uint(fminf(fmaxf(place, 0.5f), kBins - 0.4f) + (0x1p23f - 0.5f));
}

// What turns the integer dot products of a query with a block's codes into places among the bins: dot * scale + offset.
struct ToBin {
    float scale;
    float offset;
    float slack;
};

// 4 channels of a tile as a lane works with them.
__device__ __forceinline__ void widen(const uint2 & pairs, float (&out)[4]) {
    out[0] = __uint_as_float(pairs.x << 16);
    out[1] = __uint_as_float(pairs.x & 0xffff0000u);
    out[2] = __uint_as_float(pairs.y << 16);
    out[3] = __uint_as_float(pairs.y & 0xffff0000u);
}

// Levels of the lane's column of the right operand, and what completes their dot products, for one block. The lanes 8 i .. 8 i +
// 7 of a warp have query i: the first 4 its high, the others its low bytes, each of the channels of lane % 4. Of these channels
// each of the two works on one half, and then they exchange bytes.
template <int n_tiles> __device__ __forceinline__ ToBin quantize(const float (&query)[n_tiles][4], float norm, float reference,
                                                                 const Grid<n_tiles> & grid, int dim, float to_log2,
                                                                 bool certified, uint32_t (&levels)[n_tiles][2]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int half = lane / 4 % 2;
    const uint2 * center = reinterpret_cast<const uint2 *>(grid.steps) + lane % 4 * (2 * n_tiles) + half;
    const uint2 * step = center + 8 * n_tiles;
    float scaled[n_tiles][4];
    float largest = 0;
    float base = 0;
#pragma unroll
    for (int t = 0; t < n_tiles; ++t) {
        float steps[4];
        float centers[4];
        widen(step[2 * t], steps);
        widen(center[2 * t], centers);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            scaled[t][e] = query[t][e] * steps[e];
            largest = fmaxf(largest, fabsf(scaled[t][e]));
            base = fmaf(query[t][e], centers[e], base);
        }
    }
#pragma unroll
    for (int bit = 1; bit < 8; bit *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bit));
        base += __shfl_xor_sync(~0u, base, bit);
    }
    const HeadBound head = head_bound(largest, norm, dim, to_log2, reference, certified);
#pragma unroll
    for (int t = 0; t < n_tiles; ++t) {
        // The low byte of an integer, and with 128 added the next one: together 256 * high + low.
        uint32_t low[4];
        uint32_t high[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            low[e] = __float_as_uint(fmaf(scaled[t][e], head.inverse, kMagic));
            high[e] = __float_as_uint(fmaf(scaled[t][e], head.inverse, kMagic + 128.0f));
        }
        const uint32_t lows = low_bytes(low[0], low[1], low[2], low[3]);
        const uint32_t highs = __byte_perm(__byte_perm(high[0], high[1], 0x0051), __byte_perm(high[2], high[3], 0x0051), 0x5410);
        const uint32_t other = __shfl_xor_sync(~0u, half == 0 ? lows : highs, 4);
        levels[t][0] = half == 0 ? highs : other;
        levels[t][1] = half == 0 ? other : lows;
    }
    const BlockBounds bounds{grid.bounds[0], grid.bounds[1], grid.bounds[2], grid.bounds[3], grid.bounds[4]};
    ToBin to;
    to.slack = block_slack(head, bounds);
    to.scale = head.quantum * to_log2 * kBinsPerOctave;
    to.offset = (base * to_log2 - reference + to.slack) * kBinsPerOctave + kReferenceBin;
    const float most = fabsf(to.offset) + to.scale * (128.0f * kQueryLevels * static_cast<float>(dim));
    if (!(most < 0x1p60f)) {  // may overflow on the way
        to.offset = infinity();
    }
    return to;
}

// Exact weights of cells that the index does not cover: they are attended for sure, and belong to the bound. A warp takes 8 of
// the block, 8 lanes to a cell.
template <DType type>
__device__ __noinline__ bool add_exact(const Problem & p, int group, int block, uint64_t cells, Shared & s, float & key_norm) {
    constexpr int kLanes = 8;
    constexpr int kAtOnce = 32 / kLanes;
    constexpr int kOwn = kBlockCells / kWarps;
    constexpr int kChunks = kMaxKernelDim / (kLanes * 8);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int dim = p.planes.key_dim;
    const int64_t first_row = p.first_row(group) + static_cast<int64_t>(block) * kBlockCells;
    const int kv_head = p.kv_head_of(group);
    bool failed = false;
    if ((cells >> (warp * kOwn) & ((1u << kOwn) - 1)) == 0) {
        return false;
    }
#pragma unroll 1  // short code: it is run through once
    for (int bit = warp * kOwn + lane / kLanes; bit < (warp + 1) * kOwn; bit += kAtOnce) {
        const bool is_there = (cells >> bit & 1) != 0;
        Eight<type> chunks[kChunks];
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
            const int c = (k * kLanes + lane % kLanes) * 8;
            chunks[k].clear();
            if (is_there && c < dim) {
                chunks[k].load(p.keys.row(first_row + bit, kv_head), c);
            }
        }
        float key[kChunks][8];
        float squared = 0;
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
            chunks[k].widen(key[k]);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                squared = fmaf(key[k][e], key[k][e], squared);
            }
        }
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            squared += __shfl_xor_sync(~0u, squared, step);
        }
        const float norm = sqrtf(squared) * kNormInflation;
        key_norm = fmaxf(key_norm, norm);
        failed = failed || !isfinite(norm);
#pragma unroll 1
        for (int i = 0; i < n_query; ++i) {
            float dot = 0;
#pragma unroll
            for (int k = 0; k < kChunks; ++k) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    dot = fmaf(s.query[i][(k * kLanes + lane % kLanes) * 8 + e], key[k][e], dot);
                }
            }
#pragma unroll
            for (int step = 1; step < kLanes; step *= 2) {
                dot += __shfl_xor_sync(~0u, dot, step);
            }
            const float error = (2.0f * static_cast<float>(dim) + 16.0f) * kUnit * s.norm[i] * norm * p.to_log2;
            float weight = is_there ? exp2_fast(dot * p.to_log2 - s.reference[i] - error * 1.001f) : 0.0f;
            failed = failed || !isfinite(weight);
#pragma unroll
            for (int step = kLanes; step < 32; step *= 2) {
                weight += __shfl_xor_sync(~0u, weight, step);
            }
            if (lane == 0) {
                s.lower[warp][i] += static_cast<double>(weight);
            }
        }
    }
    return failed;
}

// What the index does not cover yet, by a whole thread block: the newest cells, or much more after a prompt or a restored state.
__device__ __forceinline__ bool add_others(const Problem & p, int group, Shared & s, float & key_norm) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint64_t * visible = p.visible_of(group);
    const int64_t first_slot = p.slot_of(group, 0);
    const uint64_t * indexed = p.planes.indexed + first_slot;
    constexpr int kAtOnce = 4;
    bool failed = false;
#pragma unroll 1
    for (int newest = p.n_blocks - 1; newest >= 0; newest -= kAtOnce * kWarps * 32) {
        bool has_others[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int at = newest - k * kWarps * 32 - static_cast<int>(threadIdx.x);
            has_others[k] = at >= 0 && (visible[at] & ~indexed[at]) != 0;
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            if (__syncthreads_or(has_others[k] ? 1 : 0) == 0) {
                continue;
            }
            const uint32_t of_warp = __ballot_sync(~0u, has_others[k]);
            if (lane == 0) {
                s.others[warp] = of_warp;
            }
            __syncthreads();
#pragma unroll 1
            for (int w = 0; w < kWarps; ++w) {
#pragma unroll 1
                for (uint32_t left = s.others[w]; left != 0; left &= left - 1) {
                    const int at = newest - (k * kWarps + w) * 32 - (__ffs(static_cast<int>(left)) - 1);
                    const uint64_t all = visible[at];
                    const uint64_t others = all & ~indexed[at];
                    with_type(p.keys.type,
                              [&]<DType type>() { failed = add_exact<type>(p, group, at, others, s, key_norm) || failed; });
                    const int64_t slot = first_slot + at;
                    const bool complete = all == ~uint64_t{0} || (at + 1 < p.n_blocks && visible[at + 1] != 0);
                    if (threadIdx.x == 0 && complete && (others & ~p.planes.not_finite[slot]) != 0 &&
                        atomicExch(&p.queued[slot], 1) == 0) {
                        p.pending[atomicAdd(p.n_pending, 1)] = static_cast<int32_t>(slot);
                    }
                }
            }
            __syncthreads();  // before the next of s.others
        }
    }
    return failed;
}

template <int n_tiles, int n_quad> __global__ void __launch_bounds__(kWarps * 32, n_tiles * n_quad <= 4 ? 2 : 1)
    scan(const __grid_constant__ Problem p) {
    wait_for_previous();  // launched behind a kernel that is not ours it waits for nothing, but lets the next one start
    std::byte * memory = shared_memory();
    Shared & s = *reinterpret_cast<Shared *>(memory);
    const int group = static_cast<int>(blockIdx.y);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Stage<n_tiles> & stage = reinterpret_cast<Stage<n_tiles> *>(memory + kSharedBytes)[warp];
    const int row = p.row_of_group(group);
    const bool is_uniform = p.spares_uniform && *p.uniform_of(group) > 0;
    const uint64_t * visible = p.visible_of(group);
    const int64_t first_slot = p.slot_of(group, 0);
    const uint64_t * indexed = p.planes.indexed + first_slot;
    // The last thread block has the cells that are not indexed, so that nobody has both to do.
    const int n_streaming = max(p.n_scan - 1, 1);
    const bool streams = static_cast<int>(blockIdx.x) < n_streaming;
    const bool adds_others = static_cast<int>(blockIdx.x) == p.n_scan - 1;
    const int stride = n_streaming * kWarps;
    int block = streams ? p.n_blocks - 1 - (static_cast<int>(blockIdx.x) * kWarps + warp) : -1;
    const auto cells_of = [&](int at) { return at >= 0 ? visible[at] & indexed[at] : 0; };
    uint64_t cells = cells_of(block);
    uint64_t next_cells = cells_of(block - stride);
    const auto fetch_quarter = [&](int r) {
        if (cells != 0) {
            fetch_codes(stage, p.planes, first_slot + block, r);
        }
        commit_copies();
    };
    const auto stream = [&] {
        if (cells != 0) {
            fetch_grid(stage.grid[0], p.planes, first_slot + block);
        }
        if (next_cells != 0) {
            fetch_grid(stage.grid[1], p.planes, first_slot + block - stride);
        }
        commit_copies();
        fetch_quarter(0);
    };
    if (is_uniform || p.sight[row].plain == 0 || !begin(p, group, s, stream)) {
        if (threadIdx.x == 0 && !is_uniform) {
            p.attend_all[group] = 1;
        }
        wait_for_copies();
        return;
    }

    constexpr int kQuarters = Stage<n_tiles>::kQuarters;
#pragma unroll
    for (int r = 1; r < kQuarters; ++r) {  // not before: what begin() reads and writes would queue behind them
        fetch_quarter(r);
    }

    const int n_query = p.n_query_of(group);
    const float octave = 1.0f / kBinsPerOctave;
    // The lane's part of the queries, as the right operand wants it.
    float query[n_quad][n_tiles][4];
    float norm[n_quad];
    float reference[n_quad];
#pragma unroll
    for (int z = 0; z < n_quad; ++z) {
        const int i = z * kQuad + lane / 8;
        norm[z] = s.norm[i];
        reference[z] = s.reference[i];
#pragma unroll
        for (int t = 0; t < n_tiles; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                query[z][t][e] = s.query[i][32 * t + lane / 4 % 2 * 16 + lane % 4 * 4 + e];
            }
        }
    }
    float lower[n_quad] = {};  // of query z * kQuad + lane % 4
    float key_norm = 0;
    int scanned = 0;
    bool failed = false;

    uint32_t levels[n_quad][n_tiles][2];
    ToBin to[n_quad];
    const auto prepare = [&](const Grid<n_tiles> & grid) {
        key_norm = fmaxf(key_norm, grid.bounds[3]);
#pragma unroll
        for (int z = 0; z < n_quad; ++z) {
            to[z] = quantize<n_tiles>(query[z], norm[z], reference[z], grid, p.planes.key_dim, p.to_log2, p.certified, levels[z]);
        }
    };
    wait_for_copies<kQuarters>();  // the grids
    __syncwarp();
    if (cells != 0) {
        prepare(stage.grid[0]);
    }
    __syncwarp();
    int current = 0;
    while (block >= 0) {
        const int next = block - stride;
        const uint64_t after_cells = cells_of(next - stride);
        float places[n_quad][8];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            wait_for_copies<kQuarters - 1>();  // the oldest batch: this quarter
            if (cells != 0) {
                int sum[n_quad][4] = {};
#pragma unroll
                for (int t = 0; t < n_tiles; ++t) {
                    const uint4 codes = stage.codes[r % kQuarters * n_tiles + t][lane];
#pragma unroll
                    for (int z = 0; z < n_quad; ++z) {
                        multiply_add(sum[z], codes, levels[z][t]);
                    }
                }
#pragma unroll
                for (int z = 0; z < n_quad; ++z) {
                    places[z][2 * r] = static_cast<float>(256 * sum[z][0] + sum[z][1]);
                    places[z][2 * r + 1] = static_cast<float>(256 * sum[z][2] + sum[z][3]);
                }
            }
            const bool is_of_next = r + kQuarters >= 4;
            if ((is_of_next ? next_cells : cells) != 0) {
                fetch_codes(stage, p.planes, first_slot + (is_of_next ? next : block), (r + kQuarters) % 4);
            }
            if (r == 0 && after_cells != 0) {
                fetch_grid(stage.grid[current], p.planes, first_slot + next - stride);
            }
            commit_copies();
        }
        current = 1 - current;
        if (cells != 0) {
            scanned += __popcll(static_cast<long long>(cells));
            const uint32_t mine = static_cast<uint32_t>(cells >> (lane / 4 * 8)) & 0xffu;  // the 8 cells of this lane's results
#pragma unroll
            for (int z = 0; z < n_quad; ++z) {
                // From the lanes that quantized a query to those that hold its results.
                const float scale = __shfl_sync(~0u, to[z].scale, lane % 4 * 8);
                const float offset = __shfl_sync(~0u, to[z].offset, lane % 4 * 8);
                const float slack = __shfl_sync(~0u, to[z].slack, lane % 4 * 8);
                const int i = z * kQuad + lane % 4;
                if (i >= n_query) {
                    continue;
                }
                uint32_t bins[8];
                float sum = 0;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const float place = fmaf(places[z][e], scale, offset);
                    bins[e] = bin_bits(place);
                    if ((mine >> e & 1) != 0) {
                        sum += exp2_fast(fmaf(place, octave, -kReferenceBin * octave));
                        atomicAdd(&s.histogram[i][bins[e] & 0xffu], 1u);
                    }
                }
                // From upper to lower bounds: down by twice the slack.
                lower[z] += sum * exp2_fast(-2.0f * slack);
                failed = failed || !isfinite(lower[z]) || !isfinite(offset);
                const int64_t at = (static_cast<int64_t>(group) * p.n_shared + i) * p.n_blocks + block;
                *reinterpret_cast<uint2 *>(p.bins + at * kBlockCells + lane / 4 * 8) =
                    make_uint2(low_bytes(bins[0], bins[1], bins[2], bins[3]), low_bytes(bins[4], bins[5], bins[6], bins[7]));
                if (lane / 4 == 0) {
                    p.slack[at] = slack;
                }
            }
        }
        __syncwarp();  // the next block's grid is there for all lanes
        if (next_cells != 0) {
            prepare(stage.grid[current]);
        }
        __syncwarp();
        block = next;
        cells = next_cells;
        next_cells = after_cells;
    }
    wait_for_copies();
    if (adds_others) {
        failed = add_others(p, group, s, key_norm) || failed;
    }
    __syncwarp();  // what add_exact left in shared memory

    // What the warps found, added in an order that does not depend on timing.
#pragma unroll
    for (int z = 0; z < n_quad; ++z) {
        double sum = static_cast<double>(lower[z]);
        sum += __shfl_xor_sync(~0u, sum, 4);
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (lane < kQuad) {
            s.lower[warp][z * kQuad + lane] += sum;
        }
    }
    key_norm = largest_of_warp(key_norm);
    if (lane == 0) {
        s.key_norm[warp] = key_norm;
        s.scanned[warp] = scanned;
    }
    const bool gave_up = __syncthreads_or(failed ? 1 : 0) != 0;
    if (static_cast<int>(threadIdx.x) < n_query) {
        double sum = 0;
        for (int w = 0; w < kWarps; ++w) {
            sum += s.lower[w][threadIdx.x];
        }
        p.lower[(static_cast<int64_t>(group) * p.n_scan + blockIdx.x) * p.n_shared + threadIdx.x] = sum;
    }
    if (threadIdx.x == 0) {
        float longest = 0;
        int count = 0;
        for (int w = 0; w < kWarps; ++w) {
            longest = fmaxf(longest, s.key_norm[w]);
            count += s.scanned[w];
        }
        p.key_norm[group * p.n_scan + blockIdx.x] = longest;
        p.scanned[group * p.n_scan + blockIdx.x] = count;
        if (gave_up) {
            p.attend_all[group] = 1;
        }
    }
    static_assert(kWarps * 32 == kBins);
#pragma unroll 1
    for (int i = 0; i < n_query; ++i) {
        const uint32_t count = s.histogram[i][threadIdx.x];
        if (count != 0) {
            atomicAdd(&p.histogram[(static_cast<int64_t>(group) * p.n_shared + i) * kBins + threadIdx.x], count);
        }
    }
}

// f.template operator()<n_tiles>()
template <class F> void with_tiles(const Problem & p, F && f) {
    switch (p.planes.n_tiles) {
        case 2: return f.template operator()<2>();
        case 3: return f.template operator()<3>();
        case 4: return f.template operator()<4>();
        default: return f.template operator()<8>();
    }
}

}  // namespace

size_t scan_bytes(const Problem & p) {
    size_t bytes = 0;
    with_tiles(p, [&]<int n_tiles>() { bytes = kSharedBytes + kWarps * sizeof(Stage<n_tiles>); });
    return bytes;
}

void launch_scan(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_scan), static_cast<unsigned>(p.n_group));
    with_tiles(p, [&]<int n_tiles>() {
        const Launch launch{grid, kWarps * 32, scan_bytes(p)};
        p.n_shared <= kQuad ? launch_kernel(scan<n_tiles, 1>, launch, stream, p)
                            : launch_kernel(scan<n_tiles, 2>, launch, stream, p);
    });
}

}  // namespace louver::cuda
