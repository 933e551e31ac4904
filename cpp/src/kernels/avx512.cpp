// AVX-512 with VNNI. Each function mirrors the one of the same name in scalar.cpp.
#include "kernels/tables.h"

#ifdef LOUVER_X86

#include <immintrin.h>

#include "kernels/bounds.h"
#include "kernels/kernels.h"
#include "kernels/rows.h"

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

constexpr bool is_quantized(DType type) { return type == DType::q8_0 || type == DType::q4_0; }

// Elements c to c + 31 of a quantized row, c a multiple of 32.
template <DType kType> inline void load_group(const std::byte * row, int c, __m512 * out) {
    const std::byte * group = row + static_cast<int64_t>(row_bytes(kType, c));
    uint16_t bits;
    __builtin_memcpy(&bits, group, sizeof(bits));
    const __m512 scale = _mm512_set1_ps(_cvtsh_ss(bits));
    const __m128i * levels = reinterpret_cast<const __m128i *>(group + 2);
    if constexpr (kType == DType::q8_0) {
        out[0] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(levels))));
        out[1] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(levels + 1))));
    } else {
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(levels));
        const __m512i low = _mm512_and_si512(both, _mm512_set1_epi32(15));
        const __m512i eight = _mm512_set1_epi32(8);
        out[0] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_sub_epi32(low, eight)));
        out[1] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(both, 4), eight)));
    }
}

// Elements c to c + 15 of a row.
template <DType kType> inline __m512 load_ps(const std::byte * row, int c) {
    if constexpr (kType == DType::f32) {
        return _mm512_loadu_ps(row + 4 * c);
    } else if constexpr (is_quantized(kType)) {
        __m512 group[2];
        load_group<kType>(row, c / 32 * 32, group);
        return group[c % 32 / kLanes];
    } else {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(row + 2 * c));
        return kType == DType::f16 ? _mm512_cvtph_ps(bits) : bf16_ps(bits);
    }
}

// The same where the row ends at dim < c + 16: what lies beyond is 0, and not read.
template <DType kType> inline __m512 load_tail_ps(const std::byte * row, int c, int dim) {
    if constexpr (kType == DType::f32) {
        return _mm512_maskz_loadu_ps(tail_mask(dim - c), row + 4 * c);
    } else if constexpr (is_quantized(kType)) {
        return load_ps<kType>(row, c);  // rows are whole groups of 32
    } else {
        const __m256i bits = _mm256_maskz_loadu_epi16(tail_mask(dim - c), row + 2 * c);
        return kType == DType::f16 ? _mm512_cvtph_ps(bits) : bf16_ps(bits);
    }
}

void rows_to_f32(const Rows & rows, const int32_t * cells, int n, float * out) {
    with_type(rows.type, [&]<DType kType>() {
        for (int i = 0; i < n; ++i) {
            const std::byte * row = rows.row(cells != nullptr ? cells[i] : i);
            int c = 0;
            for (; c + kLanes <= rows.dim; c += kLanes, out += kLanes) {
                _mm512_storeu_ps(out, load_ps<kType>(row, c));
            }
            if (c < rows.dim) {
                _mm512_storeu_ps(out, load_tail_ps<kType>(row, c, rows.dim));
                out += kLanes;
            }
        }
    });
}

