// AVX-512 with VNNI. Each function mirrors the one of the same name in scalar.cpp.
#include "kernels/tables.h"

#ifdef LOUVER_X86

#include <immintrin.h>

#include "kernels/bounds.h"
#include "kernels/kernels.h"
#include "kernels/numeric.h"

namespace louver {
namespace {

constexpr int kLanes = 16;
constexpr int kBlockVectors = kBlockCells / kLanes;

// 2^x for x in [-126, 127], to 2^-21; minimax polynomial on [-1/2, 1/2] (Cephes, exp2f).
inline __m512 exp2_ps(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028550421e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

inline __mmask16 tail_mask(int n) { return n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1u); }

inline __m512 bf16_ps(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

inline __m512 load_bf16(const uint16_t * p) { return bf16_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }

// Elements c to c + 15 of a row that ends at dim; those beyond are 0.
template <DType kType> inline __m512 load_ps(const std::byte * row, int c, int dim) {
    const bool whole = c + kLanes <= dim;
    if constexpr (kType == DType::f32) {
        return whole ? _mm512_loadu_ps(row + 4 * c) : _mm512_maskz_loadu_ps(tail_mask(dim - c), row + 4 * c);
    } else if constexpr (kType == DType::q8_0) {
        const std::byte * group = row + c / 32 * 34;
        int16_t scale_bits;
        __builtin_memcpy(&scale_bits, group, sizeof(scale_bits));
        const __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(scale_bits));
        const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i *>(group + 2 + c % 32));
        return _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels)));
    } else {
        const __m256i bits = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(row + 2 * c))
                                   : _mm256_maskz_loadu_epi16(tail_mask(dim - c), row + 2 * c);
        return kType == DType::f16 ? _mm512_cvtph_ps(bits) : bf16_ps(bits);
    }
}

template <DType kType> void gather(const Rows & rows, const int32_t * cells, int n, float * out, const Ahead & ahead) {
    const int dim = rows.dim;
    const int bytes_ahead = static_cast<int>(row_bytes(ahead.rows.type, ahead.rows.dim));
    for (int i = 0; i < n; ++i) {
        if (i < ahead.n) {
            const std::byte * next = ahead.rows.row(ahead.cells[i]);
            for (int offset = 0; offset < bytes_ahead; offset += 64) {
                _mm_prefetch(reinterpret_cast<const char *>(next + offset), _MM_HINT_T1);
            }
        }
        const std::byte * row = rows.row(cells != nullptr ? cells[i] : i);
        for (int c = 0; c < dim; c += kLanes, out += kLanes) {
            _mm512_storeu_ps(out, load_ps<kType>(row, c, dim));
        }
    }
}

void rows_to_f32(const Rows & rows, const int32_t * cells, int n, float * out, const Ahead & ahead) {
    switch (rows.type) {
        case DType::f32: return gather<DType::f32>(rows, cells, n, out, ahead);
        case DType::f16: return gather<DType::f16>(rows, cells, n, out, ahead);
        case DType::bf16: return gather<DType::bf16>(rows, cells, n, out, ahead);
        case DType::q8_0: return gather<DType::q8_0>(rows, cells, n, out, ahead);
    }
}

// Lane i of the result is the sum of the lanes of v[i].
inline __m512 sums_of_16(const __m512 * v) {
    __m512 quad[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 * w = v + 4 * i;
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(w[0], w[1]), _mm512_unpackhi_ps(w[0], w[1]));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(w[2], w[3]), _mm512_unpackhi_ps(w[2], w[3]));
        const __m512d abd = _mm512_castps_pd(ab);
        const __m512d cdd = _mm512_castps_pd(cd);
        quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(abd, cdd)), _mm512_castpd_ps(_mm512_unpackhi_pd(abd, cdd)));
    }
    const __m512 s01 = _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
    const __m512 s23 = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(s01, s23, 0x88), _mm512_shuffle_f32x4(s01, s23, 0xdd));
}

// Lane i of the result is the sum of the lanes of v[i].
inline __m128 sums_of_4(const __m512 * v) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 quad = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 pair = _mm256_add_ps(_mm512_castps512_ps256(quad), _mm512_extractf32x8_ps(quad, 1));
    return _mm_add_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1));
}

