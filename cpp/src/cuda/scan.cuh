// Upper bounds of all scores of a group's queries: the identity and the slack of docs/guarantee.md ("The scan"), with signed
// codes, so that
//
//     q.k = q.m + h sum_c l_c (b_c - 128) + d.(b - 128) + q.r
//
// and the integer dot products on the tensor cores: 16 keys by 32 channels of codes at a time, times the levels of up to 4
// queries, the high and the low 8 bits of each a column of its own.
#pragma once

#include "cuda/problem.h"
#include "cuda/rows.cuh"
#include "cuda/warp.cuh"
#include "kernels/bounds.h"

namespace louver::cuda {

inline constexpr int kQuad = 4;   // queries to a pass of the tensor cores
inline constexpr int kSlots = 2;  // parts of codes that a warp has or waits for

// x + kMagic has round(x) in its low bits, for |x| < 2^22.
inline constexpr float kMagic = 0x1.8p23f;

// The blocks of a thread block's share, newest first.
struct OwnBlocks {
    int newest;
    int stride;
    int n;

    __device__ __forceinline__ int at(int j) const { return newest - j * stride; }
};
__device__ __forceinline__ OwnBlocks blocks_of(const Problem & p, const GroupShares & shares, int share) {
    return {p.n_blocks - 1 - share, shares.n, p.deal_of(shares).n_of(share)};
}

// Bins of a query's cells into global memory, 8 cells to a lane.
__device__ __forceinline__ void store_bins(const Problem & p, int group, int i, int block, uint64_t bins) {
    uint8_t * of_block = p.bins + ((static_cast<int64_t>(group) * p.n_shared + i) * p.n_blocks + block) * kBlockCells;
    reinterpret_cast<uint64_t *>(of_block)[threadIdx.x % 32 / 4] = bins;
}

// The queries of a group, zeros where there is none and behind the last channel. Rows are 32 bytes off, so that 4 queries are in
// different banks.
template <int n_most, int n_channels> struct Queries {
    static constexpr int kPitch = n_channels + 8;
    alignas(16) float of[n_most][kPitch];
};

// n_most: queries to a group, a multiple of kQuad; n_warps: of the thread block.
template <int n_most, int n_warps> struct ScanShared {
    uint32_t histogram[n_most][kBins];
    float probe[n_most][kProbes];
    float probe_norm[kProbes];
    float norm[n_most];
    float reference[n_most];
    float known[n_most];              // lower bound of the probes' mass
    uint64_t lower[n_warps][n_most];  // of each warp, in kSmallUnit
    uint64_t large[n_most];           // of all of them, in kLargeUnit
    int scanned;                      // cells
};

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

// A query to a warp, on its way from where it is made: other loads may follow before it is stored.
template <int n_channels> struct LoadedQuery {
    float own[n_channels / 32];

    __device__ __forceinline__ LoadedQuery(const Problem & p, int group) {
        const int warp = static_cast<int>(threadIdx.x) / 32;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int n_query = p.n_query_of(group);
        const float * query = p.query_of(group, min(warp, n_query - 1));
#pragma unroll
        for (int k = 0; k < n_channels / 32; ++k) {
            own[k] = warp < n_query && lane + 32 * k < p.keys.dim ? query[lane + 32 * k] : 0.0f;
        }
    }
    // The thread block has to meet before it is used.
    template <int n_most> __device__ __forceinline__ void store(Queries<n_most, n_channels> & queries) const {
        const int warp = static_cast<int>(threadIdx.x) / 32;
        if (warp < n_most) {
#pragma unroll
            for (int k = 0; k < n_channels / 32; ++k) {
                queries.of[warp][static_cast<int>(threadIdx.x) % 32 + 32 * k] = own[k];
            }
        }
    }
};

// The probes' keys, some lanes to each, on their way too: two answers of the memory one after another, asked for at once.
template <DType type, int n_channels, int n_warps> struct LoadedProbes {
    static constexpr bool kGiven = false;
    static constexpr int kLanes = n_channels / 8;          // to a probe
    static constexpr int kAtOnce = n_warps * 32 / kLanes;  // probes
    static constexpr int kRounds = (kProbes + kAtOnce - 1) / kAtOnce;
    int n;
    Eight<type> rows[kRounds];

    static __device__ __forceinline__ int number(int round) { return round * kAtOnce + static_cast<int>(threadIdx.x) / kLanes; }
    static __device__ __forceinline__ int channel() { return static_cast<int>(threadIdx.x) % kLanes * 8; }

    __device__ __forceinline__ LoadedProbes(const Problem & p, int group) {
        const Sight & sight = p.sight[p.row_of_group(group)];
        n = sight.n_probes;
        int cell[kRounds];
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            cell[round] = sight.probes[min(number(round), kProbes - 1)];
        }
        const std::byte * from = p.keys.row(p.first_row(group), p.kv_head_of(group));
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            rows[round].clear();
            if (number(round) < n && channel() < p.planes.key_dim) {
                rows[round].load(from + cell[round] * p.keys.row_stride, channel());
            }
        }
    }
    // They have to be here then.
    __device__ __forceinline__ void widen(float (&keys)[kRounds][8]) const {
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            rows[round].widen(keys[round]);
        }
    }
};
// The caller has references, and no key is read.
struct NoProbes {
    static constexpr bool kGiven = true;
    static constexpr int kRounds = 1;
    static constexpr int n = 0;

