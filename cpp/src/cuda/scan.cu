// Upper bounds of all scores of a group's queries: the identity and the slack of docs/guarantee.md ("The scan"), with signed
// codes, so that
//
//     q.k = q.m + h sum_c l_c (b_c - 128) + d.(b - 128) + q.r
//
// and the integer dot products on the tensor cores: 16 keys by 32 channels of codes at a time, times the levels of up to 4
// queries, the high and the low 8 bits of each a column of its own.
#include "cuda/encode.cuh"
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
    float query[kMaxShared][kMaxKernelDim];
    uint32_t histogram[kMaxShared][kBins];
    float probe[kMaxShared][kProbes];
    float norm[kMaxShared];
    float reference[kMaxShared];
    double lower[kWarps][kMaxShared];  // of each warp
    float key_norm[kWarps];
    int scanned[kWarps];
    int failed;       // before the scan
    int failed_late;  // while it runs: one flag would be set by warps that are ahead
};

__device__ __forceinline__ void load_eight(DType type, const std::byte * row, int first, float (&out)[8]) {
    const auto as = [&]<DType t>() {
        Eight<t> eight;
        eight.load(row, first);
        eight.widen(out);
    };
    switch (type) {
        case DType::f32: as.template operator()<DType::f32>(); break;
        case DType::f16: as.template operator()<DType::f16>(); break;
        case DType::bf16: as.template operator()<DType::bf16>(); break;
        default: as.template operator()<DType::q8_0>(); break;
    }
}

// Queries, norms and references, the same in every thread block of a group. False: something is not finite or too large, so that
// nothing is decided here.
__device__ bool begin(const Problem & p, int group, Shared & s) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    const int dim = p.planes.key_dim;
    for (int i = warp; i < kMaxShared; i += kWarps) {
        double squared = 0;
        for (int c = lane; c < kMaxKernelDim; c += 32) {
            const float x = i < n_query && c < dim ? p.query_of(group, i)[c] : 0.0f;
            s.query[i][c] = x;
            squared += static_cast<double>(x) * static_cast<double>(x);
        }
        squared = sum_of_warp(squared);
        if (lane == 0) {
            s.norm[i] = static_cast<float>(sqrt(squared)) * kNormInflation;
            for (int w = 0; w < kWarps; ++w) {
                s.lower[w][i] = 0;
            }
        }
        for (int b = lane; b < kBins; b += 32) {
            s.histogram[i][b] = 0;
        }
    }
    if (threadIdx.x == 0) {
        s.failed = 0;
        s.failed_late = 0;
    }
    __syncthreads();
    const Sight & sight = p.sight[p.row_of_group(group)];
    const int n_probes = p.given != nullptr ? 0 : sight.n_probes;
    for (int n = warp; n < n_probes; n += kWarps) {
        const std::byte * row = p.keys.row(p.first_row(group) + sight.probes[n], p.kv_head_of(group));
        float key[8] = {};
        if (lane * 8 < dim) {
            load_eight(p.keys.type, row, lane * 8, key);
        }
        for (int i = 0; i < n_query; ++i) {
            float dot = 0;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                dot += s.query[i][lane * 8 + e] * key[e];
            }
            dot = sum_of_warp(dot);
            if (lane == 0) {
                s.probe[i][n] = dot;
            }
        }
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < kMaxShared) {
        const int i = static_cast<int>(threadIdx.x);
        float peak = i < n_query && n_probes > 0 ? -infinity() : 0.0f;
        if (p.given != nullptr && i < n_query) {
            peak = p.given[group * p.n_shared + i];
        }
        bool finite = isfinite(peak) || n_probes > 0;
        for (int n = 0; n < n_probes && i < n_query; ++n) {
            const float score = s.probe[i][n] * p.to_log2;
            finite = finite && isfinite(score);
            peak = fmaxf(peak, score);
        }
        s.reference[i] = peak;
        if (!finite || !(s.norm[i] <= kMaxQueryNorm)) {
            s.failed = 1;
        }
        if (blockIdx.x == 0 && i < n_query) {
            p.query_norm[group * p.n_shared + i] = s.norm[i];
            p.reference[group * p.n_shared + i] = peak;
        }
    }
    __syncthreads();
    return s.failed == 0;
}