void dots(const float * query, int n_query, const float * keys, int n, int dim_padded, float * out, int64_t out_stride) {
    for (int i0 = 0; i0 < n; i0 += kLanes) {
        const int count = n - i0 < kLanes ? n - i0 : kLanes;
        const float * tile = keys + static_cast<int64_t>(i0) * dim_padded;
        for (int h = 0; h < n_query; ++h) {
            const float * q = query + h * dim_padded;
            __m512 acc[kLanes];
            for (__m512 & lane : acc) {
                lane = _mm512_setzero_ps();
            }
            if (count == kLanes) {
                for (int c = 0; c < dim_padded; c += kLanes) {
                    const __m512 qc = _mm512_loadu_ps(q + c);
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; ++i) {
                        acc[i] = _mm512_fmadd_ps(qc, _mm512_loadu_ps(tile + i * dim_padded + c), acc[i]);
                    }
                }
            } else {
                for (int i = 0; i < count; ++i) {
                    for (int c = 0; c < dim_padded; c += kLanes) {
                        acc[i] = _mm512_fmadd_ps(_mm512_loadu_ps(q + c), _mm512_loadu_ps(tile + i * dim_padded + c), acc[i]);
                    }
                }
            }
            _mm512_mask_storeu_ps(out + h * out_stride + i0, tail_mask(count), sums_of_16(acc));
        }
    }
}

float largest(const float * x, int n) {
    __m512 most = _mm512_set1_ps(x[0]);
    __mmask16 unordered = 0;
    for (int i = 0; i < n; i += kLanes) {
        const __m512 v = _mm512_mask_loadu_ps(most, tail_mask(n - i), x + i);
        unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, v);
    }
    return unordered != 0 ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
}

float exp2_sum(float * x, int n, float scale, float shift) {
    const __m512 s = _mm512_set1_ps(scale);
    const __m512 t = _mm512_set1_ps(shift);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += kLanes) {
        const __mmask16 mask = tail_mask(n - i);
        const __m512 p = _mm512_maskz_mov_ps(mask, exp2_ps(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, x + i), s, t)));
        _mm512_mask_storeu_ps(x + i, mask, p);
        sum = _mm512_add_ps(sum, p);
    }
    return _mm512_reduce_add_ps(sum);
}

// H heads by V vectors of the accumulator held in registers across all rows.
template <int H, int V> inline void accumulate_tile(const float * weight, int64_t weight_stride, const float * rescale,
                                                    const float * values, int n, int dim_padded, float * acc) {
    __m512 sum[H][V];
    for (int h = 0; h < H; ++h) {
        for (int v = 0; v < V; ++v) {
            sum[h][v] = _mm512_mul_ps(_mm512_loadu_ps(acc + h * dim_padded + v * kLanes), _mm512_set1_ps(rescale[h]));
        }
    }
    for (int i = 0; i < n; ++i) {
        __m512 w[H];
        for (int h = 0; h < H; ++h) {
            w[h] = _mm512_set1_ps(weight[h * weight_stride + i]);
        }
        for (int v = 0; v < V; ++v) {
            const __m512 value = _mm512_loadu_ps(values + static_cast<int64_t>(i) * dim_padded + v * kLanes);
            for (int h = 0; h < H; ++h) {
                sum[h][v] = _mm512_fmadd_ps(w[h], value, sum[h][v]);
            }
        }
    }
    for (int h = 0; h < H; ++h) {
        for (int v = 0; v < V; ++v) {
            _mm512_storeu_ps(acc + h * dim_padded + v * kLanes, sum[h][v]);
        }
    }
}

template <int H> inline void accumulate_heads(const float * weight, int64_t weight_stride, const float * rescale,
                                              const float * values, int n, int dim_padded, float * acc) {
    int c = 0;
    for (; c + 4 * kLanes <= dim_padded; c += 4 * kLanes) {
        accumulate_tile<H, 4>(weight, weight_stride, rescale, values + c, n, dim_padded, acc + c);
    }
    for (; c < dim_padded; c += kLanes) {
        accumulate_tile<H, 1>(weight, weight_stride, rescale, values + c, n, dim_padded, acc + c);
    }
}

void accumulate(const float * weight, int64_t weight_stride, const float * rescale, int n_query, const float * values, int n,
                int dim_padded, float * acc) {
    int h = 0;
    for (; h + 4 <= n_query; h += 4) {
        accumulate_heads<4>(weight + h * weight_stride, weight_stride, rescale + h, values, n, dim_padded, acc + h * dim_padded);
    }
    weight += h * weight_stride;
    rescale += h;
    acc += h * dim_padded;
    switch (n_query - h) {
        case 3: accumulate_heads<3>(weight, weight_stride, rescale, values, n, dim_padded, acc); break;
        case 2: accumulate_heads<2>(weight, weight_stride, rescale, values, n, dim_padded, acc); break;
        case 1: accumulate_heads<1>(weight, weight_stride, rescale, values, n, dim_padded, acc); break;
        default: break;
    }
}

