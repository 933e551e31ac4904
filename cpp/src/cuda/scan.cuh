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

inline constexpr int kQuad = 4;  // queries to a pass of the tensor cores

// x + kMagic has round(x) in its low bits, for |x| < 2^22.
inline constexpr float kMagic = 0x1.8p23f;

// The blocks of a thread block's share, newest first.
struct OwnBlocks {
    int newest;
    int stride;
    int n;

    __device__ __forceinline__ OwnBlocks(const Problem & p, int share, int n_share)
        : newest(p.n_blocks - 1 - share), stride(n_share), n((p.n_blocks - share + n_share - 1) / n_share) {}
    __device__ __forceinline__ int at(int j) const { return newest - j * stride; }
};

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
    int scanned[n_warps];
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

// The queries into shared memory; their norms, and their references, the same in every thread block of a group; and what
// the probes are known to weigh. Returns the lane's norms and references, of the queries z * kQuad + lane / 8. False: something
// is not finite or too large, so that nothing is decided here. What begins the stream of codes is called once the few rows that
// are needed first are here.
template <DType type, int n_most, int n_channels, int n_warps, class Stream>
__device__ __forceinline__ bool begin_scan(const Problem & p, int group, const LoadedQuery<n_channels> & loaded,
                                           Queries<n_most, n_channels> & queries, ScanShared<n_most, n_warps> & s,
                                           float (&norm)[n_most / kQuad], float (&reference)[n_most / kQuad],
                                           const Stream & stream) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int dim = p.planes.key_dim;
    const Sight & sight = p.sight[p.row_of_group(group)];
    const int n_probes = p.given != nullptr ? 0 : sight.n_probes;
    constexpr int kPairs = (kProbes + 2 * n_warps - 1) / (2 * n_warps);
    constexpr int kOwn = 2 * kPairs;  // probes to a warp
    int cell[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        cell[k] = sight.probes[min(k * n_warps + warp, kProbes - 1)];
    }
    loaded.store(queries);
    float keys[kOwn][8];
    Eight<type> rows[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        rows[k].clear();
        if (k * n_warps + warp < n_probes && lane * 8 < dim) {
            rows[k].load(p.keys.row(p.first_row(group) + cell[k], p.kv_head_of(group)), lane * 8);
        }
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        rows[k].widen(keys[k]);
    }
    stream();
    for (int b = static_cast<int>(threadIdx.x); b < n_most * kBins; b += n_warps * 32) {
        s.histogram[b / kBins][b % kBins] = 0;
    }
    if (lane < n_most) {
        s.lower[warp][lane] = 0;
    }
    if (static_cast<int>(threadIdx.x) < n_most) {
        s.large[threadIdx.x] = 0;
    }
    __syncthreads();  // the queries
    if (warp < n_most) {
        double squared = 0;
#pragma unroll
        for (int k = 0; k < n_channels / 32; ++k) {
            const auto x = static_cast<double>(queries.of[warp][lane + 32 * k]);
            squared += x * x;
        }
        squared = sum_of_warp(squared);
        if (lane == 0) {
            s.norm[warp] = static_cast<float>(sqrt(squared)) * kNormInflation;
        }
    }
    const bool has_channels = lane * 8 < n_channels;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
        const auto number = [&](int k) { return (2 * pair + k) * n_warps + warp; };
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float squared = 0;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                squared = fmaf(keys[2 * pair + k][e], keys[2 * pair + k][e], squared);
            }
            squared = sum_of_warp(squared);
            if (lane == 0 && number(k) < kProbes) {
                s.probe_norm[number(k)] = sqrtf(squared) * kNormInflation;
            }
        }
#pragma unroll
        for (int z = 0; z < n_most / kQuad; ++z) {
            float dots[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                dots[k] = 0;
                const float * query = &queries.of[z * kQuad + k % kQuad][has_channels ? lane * 8 : 0];
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    dots[k] = fmaf(query[e], keys[2 * pair + k / kQuad][e], dots[k]);
                }
            }
            const float dot = sum_of_warp(dots);
            if (lane % 4 == 0 && number(lane / 16) < kProbes) {
                s.probe[z * kQuad + lane / 4 % kQuad][number(lane / 16)] = dot;
            }
        }
    }
    __syncthreads();
    bool finite = true;