__device__ __forceinline__ uint4 load_codes(const uint4 * at) {  // read once: not worth a place in L1
    uint4 x;
    asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
    return x;
}

__device__ __forceinline__ void multiply_add(int (&sum)[4], const uint4 & codes, const uint32_t (&levels)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(codes.x), "r"(codes.y), "r"(codes.z), "r"(codes.w), "r"(levels[0]), "r"(levels[1]));
}

// The lane's bfloat16 of a tile, in the order of grid_position.
__device__ __forceinline__ Eight<DType::bf16> load_grid(const uint16_t * grid, int n_tiles, int tile) {
    Eight<DType::bf16> eight;
    eight.load(reinterpret_cast<const std::byte *>(grid), static_cast<int>(threadIdx.x) % 4 * (8 * n_tiles) + tile * 8);
    return eight;
}

// What turns the integer dot products of a query with a block's codes into places among the bins: dot * scale + offset.
struct ToBin {
    float scale;
    float offset;
    float slack;
};

// Levels of the lane's column of the right operand, and what completes their dot products, for one block. The lanes 8 i .. 8 i +
// 7 of a warp have query i: 4 of them its high, 4 its low bytes; each its channels, lane % 4.
template <int n_tiles> __device__ __forceinline__ ToBin quantize(const float (&query)[n_tiles][8], float norm, float reference,
                                                                 const uint16_t * center, const uint16_t * step,
                                                                 const BlockBounds & bounds, int dim, float to_log2,
                                                                 bool certified, uint32_t (&levels)[n_tiles][2]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool low = (lane / 4) % 2 != 0;
    Eight<DType::bf16> steps[n_tiles];  // kept as stored: registers decide how many warps there are
    float largest = 0;
    float base = 0;
#pragma unroll
    for (int t = 0; t < n_tiles; ++t) {
        steps[t] = load_grid(step, n_tiles, t);
        float steps_of[8];
        float centers[8];
        steps[t].widen(steps_of);
        load_grid(center, n_tiles, t).widen(centers);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            largest = fmaxf(largest, fabsf(query[t][e] * steps_of[e]));
            base = fmaf(query[t][e], centers[e], base);
        }
    }
#pragma unroll
    for (int step_of = 1; step_of < 4; step_of *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step_of));
        base += __shfl_xor_sync(~0u, base, step_of);
    }
    const HeadBound head = head_bound(largest, norm, dim, to_log2, reference, certified);
    // The low byte of an integer, and with 128 added the next one: together 256 * high + low.
    const float magic = low ? kMagic : kMagic + 128.0f;
    const uint32_t pick = low ? 0x0040u : 0x0051u;
#pragma unroll
    for (int t = 0; t < n_tiles; ++t) {
        float steps_of[8];
        steps[t].widen(steps_of);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t bits[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float scaled = query[t][4 * half + e] * steps_of[4 * half + e];
                bits[e] = __float_as_uint(fmaf(scaled, head.inverse, magic));
            }
            levels[t][half] = __byte_perm(__byte_perm(bits[0], bits[1], pick), __byte_perm(bits[2], bits[3], pick), 0x5410);
        }
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

// Exact weights of cells that the index does not cover, a lane to each two: they are attended for sure, and belong to the bound.
__device__ __noinline__ void add_exact(const Problem & p, int group, int block, uint64_t cells, Shared & s, float & key_norm,
                                       bool & failed) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n_query = p.n_query_of(group);
    float sum[kMaxShared] = {};
    for (int half = 0; half < 2; ++half) {
        const int bit = half * 32 + lane;
        if ((cells >> bit & 1) == 0) {
            continue;
        }
        const std::byte * row = p.keys.row(p.first_row(group) + block * kBlockCells + bit, p.kv_head_of(group));
        float dot[kMaxShared] = {};
        float squared = 0;
        for (int c = 0; c < p.planes.key_dim; c += 8) {
            float key[8];
            load_eight(p.keys.type, row, c, key);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                squared = fmaf(key[e], key[e], squared);
#pragma unroll
                for (int i = 0; i < kMaxShared; ++i) {
                    if (i < n_query) {
                        dot[i] = fmaf(s.query[i][c + e], key[e], dot[i]);
                    }
                }
            }
        }
        const float norm = sqrtf(squared) * kNormInflation;
        key_norm = fmaxf(key_norm, norm);
        failed = failed || !isfinite(norm);