inline __m256 fold(__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

// Lane i of the result is the sum of the lanes of v[i].
inline __m128 sums_of_4(const __m512 * v) {
    const __m256 a = fold(v[0]);
    const __m256 b = fold(v[1]);
    const __m256 c = fold(v[2]);
    const __m256 d = fold(v[3]);
    const __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    const __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
    const __m256 quad = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    return _mm_add_ps(_mm256_castps256_ps128(quad), _mm256_extractf128_ps(quad, 1));
}

// Heads that share each conversion of a row.
constexpr int kHeads = 4;

// Calls f with the number of heads left as a constant, kHeads at most, until all are done.
template <class F> inline void for_heads(int n_query, F && f) {
    for (int first = 0; first < n_query; first += kHeads) {
        switch (n_query - first) {
            case 1: f.template operator()<1>(first); break;
            case 2: f.template operator()<2>(first); break;
            case 3: f.template operator()<3>(first); break;
            default: f.template operator()<kHeads>(first); break;
        }
    }
}

// Keys that are worked on together: H heads' sums stay in registers.
constexpr int kKeys = 4;

template <DType kType, int H> inline void dots_heads(const float * query, const Rows & keys, const int32_t * cells, int n,
                                                     float * out, int64_t out_stride, Prefetcher prefetcher) {
    const int dim = keys.dim;
    const int dim_padded = padded(dim);
    const std::byte * base = keys.base;
    const int64_t stride = keys.stride;
    for (int i0 = 0; i0 < n; i0 += kKeys) {
        const std::byte * row[kKeys];
        const int count = n - i0 < kKeys ? n - i0 : kKeys;
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; ++i) {
            const int at = i < count ? i0 + i : i0;
            row[i] = base + (cells != nullptr ? cells[at] : at) * stride;
        }
        prefetcher.step();
        __m512 sum[H][kKeys];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
            for (int i = 0; i < kKeys; ++i) {
                sum[h][i] = _mm512_setzero_ps();
            }
        }
        const auto add = [&](int c, const __m512 * key) {
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                const __m512 q = _mm512_loadu_ps(query + h * dim_padded + c);
#pragma GCC unroll 4
                for (int i = 0; i < kKeys; ++i) {
                    sum[h][i] = _mm512_fmadd_ps(q, key[i], sum[h][i]);
                }
            }
        };
        if constexpr (is_quantized(kType)) {
            for (int c = 0; c < dim; c += 2 * kLanes) {
                __m512 group[kKeys][2];
                __m512 key[2][kKeys];
#pragma GCC unroll 4
                for (int i = 0; i < kKeys; ++i) {
                    load_group<kType>(row[i], c, group[i]);
                    key[0][i] = group[i][0];
                    key[1][i] = group[i][1];
                }
                add(c, key[0]);
                add(c + kLanes, key[1]);
            }
        } else {
            __m512 key[kKeys];
            int c = 0;
            for (; c + kLanes <= dim; c += kLanes) {
#pragma GCC unroll 4
                for (int i = 0; i < kKeys; ++i) {
                    key[i] = load_ps<kType>(row[i], c);
                }
                add(c, key);
            }
            if (c < dim) {
#pragma GCC unroll 4
                for (int i = 0; i < kKeys; ++i) {
                    key[i] = load_tail_ps<kType>(row[i], c, dim);
                }
                add(c, key);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            float * to = out + h * out_stride + i0;
            if (count == kKeys) {
                _mm_storeu_ps(to, sums_of_4(sum[h]));
            } else {
                _mm_mask_storeu_ps(to, static_cast<__mmask8>((1u << count) - 1u), sums_of_4(sum[h]));
            }
        }
    }
}

void dots(const float * query, int n_query, const Rows & keys, const int32_t * cells, int n, float * out, int64_t out_stride,
          const Ahead & ahead) {
    with_type(keys.type, [&]<DType kType>() {
        for_heads(n_query, [&]<int H>(int first) {
            dots_heads<kType, H>(query + first * padded(keys.dim), keys, cells, n, out + first * out_stride, out_stride,
                                 Prefetcher(first == 0 ? ahead : Ahead{}, (n + kKeys - 1) / kKeys));
        });
    });
}