    __device__ __forceinline__ void widen(float (&)[1][8]) const {}
};

// The queries into shared memory; their norms, and their references, the same in every thread block of a group; and what
// the probes are known to weigh. Returns the lane's norms and references, of the queries z * kQuad + lane / 8. False: something
// is not finite or too large, so that nothing is decided here. What begins the stream of codes is called once the few rows that
// are needed first are here.
template <int n_most, int n_channels, int n_warps, class Probes, class Stream>
__device__ __forceinline__ bool begin_scan(const Problem & p, int group, const LoadedQuery<n_channels> & loaded,
                                           const Probes & probes, Queries<n_most, n_channels> & queries,
                                           ScanShared<n_most, n_warps> & s, float (&norm)[n_most / kQuad],
                                           float (&reference)[n_most / kQuad], const Stream & stream) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int n_query = p.n_query_of(group);
    const int dim = p.planes.key_dim;
    const int n_probes = probes.n;
    loaded.store(queries);
    float keys[Probes::kRounds][8];
    probes.widen(keys);
    stream();
    if (warp < n_most) {
        // Scaled, so that no square overflows; what vanishes is less than is added.
        float squared = 0;
#pragma unroll
        for (int k = 0; k < n_channels / 32; ++k) {
            const float x = loaded.own[k] * 0x1p-16f;
            squared = fmaf(x, x, squared);
        }
        squared = sum_of_warp(squared);
        if (lane == 0) {
            s.norm[warp] = fmaf(sqrt_fast(squared), 0x1p16f * kNormInflation, 0x1p-40f);
        }
    }
#pragma unroll
    for (int first = 0; first < n_most * kBins; first += n_warps * 32 * 4) {
        if (first + thread * 4 < n_most * kBins) {
            *reinterpret_cast<uint4 *>(&s.histogram[0][0] + first + thread * 4) = {};
        }
    }
    if (thread < n_most) {
        s.large[thread] = 0;
        s.scanned = 0;
    }
    __syncthreads();  // the queries
    if constexpr (!Probes::kGiven) {
        constexpr int kLanes = Probes::kLanes;
#pragma unroll
        for (int round = 0; round < Probes::kRounds; ++round) {
            const int number = Probes::number(round);
            float squared = 0;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                squared = fmaf(keys[round][e], keys[round][e], squared);
            }
#pragma unroll
            for (int bit = 1; bit < kLanes; bit *= 2) {
                squared += __shfl_xor_sync(~0u, squared, bit);
            }
            float dots[n_most];
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                dots[i] = 0;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    dots[i] = fmaf(queries.of[i][Probes::channel() + e], keys[round][e], dots[i]);
                }
            }
            const float dot = transposed_sum<n_most, kLanes>(dots);
            if (number < kProbes) {
                if (lane % kLanes < n_most) {
                    s.probe[lane % kLanes][number] = dot;
                }
                s.probe_norm[number] = fmaf(sqrt_fast(squared), kNormInflation, 0x1p-60f);
            }
        }
        __syncthreads();
    }
    bool finite = true;