#pragma unroll
        for (int i = 0; i < kMaxShared; ++i) {
            if (i < n_query) {
                const float error = (2.0f * static_cast<float>(p.planes.key_dim) + 16.0f) * kUnit * s.norm[i] * norm * p.to_log2;
                const float weight = exp2_fast(dot[i] * p.to_log2 - s.reference[i] - error * 1.001f);
                sum[i] += weight;
                failed = failed || !isfinite(weight);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kMaxShared; ++i) {
        const float all = sum_of_warp(sum[i]);
        if (lane == 0) {
            s.lower[threadIdx.x / 32][i] += static_cast<double>(all);
        }
    }
}

template <int n_tiles, int n_quad> __global__ void __launch_bounds__(kWarps * 32, n_tiles * n_quad <= 4 ? 2 : 1)
    scan(const __grid_constant__ Problem p) {
    extern __shared__ std::byte memory[];
    Shared & s = *reinterpret_cast<Shared *>(memory);
    const int group = static_cast<int>(blockIdx.y);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = p.row_of_group(group);
    const Sight & sight = p.sight[row];
    if (p.spares_uniform && *p.uniform_of(group) > 0) {
        return;
    }
    if (sight.plain == 0 || !begin(p, group, s)) {
        if (threadIdx.x == 0) {
            p.attend_all[group] = 1;
        }
        return;
    }

    const int n_query = p.n_query_of(group);
    const int stream = p.stream_of(group);
    const int kv_head = p.kv_head_of(group);
    const uint64_t * visible = p.visible_of(group);
    const float root = 0.125f;  // of a bin, in log2 units
    // The lane's part of the queries, as the right operand wants it.
    float query[n_quad][n_tiles][8];
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
            for (int e = 0; e < 8; ++e) {
                query[z][t][e] = s.query[i][32 * t + e / 4 * 16 + lane % 4 * 4 + e % 4];
            }
        }
    }
    float lower[n_quad] = {};  // of query z * kQuad + lane % 4
    float key_norm = 0;
    int scanned = 0;
    bool failed = false;

    for (int block = p.n_blocks - 1 - (static_cast<int>(blockIdx.x) * kWarps + warp); block >= 0; block -= p.n_scan * kWarps) {
        const uint64_t seen = visible[block];
        if (seen == 0) {
            continue;
        }
        const int64_t slot = p.planes.slot(stream, kv_head, block);
        const uint64_t indexed = p.planes.indexed[slot];
        const uint64_t cells = seen & indexed;
        const uint64_t others = seen & ~indexed;
        if (others != 0) {
            add_exact(p, group, block, others, s, key_norm, failed);
            const bool complete = seen == ~uint64_t{0} || (block + 1 < p.n_blocks && visible[block + 1] != 0);
            if (lane == 0 && complete && (others & ~p.planes.not_finite[slot]) != 0 && atomicExch(&p.queued[slot], 1) == 0) {
                p.pending[atomicAdd(p.n_pending, 1)] = static_cast<int32_t>(slot);
            }
        }
        if (cells == 0) {
            continue;
        }
        const uint4 * codes = reinterpret_cast<const uint4 *>(p.planes.codes_of(slot)) + lane;
        // All of a block's codes are asked for before anything is done with them; with 8 tiles, half of them.
        constexpr int kAtOnce = n_tiles > 4 ? 2 : 4;
        uint4 loaded[kAtOnce][n_tiles];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
            for (int t = 0; t < n_tiles; ++t) {
                loaded[r][t] = load_codes(codes + (r * n_tiles + t) * 32);
            }
        }
        const BlockBounds bounds = p.planes.bounds[slot];
        key_norm = fmaxf(key_norm, bounds.key_norm);
        scanned += __popcll(static_cast<long long>(cells));
        const uint32_t mine = static_cast<uint32_t>(cells >> (lane / 4 * 8)) & 0xffu;  // the 8 cells of this lane's results

        uint32_t levels[n_quad][n_tiles][2];
        ToBin to[n_quad];