void dots_f64(const double * query, const Rows & keys, const int32_t * cells, int n, double * score, double * magnitude) {
    with_type(keys.type, [&]<DType kType>() {
        for (int i = 0; i < n; ++i) {
            const std::byte * row = keys.row(cells != nullptr ? cells[i] : i);
            __m512d sum[2] = {};
            __m512d size[2] = {};
            const auto add = [&](int c, __m512 key) {
                const __m512d term0 = _mm512_mul_pd(_mm512_loadu_pd(query + c), _mm512_cvtps_pd(_mm512_castps512_ps256(key)));
                const __m512d term1 =
                    _mm512_mul_pd(_mm512_loadu_pd(query + c + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(key, 1)));
                sum[0] = _mm512_add_pd(sum[0], term0);
                sum[1] = _mm512_add_pd(sum[1], term1);
                size[0] = _mm512_add_pd(size[0], _mm512_abs_pd(term0));
                size[1] = _mm512_add_pd(size[1], _mm512_abs_pd(term1));
            };
            int c = 0;
            for (; c + kLanes <= keys.dim; c += kLanes) {
                add(c, load_ps<kType>(row, c));
            }
            if (c < keys.dim) {
                add(c, load_tail_ps<kType>(row, c, keys.dim));
            }
            score[i] = _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1]));
            magnitude[i] = _mm512_reduce_add_pd(_mm512_add_pd(size[0], size[1]));
        }
    });
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
        const __m512 y = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, x + i), s, t);
        // Above -infinity, whose fraction is not a number; max() with the operands in this order keeps a NaN.
        const __m512 p = _mm512_maskz_mov_ps(mask, exp2_ps(_mm512_max_ps(_mm512_set1_ps(-1000.0f), y)));
        _mm512_mask_storeu_ps(x + i, mask, p);
        sum = _mm512_add_ps(sum, p);
    }
    return _mm512_reduce_add_ps(sum);
}

// H heads by V vectors of the accumulator, from column c on, held in registers across all rows. kTail: the vector ends the row.
template <DType kType, int H, int V, bool kTail = false>
inline void accumulate_tile(const float * weight, int64_t weight_stride, const float * rescale, const Rows & values,
                            const int32_t * cells, int n, int c, float * acc, Prefetcher prefetcher) {
    const int dim_padded = padded(values.dim);
    __m512 sum[H][V];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            sum[h][v] = _mm512_mul_ps(_mm512_loadu_ps(acc + h * dim_padded + c + v * kLanes), _mm512_set1_ps(rescale[h]));
        }
    }
    for (int i = 0; i < n; ++i) {
        const std::byte * row = values.row(cells != nullptr ? cells[i] : i);
        prefetcher.step();
        __m512 value[V];
        if constexpr (is_quantized(kType) && V % 2 == 0) {
#pragma GCC unroll 2
            for (int v = 0; v < V; v += 2) {
                load_group<kType>(row, c + v * kLanes, value + v);
            }
        } else {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                value[v] = kTail ? load_tail_ps<kType>(row, c, values.dim) : load_ps<kType>(row, c + v * kLanes);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const __m512 w = _mm512_set1_ps(weight[h * weight_stride + i]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                sum[h][v] = _mm512_fmadd_ps(w, value[v], sum[h][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            _mm512_storeu_ps(acc + h * dim_padded + c + v * kLanes, sum[h][v]);
        }
    }
}

void accumulate(const float * weight, int64_t weight_stride, const float * rescale, int n_query, const Rows & values,
                const int32_t * cells, int n, float * acc, const Ahead & ahead) {
    const int dim_padded = padded(values.dim);
    with_type(values.type, [&]<DType kType>() {
        for_heads(n_query, [&]<int H>(int first) {
            const auto tile = [&]<int V, bool kTail>(int c) {
                accumulate_tile<kType, H, V, kTail>(weight + first * weight_stride, weight_stride, rescale + first, values, cells,
                                                    n, c, acc + first * dim_padded,
                                                    Prefetcher(first == 0 && c == 0 ? ahead : Ahead{}, n));
            };
            int c = 0;
            for (; c + 4 * kLanes <= values.dim; c += 4 * kLanes) {
                tile.template operator()<4, false>(c);
            }
            if (c + 2 * kLanes <= values.dim) {
                tile.template operator()<2, false>(c);
                c += 2 * kLanes;
            }
            if (c + kLanes <= values.dim) {
                tile.template operator()<1, false>(c);
                c += kLanes;
            }
            if (c < values.dim) {
                tile.template operator()<1, true>(c);
            }
        });
    });
}

double squared_norm(const float * row, int dim) {
    __m512d sum[2] = {};
    for (int c = 0; c < padded(dim); c += kLanes) {
        const __m512 x = _mm512_loadu_ps(row + c);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        sum[0] = _mm512_fmadd_pd(low, low, sum[0]);
        sum[1] = _mm512_fmadd_pd(high, high, sum[1]);
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1]));
}

