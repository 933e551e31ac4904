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

// Of a block to each thread the visible cells that are not indexed; whether there are any, and whether the block is complete, a
// bit each.
struct Others {
    uint64_t cells[kWarps * 32];
    uint32_t some[kWarps];
    uint32_t complete[kWarps];
};

struct Shared {
    alignas(16) float query[kMaxShared][kMaxKernelDim];
    uint32_t histogram[kMaxShared][kBins];
    float probe[kMaxShared][kProbes];
    float norm[kMaxShared];
    float reference[kMaxShared];
    uint64_t lower[kWarps][kMaxShared];  // of each warp, in kSmallUnit
    uint64_t large[kMaxShared];          // of all of them, in kLargeUnit
    float key_norm[kWarps];
    int scanned[kWarps];
    Others others;
};
constexpr size_t kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;

// Adds a lower bound, rounded down: small ones to the caller's own sum, and the rare large ones, of keys far above the
// reference, to that of the thread block.
__device__ __forceinline__ void add_mass(float mass, uint64_t & small, uint64_t & large) {
    if (mass < kSmallMass) {
        small += static_cast<uint64_t>(mass * (1.0f / kSmallUnit));
    } else {
        atomicAdd(reinterpret_cast<unsigned long long *>(&large),
                  static_cast<unsigned long long>(fminf(mass, kLargeMass) * (1.0f / kLargeUnit)));
    }
}

// Queries and norms in shared memory, the same in every thread block of a group. Returns the lane's norms and references, of the
// queries z * kQuad + lane / 8. False: something is not finite or too large, so that nothing is decided here, or `skips`. What
// begins the stream of codes is called once the few rows that are needed first are here.
template <int n_quad, class Stream> __device__ __forceinline__ bool begin(const Problem & p, int group, bool skips, Shared & s,
                                                                          float (&norm)[n_quad], float (&reference)[n_quad],
                                                                          const Stream & stream) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int dim = p.planes.key_dim;
    static_assert(kWarps == kMaxShared);  // a query to a warp
    const float * query = p.query_of(group, min(warp, n_query - 1));
    float own[kMaxKernelDim / 32];
#pragma unroll
    for (int k = 0; k < kMaxKernelDim / 32; ++k) {
        const int c = lane + 32 * k;
        own[k] = warp < n_query && c < dim ? query[c] : 0.0f;
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
    if (skips) {
        return false;
    }
    stream();
    double squared = 0;
#pragma unroll
    for (int k = 0; k < kMaxKernelDim / 32; ++k) {
        s.query[warp][lane + 32 * k] = own[k];
        squared += static_cast<double>(own[k]) * static_cast<double>(own[k]);
    }
    squared = sum_of_warp(squared);
    if (lane == 0) {
        s.norm[warp] = static_cast<float>(sqrt(squared)) * kNormInflation;
    }
    if (lane < kWarps) {
        s.lower[lane][warp] = 0;
    }
    if (lane == 0) {
        s.large[warp] = 0;
    }
#pragma unroll
    for (int b = lane; b < kBins; b += 32) {
        s.histogram[warp][b] = 0;
    }
    __syncthreads();
    static_assert(kOwn * kQuad == 8);
#pragma unroll
    for (int z = 0; z < n_quad; ++z) {
        float dots[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            dots[k] = 0;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                dots[k] += s.query[z * kQuad + k % kQuad][lane * 8 + e] * keys[k / kQuad][e];
            }
        }
        const float dot = sum_of_warp(dots);
        if (lane % 4 == 0) {
            s.probe[z * kQuad + lane / 4 % kQuad][lane / 4 / kQuad * kWarps + warp] = dot;
        }
    }
    __syncthreads();
    bool finite = true;