#pragma unroll
    for (int z = 0; z < n_most / kQuad; ++z) {
        const int i = z * kQuad + lane / 8;
        norm[z] = s.norm[i];
        float peak = n_probes > 0 ? -infinity() : 0.0f;
        float score[kProbes / 8];
        if constexpr (Probes::kGiven) {
            peak = p.given[group * p.n_shared + min(i, n_query - 1)];
        } else {
#pragma unroll
            for (int k = 0; k < kProbes / 8; ++k) {
                const float x = s.probe[i][k * 8 + lane % 8] * p.to_log2;
                const bool is_there = k * 8 + lane % 8 < n_probes;
                score[k] = is_there ? x : -infinity();
                peak = fmaxf(peak, score[k]);
                finite = finite && (!is_there || fabsf(x) < infinity());
            }
#pragma unroll
            for (int bit = 1; bit < 8; bit *= 2) {
                peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, bit));
            }
        }
        reference[z] = i < n_query ? peak : 0.0f;
        finite = finite && fabsf(reference[z]) < infinity() && norm[z] <= kMaxQueryNorm;
        if (!Probes::kGiven && warp == 0) {
            // Exact weights, less what float32 may be off by.
            const float unit = (2.0f * static_cast<float>(dim) + 16.0f) * kUnit * 1.001f * p.to_log2 * norm[z];
            float known = 0;
#pragma unroll
            for (int k = 0; k < kProbes / 8; ++k) {
                // Behind the last probe there is nothing, of no weight.
                known += exp2_fast(fmaf(-unit, s.probe_norm[k * 8 + lane % 8], score[k] - reference[z]));
            }
#pragma unroll
            for (int bit = 1; bit < 8; bit *= 2) {
                known += __shfl_xor_sync(~0u, known, bit);
            }
            if (lane % 8 == 0) {
                s.reference[i] = reference[z];
                s.known[i] = known * static_cast<float>(1.0 - kWeightError);
            }
        }
    }
    return __all_sync(~0u, finite) != 0;
}

// What a warp has of the index, in shared memory or on its way there: a ring of parts of blocks' codes, and a block's grid.
template <int n_tiles, int n_quarters> struct Stage {
    static constexpr int kQuartersOfPart = n_quarters;
    static constexpr int kParts = 4 / kQuartersOfPart;  // of a block
    static constexpr int kPartBytes = kQuartersOfPart * n_tiles * 32 * 16;
    uint4 codes[kSlots][kQuartersOfPart][n_tiles][32];
    uint4 grid[8 * n_tiles];  // centres, then steps, in the order of grid_position
};

// What tells a warp that its copies are there. Where nothing else will ever lie, so that it need not end.
struct StageArrivals {
    Arrival codes[kSlots];
    Arrival grid;

    // By a lane; the warp has to meet before it is used.
    __device__ __forceinline__ void init() {
#pragma unroll
        for (Arrival & of_slot : codes) {
            of_slot.init();
        }
        grid.init();
    }
};

template <class Ring>
__device__ __forceinline__ void fetch_codes(Ring & stage, StageArrivals & here, const Problem & p, int64_t slot, int part) {
    constexpr int kBytes = Ring::kPartBytes;
    here.codes[part % kSlots].copy(stage.codes[part % kSlots], p.planes.codes_of(slot) + part * kBytes, kBytes);
}