void widen(const float * row, int dim, float * low, float * high) {
    for (int c = 0; c < padded(dim); c += kLanes) {
        const __m512 x = _mm512_loadu_ps(row + c);
        _mm512_storeu_ps(low + c, _mm512_min_ps(_mm512_loadu_ps(low + c), x));
        _mm512_storeu_ps(high + c, _mm512_max_ps(_mm512_loadu_ps(high + c), x));
    }
}

inline __m512d residual_of(__m256 key, __m256 center, __m256 step, __m256 level) {
    const __m512d decoded = _mm512_add_pd(_mm512_cvtps_pd(center), _mm512_mul_pd(_mm512_cvtps_pd(step), _mm512_cvtps_pd(level)));
    return _mm512_sub_pd(_mm512_cvtps_pd(key), decoded);
}

Encoding encode(const float * key, const uint16_t * center, const uint16_t * step, int dim, uint8_t * code) {
    const __m512 zero = _mm512_setzero_ps();
    __m512d residual_squared[2] = {};
    __m512i code_squared = _mm512_setzero_si512();
    for (int c = 0; c < padded(dim); c += kLanes) {
        const __mmask16 in = tail_mask(dim - c);
        const __m512 x = _mm512_loadu_ps(key + c);
        const __m512 middle = load_bf16(center + c);
        const __m512 width = load_bf16(step + c);
        const __mmask16 has_step = _mm512_cmp_ps_mask(width, zero, _CMP_GT_OQ);
        const __m512 level = _mm512_maskz_roundscale_ps(has_step, _mm512_div_ps(_mm512_sub_ps(x, middle), width),
                                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __mmask16 fits = _mm512_cmp_ps_mask(level, _mm512_set1_ps(-128.0f), _CMP_GE_OQ) &
                               _mm512_cmp_ps_mask(level, _mm512_set1_ps(127.0f), _CMP_LE_OQ) &
                               (has_step | _mm512_cmp_ps_mask(x, middle, _CMP_EQ_OQ));
        if ((fits & in) != in) {
            return {false, 0, 0};
        }
        const __m512i levels = _mm512_cvtps_epi32(level);
        const __m512i codes = _mm512_maskz_add_epi32(in, levels, _mm512_set1_epi32(128));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(code + c), _mm512_cvtepi32_epi8(codes));
        code_squared = _mm512_add_epi32(code_squared, _mm512_mullo_epi32(levels, levels));
        const __m512d low = residual_of(_mm512_castps512_ps256(x), _mm512_castps512_ps256(middle), _mm512_castps512_ps256(width),
                                        _mm512_castps512_ps256(level));
        const __m512d high = residual_of(_mm512_extractf32x8_ps(x, 1), _mm512_extractf32x8_ps(middle, 1),
                                         _mm512_extractf32x8_ps(width, 1), _mm512_extractf32x8_ps(level, 1));
        residual_squared[0] = _mm512_fmadd_pd(low, low, residual_squared[0]);
        residual_squared[1] = _mm512_fmadd_pd(high, high, residual_squared[1]);
    }
    return {true, _mm512_reduce_add_pd(_mm512_add_pd(residual_squared[0], residual_squared[1])),
            _mm512_reduce_add_epi32(code_squared)};
}