#pragma unroll
    for (int z = 0; z < n_quad; ++z) {
        const int i = z * kQuad + lane / 8;
        float peak = n_probes > 0 ? -infinity() : 0.0f;
        if (p.given != nullptr) {
            peak = p.given[group * p.n_shared + min(i, n_query - 1)];
        }
#pragma unroll
        for (int k = lane % 8; k < kProbes; k += 8) {
            const float score = s.probe[i][k] * p.to_log2;
            peak = fmaxf(peak, k < n_probes ? score : -infinity());
            finite = finite && (k >= n_probes || isfinite(score));
        }
#pragma unroll
        for (int bit = 1; bit < 8; bit *= 2) {
            peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, bit));
        }
        norm[z] = s.norm[i];
        reference[z] = i < n_query ? peak : 0.0f;
        finite = finite && isfinite(reference[z]) && norm[z] <= kMaxQueryNorm;
        if (warp == 0 && lane % 8 == 0) {
            s.reference[i] = reference[z];  // for add_others
            if (blockIdx.x == 0 && i < n_query) {
                p.query_norm[group * p.n_shared + i] = norm[z];
                p.reference[group * p.n_shared + i] = reference[z];
            }
        }
    }
    return __all_sync(~0u, finite) != 0;
}

// What a warp has of the index, in shared memory or on its way there: a ring of parts of blocks' codes, and a block's grid.
template <int n_tiles, bool once> struct Stage {
    static constexpr bool kReadsOnce = once;  // what it holds is not to stay in L2
    static constexpr int kQuartersOfPart = n_tiles <= 4 ? 2 : 1;
    static constexpr int kParts = 4 / kQuartersOfPart;  // of a block
    static constexpr int kSlots = 2;
    static constexpr int kPartBytes = kQuartersOfPart * n_tiles * 32 * 16;
    uint4 codes[kSlots][kQuartersOfPart][n_tiles][32];
    uint4 grid[8 * n_tiles];  // centres, then steps, in the order of grid_position
    Arrival codes_here[kSlots];
    Arrival grid_here;
};

template <class Ring> __device__ __forceinline__ void fetch_codes(Ring & stage, const Problem & p, int64_t slot, int part) {
    constexpr int kBytes = Ring::kPartBytes;
    const int at = part % Ring::kSlots;
    stage.codes_here[at].template copy<Ring::kReadsOnce>(stage.codes[at], p.planes.codes_of(slot) + part * kBytes, kBytes);
    stage.codes_here[at].commit(kBytes);
}

template <class Ring> __device__ __forceinline__ void fetch_grid(Ring & stage, const Problem & p, int64_t slot) {
    stage.grid_here.template copy<Ring::kReadsOnce>(stage.grid, p.planes.center_of(slot), sizeof(stage.grid));
    stage.grid_here.commit(sizeof(stage.grid));
}