#pragma unroll
    for (int z = 0; z < n_most / kQuad; ++z) {
        const int i = z * kQuad + lane / 8;
        norm[z] = s.norm[i];
        float peak = n_probes > 0 ? -infinity() : 0.0f;
        if (p.given != nullptr) {
            peak = p.given[group * p.n_shared + min(i, n_query - 1)];
        }
        float score[kProbes / 8];
#pragma unroll
        for (int k = 0; k < kProbes / 8; ++k) {
            score[k] = k * 8 + lane % 8 < n_probes ? s.probe[i][k * 8 + lane % 8] * p.to_log2 : -infinity();
            peak = fmaxf(peak, score[k]);
            finite = finite && (k * 8 + lane % 8 >= n_probes || isfinite(score[k]));
        }
#pragma unroll
        for (int bit = 1; bit < 8; bit *= 2) {
            peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, bit));
        }
        reference[z] = i < n_query ? peak : 0.0f;
        finite = finite && isfinite(reference[z]) && norm[z] <= kMaxQueryNorm;
        if (warp == 0) {
            // Exact weights, less what float32 may be off by.
            const float unit = (2.0f * static_cast<float>(dim) + 16.0f) * kUnit * 1.001f * p.to_log2 * norm[z];
            float known = 0;
#pragma unroll
            for (int k = 0; k < kProbes / 8; ++k) {
                const int at = k * 8 + lane % 8;
                const float x = at < n_probes ? score[k] - reference[z] - unit * s.probe_norm[at] : -infinity();
                known += exp2_fast(x);
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
    static constexpr int kSlots = 2;
    static constexpr int kPartBytes = kQuartersOfPart * n_tiles * 32 * 16;
    uint4 codes[kSlots][kQuartersOfPart][n_tiles][32];
    uint4 grid[8 * n_tiles];  // centres, then steps, in the order of grid_position
    Arrival codes_here[kSlots];
    Arrival grid_here;

    // By a lane; the warp has to meet before it is used.
    __device__ __forceinline__ void init() {
#pragma unroll
        for (int at = 0; at < kSlots; ++at) {
            codes_here[at].init();
        }
        grid_here.init();
    }
    // By a lane, once the warp has met: what was here is memory again.
    __device__ __forceinline__ void end() {
#pragma unroll
        for (int at = 0; at < kSlots; ++at) {
            codes_here[at].end();
        }
        grid_here.end();
    }
};

template <class Ring> __device__ __forceinline__ void fetch_codes(Ring & stage, const Problem & p, int64_t slot, int part) {
    constexpr int kBytes = Ring::kPartBytes;
    const int at = part % Ring::kSlots;
    stage.codes_here[at].copy(stage.codes[at], p.planes.codes_of(slot) + part * kBytes, kBytes, p.reads_once);
    stage.codes_here[at].commit(kBytes);
}

template <class Ring> __device__ __forceinline__ void fetch_grid(Ring & stage, const Problem & p, int64_t slot) {
    stage.grid_here.copy(stage.grid, p.planes.center_of(slot), sizeof(stage.grid), p.reads_once);
    stage.grid_here.commit(sizeof(stage.grid));
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

// The scan of a share by a whole thread block; type: of the keys that are probed. False in all threads: something
// was not finite; `begun` says whether it was so from the beginning, for all thread blocks of the group. Leaves in shared memory
// the histograms and the mass.
template <DType type, int n_tiles, class Ring, int n_most, int n_channels, int n_warps>
__device__ __forceinline__ bool scan_share(const Problem & p, int group, const OwnBlocks & own,
                                           const LoadedQuery<n_channels> & loaded, Queries<n_most, n_channels> & queries,
                                           ScanShared<n_most, n_warps> & s, Ring & stage, bool & begun) {
    constexpr int n_quad = n_most / kQuad;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane == 0) {
        stage.init();
    }
    __syncwarp();
    const Sight & sight = p.sight[p.row_of_group(group)];
    const int probes_end = p.given != nullptr ? 0 : sight.probes_end;
    const int probes_begin = p.given != nullptr ? p.n_blocks * kBlockCells : sight.probes_begin;
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
    float bound = block >= 0 ? bound_of(p.planes, first_slot + block) : 0.0f;
    uint64_t cells = first.cells();
    uint64_t next_cells = second.cells();
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
    begun = begin_scan<type, n_most, n_channels, n_warps>(p, group, loaded, queries, s, norm, reference, stream);
    if (!begun) {
        if (cells != 0) {  // nothing may arrive once the thread block goes on
            stage.grid_here.wait(0);
            for (Arrival & codes_here : stage.codes_here) {
                codes_here.wait(0);
            }
        }
        __syncwarp();
        if (lane == 0) {
            stage.end();
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
    const float octave = 1.0f / kBinsPerOctave;
    uint64_t lower[n_quad] = {};  // of query z * kQuad + lane % 4
    int scanned = 0;
    bool failed = false;
    uint32_t phases = 0;  // of the slots
    uint32_t grid_phase = 0;
    if (first.others() != 0) {
        failed = note_others(p, group, block, first);
    }
    if (second.others() != 0) {
        failed = note_others(p, group, block - stride, second) || failed;
    }

    uint32_t levels[n_quad][n_tiles][2];
    ToBin to[n_quad];
    const auto prepare = [&] {
        stage.grid_here.wait(grid_phase);
        grid_phase ^= 1;
        const auto number = [&](int k) { return __shfl_sync(~0u, bound, k); };
        const BlockBounds bounds{number(0), number(1), number(2), number(3), number(4)};
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
            // What the probes weigh is known already.
            const int cell = block * kBlockCells + lane / 4 * 8;
            const uint32_t counted =
                mine & 0xffu << min(max(probes_end - cell, 0), 8) & 0xffu >> min(max(cell + 8 - probes_begin, 0), 8);
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
                        sum += (counted >> e & 1) != 0 ? exp2_fast(fmaf(place, octave, -kReferenceBin * octave)) : 0.0f;
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
        s.scanned[warp] = scanned;
    }
    const bool has_failed = __syncthreads_or(failed ? 1 : 0) != 0;
    if (lane == 0) {
        stage.end();
    }
    return !has_failed;
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