// The largest step of each channel over the blocks that have anything to scan.
void largest_steps(const ScanArgs & a, float * largest) {
    const int dim_padded = padded(a.dim);
    bool scans[kMaxRun];
    for (int b = 0; b < a.n_blocks; ++b) {
        uint64_t any = 0;
        for (int h = 0; h < a.n_query; ++h) {
            any |= a.cells_of(h, b);
        }
        scans[b] = any != 0;
    }
    for (int c = 0; c < dim_padded; c += kLanes) {
        __m512 most = _mm512_setzero_ps();
        for (int b = 0; b < a.n_blocks; ++b) {
            if (scans[b]) {
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

// The query of one head: all of it times the inverse of its quantum, and one block's levels, 256 * high + low.
struct BlockQuery {
    alignas(64) float scaled[kMaxDim];
    alignas(64) int8_t high[kMaxDim];
    alignas(64) int8_t low[kMaxDim];
};

// acc += codes (unsigned) . four levels (signed), the same four in each lane. Around the intrinsic GCC 12 copies every sum.
inline void add_dots(__m512i & acc, __m512i codes, const int8_t * levels) {
    struct Four {
        int8_t level[4];
    };
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*reinterpret_cast<const Four *>(levels)));
}

// 64 levels in four vectors to bytes, 256 * high + low, in their order; sum += 256 * the sums of high + those of low.
inline void split_levels(const __m512i * level, int8_t * high, int8_t * low, __m512i & sum_high, __m512i & sum_low) {
    // The packs work within 128 bits: groups of four channels stay whole and end up transposed.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i half = _mm512_set1_epi16(128);
    const __m512i byte = _mm512_set1_epi16(255);
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i a = _mm512_packs_epi32(level[0], level[1]);
    const __m512i b = _mm512_packs_epi32(level[2], level[3]);
    const __m512i h =
        _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8), _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
    const __m512i l = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));  // modulo 256
    sum_high = _mm512_dpbusd_epi32(sum_high, ones, h);
    sum_low = _mm512_dpbusd_epi32(sum_low, ones, l);
    _mm512_store_si512(high, _mm512_permutexvar_epi32(order, h));
    _mm512_store_si512(low, _mm512_permutexvar_epi32(order, l));
}

// Rounds H heads' queries for one block; returns their q.center - 128 * quantum * sum(levels), one lane each.
template <int H>
inline __m128 round_queries(const ScanArgs & a, int block, const float * query, const HeadBound * head, BlockQuery * out) {
    const int dim_padded = padded(a.dim);
    const uint16_t * center = a.center + static_cast<int64_t>(block) * dim_padded;
    const uint16_t * step = a.step + static_cast<int64_t>(block) * dim_padded;
    __m512 base[4];
    __m512i sum_high[H];
    __m512i sum_low[H];
#pragma GCC unroll 4
    for (__m512 & sum : base) {
        sum = _mm512_setzero_ps();
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        sum_high[h] = _mm512_setzero_si512();
        sum_low[h] = _mm512_setzero_si512();
    }
    for (int c0 = 0; c0 < dim_padded; c0 += 64) {
        const int vectors = dim_padded - c0 < 64 ? (dim_padded - c0) / kLanes : 4;
        __m512 s[4];
        __m512 m[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            s[v] = v < vectors ? load_bf16(step + c0 + v * kLanes) : _mm512_setzero_ps();
            m[v] = v < vectors ? load_bf16(center + c0 + v * kLanes) : _mm512_setzero_ps();
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            __m512i level[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                level[v] = _mm512_setzero_si512();
                if (v < vectors) {
                    const int c = c0 + v * kLanes;
                    level[v] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(out[h].scaled + c), s[v]));
                    base[h] = _mm512_fmadd_ps(_mm512_loadu_ps(query + h * dim_padded + c), m[v], base[h]);
                }
            }
            split_levels(level, out[h].high + c0, out[h].low + c0, sum_high[h], sum_low[h]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        const __m512i levels = _mm512_add_epi32(_mm512_slli_epi32(sum_high[h], 8), sum_low[h]);
        base[h] = _mm512_fnmadd_ps(_mm512_set1_ps(128.0f * head[h].quantum), _mm512_cvtepi32_ps(levels), base[h]);
    }
    return sums_of_4(base);
}