// Of a block's BlockBounds, which are too small for a copy, each lane has one number.
__device__ __forceinline__ float bound_of(const Planes & planes, int64_t slot) {
    constexpr int kBounds = sizeof(BlockBounds) / sizeof(float);
    return reinterpret_cast<const float *>(planes.bounds + slot)[min(static_cast<int>(threadIdx.x) % 32, kBounds - 1)];
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
                                                                 const uint4 * grid, const BlockBounds & bounds, int dim,
                                                                 float to_log2, bool certified, uint32_t (&levels)[n_tiles][2]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int half = lane / 4 % 2;
    const uint2 * center = reinterpret_cast<const uint2 *>(grid) + lane % 4 * (2 * n_tiles) + half;
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
// the block, 8 lanes to a cell, n_chunks * 64 channels. Short code, which is run through once: under load a line of it takes
// microseconds too.
template <DType type, int n_chunks>
__device__ __noinline__ bool add_exact(const Problem & p, int group, int block, uint64_t cells, Shared & s, float & key_norm) {
    constexpr int kLanes = 8;
    constexpr int kAtOnce = 32 / kLanes;
    constexpr int kOwn = kBlockCells / kWarps;
    static_assert(kOwn == 2 * kAtOnce);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int dim = p.planes.key_dim;
    const int64_t first_row = p.first_row(group) + static_cast<int64_t>(block) * kBlockCells + warp * kOwn;
    const int kv_head = p.kv_head_of(group);
    const auto own = static_cast<uint32_t>(cells >> (warp * kOwn)) & ((1u << kOwn) - 1);
    if (own == 0) {
        return false;
    }
    Eight<type> chunks[2][n_chunks];
#pragma unroll
    for (int round = 0; round < 2; ++round) {
        const int cell = round * kAtOnce + lane / kLanes;
#pragma unroll
        for (int k = 0; k < n_chunks; ++k) {
            const int c = (k * kLanes + lane % kLanes) * 8;
            chunks[round][k].clear();
            if ((own >> cell & 1) != 0 && c < dim) {
                chunks[round][k].load(p.keys.row(first_row + cell, kv_head), c);
            }
        }
    }
    bool failed = false;
#pragma unroll 1
    for (int cell = lane / kLanes; cell < kOwn; cell += kAtOnce) {
        const bool is_there = (own >> cell & 1) != 0;
        float key[n_chunks][8];
        float squared = 0;
#pragma unroll
        for (int k = 0; k < n_chunks; ++k) {
            chunks[0][k].widen(key[k]);
            chunks[0][k] = chunks[1][k];
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
            for (int k = 0; k < n_chunks; ++k) {
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
                add_mass(weight, s.lower[warp][i], s.large[i]);
            }
        }
    }
    return failed;
}

// What is known of a block to each thread, the blocks newest - thread: two words of the mask and one of the index.
struct BlockWords {
    uint64_t seen = 0;
    uint64_t after = 0;
    uint64_t indexed = 0;

    __device__ __forceinline__ BlockWords(const Problem & p, int group, int newest) {
        if (const int at = newest - static_cast<int>(threadIdx.x); at >= 0) {
            const uint64_t * visible = p.visible_of(group);
            seen = visible[at];
            after = at + 1 < p.n_blocks ? visible[at + 1] : 0;
            indexed = p.planes.indexed[p.slot_of(group, at)];
        }
    }
    // Into shared memory, for the whole thread block.
    __device__ __forceinline__ void note(Others & others) const {
        const uint64_t cells = seen & ~indexed;
        const uint32_t some = __ballot_sync(~0u, cells != 0);
        const uint32_t complete = __ballot_sync(~0u, seen == ~uint64_t{0} || after != 0);
        others.cells[threadIdx.x] = cells;
        if (threadIdx.x % 32 == 0) {
            others.some[threadIdx.x / 32] = some;
            others.complete[threadIdx.x / 32] = complete;
        }
    }
};

// What the index does not cover yet, by a whole thread block: the newest cells, or much more after a prompt or a restored state.
// Those of the newest blocks are noted.
__device__ __forceinline__ bool add_others(const Problem & p, int group, Shared & s, float & key_norm) {
    constexpr int kThreads = kWarps * 32;
    bool failed = false;
#pragma unroll 1
    for (int newest = p.n_blocks - 1;;) {
        const BlockWords next(p, group, newest - kThreads);
#pragma unroll 1
        for (int w = 0; w < kWarps; ++w) {
#pragma unroll 1
            for (uint32_t left = s.others.some[w]; left != 0; left &= left - 1) {
                const int bit = __ffs(static_cast<int>(left)) - 1;
                const int block = newest - (w * 32 + bit);
                const uint64_t cells = s.others.cells[w * 32 + bit];
                with_type(p.keys.type, [&]<DType type>() {
                    const bool here = p.planes.key_dim <= 128 ? add_exact<type, 2>(p, group, block, cells, s, key_norm)
                                                              : add_exact<type, 4>(p, group, block, cells, s, key_norm);
                    failed = here || failed;
                });
                const int64_t slot = p.slot_of(group, block);
                if (threadIdx.x == 0 && (s.others.complete[w] >> bit & 1) != 0 && (cells & ~p.planes.not_finite[slot]) != 0 &&
                    atomicExch(&p.queued[slot], 1) == 0) {
                    p.pending[atomicAdd(p.n_pending, 1)] = static_cast<int32_t>(slot);
                }
            }
        }
        newest -= kThreads;
        if (newest < 0) {
            return failed;
        }
        __syncthreads();
        next.note(s.others);
        __syncthreads();
    }
}

template <int n_tiles, int n_quad, bool reads_once> __global__ void __launch_bounds__(kWarps * 32, n_tiles * n_quad <= 4 ? 2 : 1)
    scan(const __grid_constant__ Problem p) {
    wait_for_previous();  // launched behind a kernel that is not ours it waits for nothing, but lets the next one start
    std::byte * memory = shared_memory();
    Shared & s = *reinterpret_cast<Shared *>(memory);
    const int group = static_cast<int>(blockIdx.y);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    using Ring = Stage<n_tiles, reads_once>;
    Ring & stage = reinterpret_cast<Ring *>(memory + kSharedBytes)[warp];
    if (lane == 0) {
#pragma unroll
        for (int at = 0; at < Ring::kSlots; ++at) {
            stage.codes_here[at].init();
        }
        stage.grid_here.init();
    }
    __syncwarp();
    const int row = p.row_of_group(group);
    const bool is_uniform = p.spares_uniform && *p.uniform_of(group) > 0;
    const bool is_plain = p.sight[row].plain != 0;
    const uint64_t * visible = p.visible_of(group);
    const int64_t first_slot = p.slot_of(group, 0);
    const uint64_t * indexed = p.planes.indexed + first_slot;
    // The last thread block has the cells that are not indexed, so that nobody has both to do.
    const int n_streaming = max(p.n_scan - 1, 1);
    const bool streams = static_cast<int>(blockIdx.x) < n_streaming;
    const bool adds_others = static_cast<int>(blockIdx.x) == p.n_scan - 1;
    const int stride = n_streaming * kWarps;
    int block = streams ? p.n_blocks - 1 - (static_cast<int>(blockIdx.x) * kWarps + warp) : -1;
    // Two words of a block, which are not to be touched before they are needed: under load an answer takes microseconds.
    struct Words {
        uint64_t visible;
        uint64_t indexed;
        __device__ __forceinline__ uint64_t cells() const { return visible & indexed; }
    };
    const auto words_of = [&](int at) { return at >= 0 ? Words{visible[at], indexed[at]} : Words{0, 0}; };
    const Words first = words_of(block);
    const Words second = words_of(block - stride);
    uint64_t cells = first.cells();
    uint64_t next_cells = second.cells();
    float bound = block >= 0 ? bound_of(p.planes, first_slot + block) : 0.0f;
    if (adds_others) {  // before the memory is busy
        BlockWords(p, group, p.n_blocks - 1).note(s.others);
    }
    const auto stream = [&] {
        if (cells != 0) {
            fetch_grid(stage, p, first_slot + block);
#pragma unroll
            for (int part = 0; part < Ring::kSlots; ++part) {
                fetch_codes(stage, p, first_slot + block, part);
            }
        }
    };
    // The lane's part of the queries, as the right operand wants it: it has query z * kQuad + lane / 8.
    float query[n_quad][n_tiles][4];
    float norm[n_quad];
    float reference[n_quad];
    if (!begin(p, group, is_uniform || !is_plain, s, norm, reference, stream)) {
        if (threadIdx.x == 0 && !is_uniform) {
            p.attend_all[group] = 1;
        }
        if (cells != 0 && !is_uniform && is_plain) {  // nothing may arrive once the thread block is gone
            stage.grid_here.wait(0);
            for (Arrival & codes_here : stage.codes_here) {
                codes_here.wait(0);
            }
        }
        return;
    }
#pragma unroll
    for (int z = 0; z < n_quad; ++z) {
#pragma unroll
        for (int t = 0; t < n_tiles; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                query[z][t][e] = s.query[z * kQuad + lane / 8][32 * t + lane / 4 % 2 * 16 + lane % 4 * 4 + e];
            }
        }
    }
    const int n_query = p.n_query_of(group);
    const float octave = 1.0f / kBinsPerOctave;
    uint64_t lower[n_quad] = {};  // of query z * kQuad + lane % 4
    float key_norm = 0;
    int scanned = 0;
    bool failed = false;
    uint32_t phases = 0;  // of the slots
    uint32_t grid_phase = 0;

    uint32_t levels[n_quad][n_tiles][2];
    ToBin to[n_quad];
    const auto prepare = [&] {
        stage.grid_here.wait(grid_phase);
        grid_phase ^= 1;
        const auto number = [&](int k) { return __shfl_sync(~0u, bound, k); };
        const BlockBounds bounds{number(0), number(1), number(2), number(3), number(4)};
        key_norm = fmaxf(key_norm, bounds.key_norm);
#pragma unroll
        for (int z = 0; z < n_quad; ++z) {
            to[z] = quantize<n_tiles>(query[z], norm[z], reference[z], stage.grid, bounds, p.planes.key_dim, p.to_log2,
                                      p.certified, levels[z]);
        }
    };
    if (cells != 0) {
        prepare();
    }
    while (block >= 0) {
        const int next = block - stride;
        const Words after = words_of(next - stride);
        float places[n_quad][8];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            constexpr int kOfPart = Ring::kQuartersOfPart;
            const int part = r / kOfPart;
            const int at = part % Ring::kSlots;
            if (cells != 0) {
                if (r % kOfPart == 0) {
                    stage.codes_here[at].wait(phases >> at & 1);
                    phases ^= 1u << at;
                }
                int sum[n_quad][4] = {};
#pragma unroll
                for (int t = 0; t < n_tiles; ++t) {
                    const uint4 codes = stage.codes[at][r % kOfPart][t][lane];
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
            if ((r + 1) % kOfPart == 0) {
                __syncwarp();  // all lanes have read the part, and the grid
                if (part == 0 && next_cells != 0) {
                    fetch_grid(stage, p, first_slot + next);
                    bound = bound_of(p.planes, first_slot + next);
                }
                const int later = part + Ring::kSlots;
                const bool is_of_next = later >= Ring::kParts;
                if ((is_of_next ? next_cells : cells) != 0) {
                    fetch_codes(stage, p, first_slot + (is_of_next ? next : block), later % Ring::kParts);
                }
            }
        }
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
                sum *= exp2_fast(-2.0f * slack);
                failed = failed || !isfinite(sum) || !isfinite(offset);
                add_mass(sum, lower[z], s.large[i]);
                const int64_t at = (static_cast<int64_t>(group) * p.n_shared + i) * p.n_blocks + block;
                *reinterpret_cast<uint2 *>(p.bins + at * kBlockCells + lane / 4 * 8) =
                    make_uint2(low_bytes(bins[0], bins[1], bins[2], bins[3]), low_bytes(bins[4], bins[5], bins[6], bins[7]));
                if (lane / 4 == 0) {
                    p.slack[at] = slack;
                }
            }
        }
        if (next_cells != 0) {
            prepare();
        }
        block = next;
        cells = next_cells;
        next_cells = after.cells();
    }
    if (adds_others) {
        __syncthreads();  // the references
        failed = add_others(p, group, s, key_norm) || failed;
    }
    __syncwarp();  // what add_exact left in shared memory