constexpr int kMaxDim = 1024;

// The query of one head, scaled by one block's steps and rounded to 256 * high + low.
struct BlockQuery {
    alignas(64) int8_t high[kMaxDim];
    alignas(64) int8_t low[kMaxDim];
};

// The largest step of each channel over the blocks that have anything to scan.
void largest_steps(const ScanArgs & a, float * largest) {
    const int dim_padded = padded(a.dim);
    for (int c = 0; c < dim_padded; c += kLanes) {
        __m512 most = _mm512_setzero_ps();
        for (int b = 0; b < a.n_blocks; ++b) {
            if (a.cells[b] != 0) {
                most = _mm512_max_ps(most, load_bf16(a.step + static_cast<int64_t>(b) * dim_padded + c));
            }
        }
        _mm512_store_ps(largest + c, most);
    }
}

float largest_scaled(const float * query, const float * steps, int dim_padded) {
    __m512 most = _mm512_setzero_ps();
    for (int c = 0; c < dim_padded; c += kLanes) {
        most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_mul_ps(_mm512_loadu_ps(query + c), _mm512_load_ps(steps + c))));
    }
    return _mm512_reduce_max_ps(most);
}

// Rounds H heads' queries for one block; returns their q.center - 128 * quantum * sum(levels), one lane each.
template <int H>
inline __m128 round_queries(const ScanArgs & a, int block, const float * query, const HeadBound * head, BlockQuery * out) {
    const int dim_padded = padded(a.dim);
    const uint16_t * center = a.center + static_cast<int64_t>(block) * dim_padded;
    const uint16_t * step = a.step + static_cast<int64_t>(block) * dim_padded;
    const __m512i half = _mm512_set1_epi32(128);
    __m512 base[4];
    __m512 inverse[H];
    __m512 recenter[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        inverse[h] = _mm512_set1_ps(head[h].inverse);
        recenter[h] = _mm512_set1_ps(128.0f * head[h].quantum);
    }
#pragma GCC unroll 4
    for (__m512 & sum : base) {
        sum = _mm512_setzero_ps();
    }
    for (int c = 0; c < dim_padded; c += kLanes) {
        const __m512 s = load_bf16(step + c);
        const __m512 m = load_bf16(center + c);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const __m512 x = _mm512_loadu_ps(query + h * dim_padded + c);
            const __m512i level =
                _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(x, s), inverse[h]));  // in this order nothing overflows
            base[h] = _mm512_fmadd_ps(x, m, base[h]);
            base[h] = _mm512_fnmadd_ps(recenter[h], _mm512_cvtepi32_ps(level), base[h]);
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(level, half), 8);
            _mm_store_si128(reinterpret_cast<__m128i *>(out[h].high + c), _mm512_cvtepi32_epi8(high));
            _mm_store_si128(reinterpret_cast<__m128i *>(out[h].low + c), _mm512_cvtepi32_epi8(level));  // modulo 256
        }
    }
    return sums_of_4(base);
}

// acc += codes (unsigned) . four levels (signed), the same four in each lane. Around the intrinsic GCC 12 copies every sum.
inline void add_dots(__m512i & acc, __m512i codes, const int8_t * levels) {
    struct Four {
        int8_t level[4];
    };
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*reinterpret_cast<const Four *>(levels)));
}

// Heads that are scanned together, so that each load of codes serves all of them.
constexpr int kScanHeads = 4;

// Half the block's keys at a time: then the sums of four heads stay in registers.
constexpr int kHalf = kBlockVectors / 2;