// The same for all keys of one head: one broadcast of the levels serves all of them.
inline void add_dots(__m512i & acc, __m512i codes, __m512i levels) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(levels));
}

inline __m512i four_levels(const int8_t * levels) {
    int32_t four;
    __builtin_memcpy(&four, levels, sizeof(four));
    return _mm512_set1_epi32(four);
}

// Vectors of keys at a time: all of a block for one head, half of it for more, so that the sums of four heads stay in registers.
template <int H> constexpr int kPart = H == 1 ? kBlockVectors : kBlockVectors / 2;

// Upper weights of H heads for kPart<H> vectors of keys of a block, to `out`; sum[h] += them.
template <int H> inline void scan_part(const uint8_t * codes, const uint8_t * next_codes, int groups, const BlockQuery * query,
                                       const ToWeight * to, const uint64_t * cells, int first_cell, float * out,
                                       int64_t out_stride, __m512 * sum) {
    __m512i high[H][kPart<H>];
    __m512i low[H][kPart<H>];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < kPart<H>; ++v) {
            high[h][v] = _mm512_setzero_si512();
            low[h][v] = _mm512_setzero_si512();
        }
    }
    for (int g = 0; g < groups; ++g) {
        __m512i code[kPart<H>];
#pragma GCC unroll 4
        for (int v = 0; v < kPart<H>; ++v) {
            code[v] = _mm512_loadu_si512(codes + (g * kBlockVectors + v) * 64);
            // The next block's: hardware prefetch ends with the page, which is about a block.
            _mm_prefetch(reinterpret_cast<const char *>(next_codes + (g * kBlockVectors + v) * 64), _MM_HINT_T1);
        }
        [[maybe_unused]] const __m512i one_high = four_levels(query[0].high + 4 * g);
        [[maybe_unused]] const __m512i one_low = four_levels(query[0].low + 4 * g);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
            for (int v = 0; v < kPart<H>; ++v) {
                if constexpr (H == 1) {
                    add_dots(high[h][v], code[v], one_high);
                    add_dots(low[h][v], code[v], one_low);
                } else {
                    add_dots(high[h][v], code[v], query[h].high + 4 * g);
                    add_dots(low[h][v], code[v], query[h].low + 4 * g);
                }
            }
        }
    }
    const __m512 most = _mm512_set1_ps(255.0f * kExponentUnit);  // the bits of infinity
    const __m512 least = _mm512_set1_ps((kMinLog2 + kExponentBias) * kExponentUnit);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        const __m512 fine = _mm512_set1_ps(to[h].scale);
        const __m512 coarse = _mm512_set1_ps(to[h].scale * 256.0f);
        const __m512 offset = _mm512_set1_ps(to[h].offset);
#pragma GCC unroll 4
        for (int v = 0; v < kPart<H>; ++v) {
            const __m512 partial = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[h][v]), fine, offset);
            const __m512 scaled = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[h][v]), coarse, partial);
            // min() with the operands in this order turns a NaN into infinity.
            const __m512i bits = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(scaled, most), least));
            const __mmask16 inside = static_cast<__mmask16>(cells[h] >> (first_cell + v * kLanes));
            const __m512 weight = _mm512_castsi512_ps(_mm512_maskz_mov_epi32(inside, bits));
            _mm512_storeu_ps(out + h * out_stride + v * kLanes, weight);
            sum[h] = _mm512_add_ps(sum[h], weight);
        }
    }
}