#pragma unroll
    for (int z = 0; z < n_quad; ++z) {
        uint64_t sum = lower[z];
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
        uint64_t sum = 0;
        for (int w = 0; w < kWarps; ++w) {
            sum += s.lower[w][threadIdx.x];
        }
        Mass & mass = p.lower[group * p.n_shared + static_cast<int>(threadIdx.x)];
        atomicAdd(&mass.small, static_cast<unsigned long long>(sum));
        if (s.large[threadIdx.x] > 0) {
            atomicAdd(&mass.large, static_cast<unsigned long long>(s.large[threadIdx.x]));
        }
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
    with_tiles(p, [&]<int n_tiles>() { bytes = kSharedBytes + kWarps * sizeof(Stage<n_tiles, false>); });
    return bytes;
}

void launch_scan(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_scan), static_cast<unsigned>(p.n_group));
    with_tiles(p, [&]<int n_tiles>() {
        const Launch launch{grid, kWarps * 32, scan_bytes(p)};
        const auto with = [&]<int n_quad>() {
            p.reads_once ? launch_kernel(scan<n_tiles, n_quad, true>, launch, stream, p)
                         : launch_kernel(scan<n_tiles, n_quad, false>, launch, stream, p);
        };
        p.n_shared <= kQuad ? with.template operator()<1>() : with.template operator()<2>();
    });
}

}  // namespace louver::cuda