template <class Ring>
__device__ __forceinline__ void fetch_grid(Ring & stage, StageArrivals & here, const Problem & p, int64_t slot) {
    here.grid.copy(stage.grid, p.planes.center_of(slot), sizeof(stage.grid));
}

// Of a block's BlockBounds, which are too small for a copy, each lane has one number.
__device__ __forceinline__ float bound_of(const Planes & planes, int64_t slot) {
    constexpr int kBounds = sizeof(BlockBounds) / sizeof(float);
    return reinterpret_cast<const float *>(planes.bounds + slot)[min(static_cast<int>(threadIdx.x) % 32, kBounds - 1)];
}

// Words of a block, which are not to be touched before they are needed: under load an answer takes microseconds.
struct Words {
    uint64_t visible = 0;
    uint64_t indexed = 0;
    uint64_t after = 0;  // visible cells of the next block

    __device__ __forceinline__ uint64_t cells() const { return visible & indexed; }
    __device__ __forceinline__ uint64_t others() const { return visible & ~indexed; }
};

// A block with cells that the index does not cover: they are attended for sure. If the block is complete they are to be encoded.
// By a warp; whether one of them is known to be not finite.
static __device__ __noinline__ bool note_others(const Problem & p, int group, int block, const Words & words) {
    const int64_t slot = p.slot_of(group, block);
    const uint64_t not_finite = p.planes.not_finite[slot];
    if (p.queued != nullptr && threadIdx.x % 32 == 0 && (words.visible == ~uint64_t{0} || words.after != 0) &&
        (words.others() & ~not_finite) != 0 && atomicExch(&p.queued[slot], 1) == 0) {
        p.pending[p.slot_of(group, 0) + atomicAdd(&p.n_pending[p.pair_of(group)], 1)] = static_cast<int32_t>(slot);
    }
    return (words.others() & not_finite) != 0;
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

// The scan of a share by a whole thread block. False in all threads: something
// was not finite; `begun` says whether it was so from the beginning, for all thread blocks of the group. Leaves in shared memory
// the histograms and the mass. Of the j-th of its blocks, if there are such cells: keep.words(j, words) by a lane, the visible
// and the indexed cells, of all blocks; keep.longest(j, norm) by a lane; and keep.bins(j, block, i, slack, bins) by 8 lanes to
// each query i, each with 8 cells' bins.
template <int n_tiles, class Probes, class Ring, int n_most, int n_channels, int n_warps, class Keep>
__device__ __forceinline__ bool scan_share(const Problem & p, int group, const OwnBlocks & own,
                                           const LoadedQuery<n_channels> & loaded, const Probes & probes,
                                           Queries<n_most, n_channels> & queries, ScanShared<n_most, n_warps> & s, Ring & stage,
                                           StageArrivals & here, const Keep & keep, bool & begun) {
    constexpr int n_quad = n_most / kQuad;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane == 0) {
        here.init();
    }
    __syncwarp();
    const Sight & sight = p.sight[p.row_of_group(group)];
    const int probes_end = Probes::kGiven ? 0 : sight.probes_end;
    const int probes_begin = Probes::kGiven ? p.n_blocks * kBlockCells : sight.probes_begin;
    const uint64_t * visible = p.visible_of(group);
    const int64_t first_slot = p.slot_of(group, 0);
    const uint64_t * indexed = p.planes.indexed + first_slot;
    const int stride = own.stride * n_warps;
    int block = own.at(warp);
    const auto words_of = [&](int at) {
        return at >= 0 ? Words{visible[at], indexed[at], at + 1 < p.n_blocks ? visible[at + 1] : 0} : Words{};
    };
    const Words first = words_of(block);
    const Words second = words_of(block - stride);
    int j = warp;
    float bound = block >= 0 ? bound_of(p.planes, first_slot + block) : 0.0f;
    uint64_t cells = first.cells();
    uint64_t next_cells = second.cells();
    const auto stream = [&] {
        if (cells != 0) {
            fetch_grid(stage, here, p, first_slot + block);
#pragma unroll 1
            for (int part = 0; part < kSlots; ++part) {
                fetch_codes(stage, here, p, first_slot + block, part);
            }
        }
    };
    // The lane's part of the queries, as the right operand wants it: it has query z * kQuad + lane / 8.
    float query[n_quad][n_tiles][4];
    float norm[n_quad];
    float reference[n_quad];
    begun = begin_scan<n_most, n_channels, n_warps>(p, group, loaded, probes, queries, s, norm, reference, stream);
    if (!begun) {
        if (cells != 0) {  // nothing may arrive once the thread block goes on
            here.grid.wait(0);
            for (Arrival & of_slot : here.codes) {
                of_slot.wait(0);
            }
        }
        return false;
    }
#pragma unroll
    for (int z = 0; z < n_quad; ++z) {
#pragma unroll
        for (int t = 0; t < n_tiles; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                query[z][t][e] = queries.of[z * kQuad + lane / 8][32 * t + lane / 4 % 2 * 16 + lane % 4 * 4 + e];
            }
        }
    }
    const int n_query = p.n_query_of(group);
    constexpr float kOctave = 1.0f / kBinsPerOctave;
    uint64_t lower[n_quad] = {};  // of query z * kQuad + lane % 4
    int scanned = 0;
    bool failed = false;
    uint32_t phases = 0;  // of the slots
    uint32_t grid_phase = 0;
    if (lane == 0) {
        keep.words(j, first);
        keep.words(j + n_warps, second);
    }
    if (first.others() != 0) {
        failed = note_others(p, group, block, first);
    }
    if (second.others() != 0) {
        failed = note_others(p, group, block - stride, second) || failed;
    }
    // What runs once is paid by the instruction: so the levels are made in one place, and parts of a block go round a loop.