// Upper weights of H heads, from `first` on, for all blocks; the slacks; the lower bounds of the sums.
template <int H> void scan_heads(const ScanArgs & a, int first, const float * largest_step) {
    const int groups = (a.dim + 3) / 4;
    const int dim_padded = padded(a.dim);
    const float * query = a.query + first * dim_padded;
    HeadBound head[H];
    BlockQuery rounded[H];
    __m512 lower[H];
    for (int h = 0; h < H; ++h) {
        const float * q = query + h * dim_padded;
        const float largest = largest_scaled(q, largest_step, dim_padded);
        head[h] = head_bound(largest, a.query_norm[first + h], a.dim, a.to_log2, a.reference[first + h], a.certified);
        const __m512 inverse = _mm512_set1_ps(head[h].inverse);
        for (int c = 0; c < dim_padded; c += kLanes) {
            _mm512_store_ps(rounded[h].scaled + c, _mm512_mul_ps(_mm512_loadu_ps(q + c), inverse));
        }
        lower[h] = _mm512_setzero_ps();
    }
    for (int b = 0; b < a.n_blocks; ++b) {
        uint64_t cells[H];
        uint64_t any = 0;
        for (int h = 0; h < H; ++h) {
            cells[h] = a.cells_of(first + h, b);
            any |= cells[h];
        }
        float * out = a.weight + first * a.weight_stride + static_cast<int64_t>(b) * kBlockCells;
        if (any == 0) {
            for (int h = 0; h < H; ++h) {
                a.slack[(first + h) * a.slack_stride + b] = 0;
                for (int v = 0; v < kBlockVectors; ++v) {
                    _mm512_storeu_ps(out + h * a.weight_stride + v * kLanes, _mm512_setzero_ps());
                }
            }
            continue;
        }
        alignas(16) float base[4];
        _mm_store_ps(base, round_queries<H>(a, b, query, head, rounded));
        ToWeight to[H];
        float factor[H];
        for (int h = 0; h < H; ++h) {
            const float slack = cells[h] != 0 ? block_slack(head[h], a.bounds[b]) : 0.0f;
            a.slack[(first + h) * a.slack_stride + b] = slack;
            to[h] = to_weight(head[h], base[h], slack, a.dim, a.to_log2, a.reference[first + h]);
            factor[h] = lower_factor(slack);
        }
        const uint8_t * codes = a.codes + static_cast<int64_t>(b) * groups * 4 * kBlockCells;
        const uint8_t * next = b + 1 < a.n_blocks        ? codes + groups * 4 * kBlockCells
                               : a.next_codes != nullptr ? a.next_codes
                                                         : codes;
        __m512 sum[H];
#pragma GCC unroll 4
        for (__m512 & lane : sum) {
            lane = _mm512_setzero_ps();
        }
        for (int v = 0; v < kBlockVectors; v += kPart<H>) {
            scan_part<H>(codes + v * 64, next + v * 64, groups, rounded, to, cells, v * kLanes, out + v * kLanes, a.weight_stride,
                         sum);
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            lower[h] = _mm512_fmadd_ps(sum[h], _mm512_set1_ps(factor[h]), lower[h]);
        }
    }
    for (int h = 0; h < H; ++h) {
        a.lower[first + h] += static_cast<double>(_mm512_reduce_add_ps(lower[h]));
    }
}

// below[j] += the sum of the weights under candidate j, over the vectors at vector(0) to vector(count - 1).
template <class F> inline void add_below(int count, F && vector, const float * candidate, double * below) {
    constexpr int kTogether = 8;  // candidates, for the registers' sake
    for (int first = 0; first < kCandidates; first += kTogether) {
        __m512 threshold[kTogether];
        __m512 sum[kTogether];
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) {
            threshold[j] = _mm512_set1_ps(candidate[first + j]);
            sum[j] = _mm512_setzero_ps();
        }
        for (int i = 0; i < count; ++i) {
            const __m512 p = _mm512_loadu_ps(vector(i));
#pragma GCC unroll 8
            for (int j = 0; j < kTogether; ++j) {
                sum[j] = _mm512_mask_add_ps(sum[j], _mm512_cmp_ps_mask(p, threshold[j], _CMP_LT_OQ), sum[j], p);
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) {
            below[first + j] += static_cast<double>(_mm512_reduce_add_ps(sum[j]));
        }
    }
}