// Upper bounds of H heads on the scores of 32 keys of a block, in log2 units.
// Upper bounds of H heads on the scores of 32 keys of a block, in log2 units.
template <int H> inline void scan_half(const uint8_t * codes, int groups, const BlockQuery * query, const float * quantum,
                                       const float * offset, float * out, int64_t out_stride) {
    __m512i high[H][kHalf];
    __m512i low[H][kHalf];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 2
        for (int v = 0; v < kHalf; ++v) {
            high[h][v] = _mm512_setzero_si512();
            low[h][v] = _mm512_setzero_si512();
        }
    }
    for (int g = 0; g < groups; ++g) {
        __m512i code[kHalf];
#pragma GCC unroll 2
        for (int v = 0; v < kHalf; ++v) {
            code[v] = _mm512_loadu_si512(codes + (g * kBlockVectors + v) * 64);
            // The next block's: hardware prefetch ends with the page, which is about a block.
            _mm_prefetch(reinterpret_cast<const char *>(codes + ((groups + g) * kBlockVectors + v) * 64), _MM_HINT_T1);
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 2
            for (int v = 0; v < kHalf; ++v) {
                add_dots(high[h][v], code[v], query[h].high + 4 * g);
                add_dots(low[h][v], code[v], query[h].low + 4 * g);
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        const __m512 fine = _mm512_set1_ps(quantum[h]);
        const __m512 coarse = _mm512_set1_ps(quantum[h] * 256.0f);
#pragma GCC unroll 2
        for (int v = 0; v < kHalf; ++v) {
            const __m512 partial = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[h][v]), fine, _mm512_set1_ps(offset[h]));
            const __m512 score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[h][v]), coarse, partial);
            _mm512_storeu_ps(out + h * out_stride + v * kLanes, score);
        }
    }
}

// Upper bounds of H heads, from `first` on, on the scores of all blocks, to a.weight; and the slacks.
template <int H> void scan_heads(const ScanArgs & a, int first, const float * largest_step) {
    const int groups = (a.dim + 3) / 4;
    const int dim_padded = padded(a.dim);
    const float * query = a.query + first * dim_padded;
    HeadBound head[H];
    float quantum[H];
    for (int h = 0; h < H; ++h) {
        const float largest = largest_scaled(query + h * dim_padded, largest_step, dim_padded);
        head[h] = head_bound(largest, a.query_norm[first + h], a.dim, a.to_log2, a.reference[first + h], a.certified);
        quantum[h] = head[h].quantum * a.to_log2;
    }
    BlockQuery rounded[H];
    for (int b = 0; b < a.n_blocks; ++b) {
        if (a.cells[b] == 0) {
            for (int h = first; h < first + H; ++h) {
                a.slack[h * a.slack_stride + b] = 0;  // weigh() sets the weights to 0
            }
            continue;
        }
        alignas(16) float offset[4];
        _mm_store_ps(offset, round_queries<H>(a, b, query, head, rounded));
        for (int h = 0; h < H; ++h) {
            const float slack = block_slack(head[h], a.bounds[b]);
            a.slack[(first + h) * a.slack_stride + b] = slack;
            offset[h] = offset[h] * a.to_log2 - a.reference[first + h] + slack;
        }
        const uint8_t * codes = a.codes + static_cast<int64_t>(b) * groups * 4 * kBlockCells;
        float * out = a.weight + first * a.weight_stride + static_cast<int64_t>(b) * kBlockCells;
        scan_half<H>(codes, groups, rounded, quantum, offset, out, a.weight_stride);
        scan_half<H>(codes + kHalf * 64, groups, rounded, quantum, offset, out + kHalf * kLanes, a.weight_stride);
    }
}

// Scores of one head to weights, with the sums the oracle needs.
void weigh(const ScanArgs & a, int head) {
    __m512 candidate[kCandidates];
    __m512 below[kCandidates];
    for (int j = 0; j < kCandidates; ++j) {
        candidate[j] = _mm512_set1_ps(a.candidate[j]);
        below[j] = _mm512_setzero_ps();
    }
    __m512 lower = _mm512_setzero_ps();
    const __m512 least = _mm512_set1_ps(kMinLog2);
    for (int b = 0; b < a.n_blocks; ++b) {
        float * weight = a.weight + head * a.weight_stride + static_cast<int64_t>(b) * kBlockCells;
        const __m512 factor = _mm512_set1_ps(lower_factor(a.slack[head * a.slack_stride + b]));
        for (int v = 0; v < kBlockVectors; ++v) {
            const __mmask16 cells = static_cast<__mmask16>(a.cells[b] >> (v * kLanes));
            // max(score, least) with the operands in this order keeps a NaN.
            const __m512 p = _mm512_maskz_mov_ps(cells, exp2_ps(_mm512_max_ps(least, _mm512_loadu_ps(weight + v * kLanes))));
            _mm512_storeu_ps(weight + v * kLanes, p);
            lower = _mm512_fmadd_ps(p, factor, lower);
            for (int j = 0; j < kCandidates; ++j) {
                below[j] = _mm512_mask_add_ps(below[j], _mm512_cmp_ps_mask(p, candidate[j], _CMP_LT_OQ), below[j], p);
            }
        }
    }
    a.lower[head] += static_cast<double>(_mm512_reduce_add_ps(lower));
    for (int j = 0; j < kCandidates; ++j) {
        a.below[head * kCandidates + j] += static_cast<double>(_mm512_reduce_add_ps(below[j]));
    }
}