#pragma unroll 1
    while (block >= 0) {
        const int next = block - stride;
        const Words after = words_of(next - stride);
        uint32_t levels[n_quad][n_tiles][2];
        ToBin to[n_quad];  // of query z * kQuad + lane % 4
        if (cells != 0) {
            here.grid.wait(grid_phase);
            grid_phase ^= 1;
            const auto of_block = [&](int k) { return __shfl_sync(~0u, bound, k); };
            const BlockBounds bounds{of_block(0), of_block(1), of_block(2), of_block(3), of_block(4)};
            if (lane == 0) {
                keep.longest(j, bounds.value_norm);
            }
#pragma unroll
            for (int z = 0; z < n_quad; ++z) {
                const ToBin own_query = quantize<n_tiles>(query[z], norm[z], reference[z], stage.grid, bounds, p.planes.key_dim,
                                                          p.to_log2, p.certified, levels[z]);
                // From the lanes that quantized a query to those that hold its results.
                to[z].scale = __shfl_sync(~0u, own_query.scale, lane % 4 * 8);
                to[z].offset = __shfl_sync(~0u, own_query.offset, lane % 4 * 8);
                to[z].slack = __shfl_sync(~0u, own_query.slack, lane % 4 * 8);
            }
        }
        uint32_t mine = static_cast<uint32_t>(cells >> (lane / 4 * 8)) & 0xffu;  // the 8 cells of this lane's results
        // What the probes weigh is known already.
        const int cell = block * kBlockCells + lane / 4 * 8;
        uint32_t counted = mine & 0xffu << min(max(probes_end - cell, 0), 8) & 0xffu >> min(max(cell + 8 - probes_begin, 0), 8);
        float mass[n_quad] = {};
        uint64_t bins[n_quad] = {};
#pragma unroll 1
        for (int part = 0; part < Ring::kParts; ++part) {
            constexpr int kOfPart = Ring::kQuartersOfPart;
            const int at = part % kSlots;
            int sum[n_quad][kOfPart][4] = {};
            if (cells != 0) {
                here.codes[at].wait(phases >> at & 1);
                phases ^= 1u << at;
#pragma unroll
                for (int r = 0; r < kOfPart; ++r) {
#pragma unroll
                    for (int t = 0; t < n_tiles; ++t) {
                        const uint4 codes = stage.codes[at][r][t][lane];
#pragma unroll
                        for (int z = 0; z < n_quad; ++z) {
                            multiply_add(sum[z][r], codes, levels[z][t]);
                        }
                    }
                }
            }
            __syncwarp();  // all lanes have read the part, and the grid
            if (part == 0 && next_cells != 0) {
                fetch_grid(stage, here, p, first_slot + next);
                bound = bound_of(p.planes, first_slot + next);
            }
            const int later = part + kSlots;
            const bool is_of_next = later >= Ring::kParts;
            if ((is_of_next ? next_cells : cells) != 0) {
                fetch_codes(stage, here, p, first_slot + (is_of_next ? next : block), later % Ring::kParts);
            }
            if (cells == 0) {
                continue;
            }
#pragma unroll
            for (int z = 0; z < n_quad; ++z) {
                const int i = z * kQuad + lane % 4;
#pragma unroll
                for (int e = 0; e < 2 * kOfPart; ++e) {
                    const int(&of_quarter)[4] = sum[z][e / 2];
                    const auto dot = static_cast<float>(256 * of_quarter[e % 2 * 2] + of_quarter[e % 2 * 2 + 1]);
                    const float place = fmaf(dot, to[z].scale, to[z].offset);
                    const uint32_t bin = bin_bits(place) & 0xffu;
                    if (i < n_query && (mine >> e & 1) != 0) {
                        mass[z] += (counted >> e & 1) != 0 ? exp2_fast(fmaf(place, kOctave, -kReferenceBin * kOctave)) : 0.0f;
                        atomicAdd(&s.histogram[i][bin], 1u);
                    }
                    bins[z] = bins[z] >> 8 | static_cast<uint64_t>(bin) << 56;
                }
            }
            mine >>= 2 * kOfPart;
            counted >>= 2 * kOfPart;
        }
        if (cells != 0) {
            scanned += __popcll(static_cast<long long>(cells));
#pragma unroll
            for (int z = 0; z < n_quad; ++z) {
                const int i = z * kQuad + lane % 4;
                if (i >= n_query) {
                    continue;
                }
                // From upper to lower bounds: down by twice the slack.
                const float least = mass[z] * exp2_fast(-2.0f * to[z].slack);
                failed = failed || !(fabsf(least) < infinity()) || !(fabsf(to[z].offset) < infinity());
                add_mass(least, lower[z], s.large[i]);
                keep.bins(j, block, i, to[z].slack, bins[z]);
            }
        }
        j += n_warps;
        block = next;
        cells = next_cells;
        next_cells = after.cells();
        if (lane == 0) {
            keep.words(j + n_warps, after);
        }
        if (after.others() != 0) {
            failed = note_others(p, group, block - stride, after) || failed;
        }
    }
#pragma unroll
    for (int z = 0; z < n_quad; ++z) {
        uint64_t sum = lower[z];
        sum += __shfl_xor_sync(~0u, sum, 4);
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (lane < kQuad) {
            s.lower[warp][z * kQuad + lane] = sum;
        }
    }
    if (lane == 0) {
        atomicAdd(&s.scanned, scanned);
    }
    return __syncthreads_or(failed ? 1 : 0) == 0;
}

// A lower bound on what the share of a query weighs, with its part of what the probes do. By a warp, the same in all lanes.
template <int n_most, int n_warps>
__device__ __forceinline__ float least_mass(const ScanShared<n_most, n_warps> & s, int i, int n_share) {
    uint64_t small = 0;
#pragma unroll
    for (int w = 0; w < n_warps; ++w) {
        small += s.lower[w][i];
    }
    const float own = static_cast<float>(small) * kSmallUnit + static_cast<float>(s.large[i]) * kLargeUnit;
    return (own + s.known[i] / static_cast<float>(n_share)) * (1.0f - 0x1p-20f);
}

}  // namespace louver::cuda