void scan(const ScanArgs & a) {
    alignas(64) float largest_step[kMaxDim];
    largest_steps(a, largest_step);
    for_heads(a.n_query, [&]<int H>(int first) { scan_heads<H>(a, first, largest_step); });
    static_assert(kBlockCells / kSampleStep == kLanes);
    for (int h = 0; h < a.n_query && a.below != nullptr; ++h) {
        const float * weight = a.weight + h * a.weight_stride;
        add_below(
            a.n_blocks, [weight](int b) { return weight + b * kBlockCells + sampled_cell(b); }, a.candidate,
            a.below + h * kCandidates);
    }
}

void sums_below(const float * weight, int64_t n, const float * candidate, double * below) {
    constexpr int64_t kRun = 512;  // weights summed in float32 before the sums go to float64
    for (int64_t start = 0; start < n; start += kRun) {
        const int64_t count = (n - start < kRun ? n - start : kRun) / kLanes;
        const float * run = weight + start;
        add_below(
            static_cast<int>(count), [run](int i) { return run + i * kLanes; }, candidate, below);
    }
}

// Which of a block's 64 weights reach the threshold.
inline uint64_t reaching(const float * weight, __m512 threshold) {
    uint64_t bits = 0;
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) {
        // Not less than: a NaN is kept.
        const __mmask16 reach = _mm512_cmp_ps_mask(_mm512_loadu_ps(weight + v * kLanes), threshold, _CMP_NLT_UQ);
        bits |= static_cast<uint64_t>(reach) << (v * kLanes);
    }
    return bits;
}

// The sums, lane by lane, of a block's weights outside of `kept`.
inline __m512 sum_outside(const float * weight, uint64_t kept) {
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) {
        const __mmask16 outside = static_cast<__mmask16>(~(kept >> (v * kLanes)));
        sum = _mm512_mask_add_ps(sum, outside, sum, _mm512_loadu_ps(weight + v * kLanes));
    }
    return sum;
}

void select(const SelectArgs & a) {
    constexpr int kTogether = 4;  // blocks whose sums are added up across lanes together
    for (int b0 = 0; b0 < a.n_blocks; b0 += kTogether) {
        const int count = a.n_blocks - b0 < kTogether ? a.n_blocks - b0 : kTogether;
        const float * weight = a.weight + static_cast<int64_t>(b0) * kBlockCells;
        for (int h = 0; h < a.n_query; ++h) {
            const __m512 threshold = _mm512_set1_ps(a.threshold[h]);
            for (int b = 0; b < count; ++b) {
                a.kept[b0 + b] |= reaching(weight + h * a.weight_stride + b * kBlockCells, threshold);
            }
        }
        for (int b = 0; b < count; ++b) {
            a.kept[b0 + b] &= a.visible[b0 + b];
        }
        for (int h = 0; h < a.n_query; ++h) {
            __m512 sum[kTogether];
#pragma GCC unroll 4
            for (int b = 0; b < kTogether; ++b) {
                const int block = b < count ? b : 0;
                sum[b] = sum_outside(weight + h * a.weight_stride + block * kBlockCells, a.kept[b0 + block]);
            }
            const __mmask8 valid = static_cast<__mmask8>((1u << count) - 1u);
            _mm_mask_storeu_ps(a.dropped + h * a.dropped_stride + b0, valid, sums_of_4(sum));
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

const Kernels kAvx512Kernels = {"avx512",     rows_to_f32, dots,   dots_f64, largest,    exp2_sum, accumulate,
                                squared_norm, widen,       encode, scan,     sums_below, select,   mask_to_bits};

}  // namespace louver

#endif