void scan(const ScanArgs & a) {
    alignas(64) float largest_step[kMaxDim];
    largest_steps(a, largest_step);
    for (int first = 0; first < a.n_query; first += kScanHeads) {
        switch (a.n_query - first) {
            case 1: scan_heads<1>(a, first, largest_step); break;
            case 2: scan_heads<2>(a, first, largest_step); break;
            case 3: scan_heads<3>(a, first, largest_step); break;
            default: scan_heads<4>(a, first, largest_step); break;
        }
    }
    for (int h = 0; h < a.n_query; ++h) {
        weigh(a, h);
    }
}

void sums_below(const float * weight, int64_t n, const float * candidate, double * below) {
    constexpr int64_t kRun = 512;  // weights summed in float32 before the sums go to float64
    __m512 threshold[kCandidates];
    for (int j = 0; j < kCandidates; ++j) {
        threshold[j] = _mm512_set1_ps(candidate[j]);
    }
    for (int64_t start = 0; start < n; start += kRun) {
        const int64_t end = start + kRun < n ? start + kRun : n;
        __m512 sum[kCandidates];
        for (__m512 & lane : sum) {
            lane = _mm512_setzero_ps();
        }
        for (int64_t i = start; i < end; i += kLanes) {
            const __m512 p = _mm512_loadu_ps(weight + i);
            for (int j = 0; j < kCandidates; ++j) {
                sum[j] = _mm512_mask_add_ps(sum[j], _mm512_cmp_ps_mask(p, threshold[j], _CMP_LT_OQ), sum[j], p);
            }
        }
        for (int j = 0; j < kCandidates; ++j) {
            below[j] += static_cast<double>(_mm512_reduce_add_ps(sum[j]));
        }
    }
}

void select(const float * weight, int64_t weight_stride, const float * threshold, int n_query, int n_blocks, uint64_t * kept) {
    for (int b = 0; b < n_blocks; ++b) {
        uint64_t bits = kept[b];
        for (int h = 0; h < n_query; ++h) {
            const __m512 t = _mm512_set1_ps(threshold[h]);
            const float * w = weight + h * weight_stride + static_cast<int64_t>(b) * kBlockCells;
            for (int v = 0; v < kBlockVectors; ++v) {
                // Not less than: a NaN is kept.
                const __mmask16 reach = _mm512_cmp_ps_mask(_mm512_loadu_ps(w + v * kLanes), t, _CMP_NLT_UQ);
                bits |= static_cast<uint64_t>(reach) << (v * kLanes);
            }
        }
        kept[b] = bits;
    }
}

void dropped_sums(const float * weight, int64_t weight_stride, int n_query, const uint64_t * kept, int n_blocks, float * out,
                  int64_t out_stride) {
    for (int h = 0; h < n_query; ++h) {
        for (int b = 0; b < n_blocks; ++b) {
            const float * w = weight + h * weight_stride + static_cast<int64_t>(b) * kBlockCells;
            __m512 sum = _mm512_setzero_ps();
            for (int v = 0; v < kBlockVectors; ++v) {
                const __mmask16 dropped = static_cast<__mmask16>(~(kept[b] >> (v * kLanes)));
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(dropped, w + v * kLanes));
            }
            out[h * out_stride + b] = _mm512_reduce_add_ps(sum);
        }
    }
}

bool mask_to_bits(const uint16_t * mask, int64_t n, uint64_t * bits) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    const __m512i hidden = _mm512_set1_epi16(static_cast<int16_t>(0xfc00));
    bool plain = true;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = 0;
        for (int half = 0; half < 2; ++half) {
            const int64_t left = n - i - 32 * half;
            const __mmask32 valid = left >= 32 ? ~__mmask32{0} : left <= 0 ? 0 : (__mmask32{1} << left) - 1;
            const __m512i m = _mm512_maskz_loadu_epi16(valid, mask + i + 32 * half);
            const __mmask32 visible = valid & _mm512_testn_epi16_mask(m, magnitude);
            plain = plain && (visible | (valid & _mm512_cmpeq_epi16_mask(m, hidden))) == valid;
            word |= static_cast<uint64_t>(visible) << (32 * half);
        }
        bits[i / 64] = word;
    }
    return plain;
}

}  // namespace

const Kernels kAvx512Kernels = {"avx512", rows_to_f32, dots,   largest,      exp2_sum,    accumulate,
                                scan,     sums_below,  select, dropped_sums, mask_to_bits};

}  // namespace louver

#endif