#pragma unroll
        for (int z = 0; z < n_quad; ++z) {
            to[z] = quantize<n_tiles>(query[z], norm[z], reference[z], p.planes.center_of(slot), p.planes.step_of(slot), bounds,
                                      p.planes.key_dim, p.to_log2, p.certified, levels[z]);
        }
        float places[n_quad][8];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            if (r == kAtOnce) {
#pragma unroll
                for (int ahead = 0; ahead < kAtOnce; ++ahead) {
#pragma unroll
                    for (int t = 0; t < n_tiles; ++t) {
                        loaded[ahead][t] = load_codes(codes + ((r + ahead) * n_tiles + t) * 32);
                    }
                }
            }
#pragma unroll
            for (int z = 0; z < n_quad; ++z) {
                int sum[4] = {};
#pragma unroll
                for (int t = 0; t < n_tiles; ++t) {
                    multiply_add(sum, loaded[r % kAtOnce][t], levels[z][t]);
                }
                places[z][2 * r] = static_cast<float>(256 * sum[0] + sum[1]);
                places[z][2 * r + 1] = static_cast<float>(256 * sum[2] + sum[3]);
            }
        }
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
            uint32_t packed[2] = {0, 0};
            float sum = 0;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float place = fmaf(places[z][e], scale, offset);
                const int bin = min(max(__float2int_rd(place), 0), kBins - 1);
                packed[e / 4] |= static_cast<uint32_t>(bin) << (e % 4 * 8);
                if ((mine >> e & 1) != 0) {
                    sum += exp2_fast((place - kReferenceBin) * root);
                    atomicAdd(&s.histogram[i][bin], 1u);
                }
            }
            // From upper to lower bounds: down by twice the slack.
            lower[z] += sum * exp2_fast(-2.0f * slack);
            failed = failed || !isfinite(lower[z]) || !isfinite(offset);
            const int64_t at = (static_cast<int64_t>(group) * p.n_shared + i) * p.n_blocks + block;
            *reinterpret_cast<uint2 *>(p.bins + at * kBlockCells + lane / 4 * 8) = make_uint2(packed[0], packed[1]);
            if (lane / 4 == 0) {
                p.slack[at] = slack;
            }
        }
    }

    // What the warps found, added in an order that does not depend on timing.
    if (__any_sync(~0u, failed)) {
        s.failed_late = 1;
    }
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
    __syncthreads();
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
        if (s.failed_late != 0) {
            p.attend_all[group] = 1;
        }
    }
    for (int i = 0; i < n_query; ++i) {
        for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kWarps * 32) {
            const uint32_t count = s.histogram[i][b];
            if (count != 0) {
                atomicAdd(&p.histogram[(static_cast<int64_t>(group) * p.n_shared + i) * kBins + b], count);
            }
        }
    }
}

template <int n_tiles, int n_quad> void launch(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_scan), static_cast<unsigned>(p.n_group));
    scan<n_tiles, n_quad><<<grid, kWarps * 32, sizeof(Shared), stream>>>(p);
    check(cudaGetLastError(), "launch_scan");
}

template <int n_tiles> void launch(const Problem & p, cudaStream_t stream) {
    p.n_shared <= kQuad ? launch<n_tiles, 1>(p, stream) : launch<n_tiles, 2>(p, stream);
}

}  // namespace

void launch_scan(const Problem & p, cudaStream_t stream) {
    switch (p.planes.n_tiles) {
        case 2: return launch<2>(p, stream);
        case 3: return launch<3>(p, stream);
        case 4: return launch<4>(p, stream);
        default: return launch<8>(p, stream);
    }
}

}  // namespace louver::cuda
