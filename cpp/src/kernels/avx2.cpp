// AVX2 with FMA and F16C. Each function mirrors the one of the same name in scalar.cpp.
#include "kernels/tables.h"

#ifdef LOUVER_X86

#include <immintrin.h>

#include "kernels/bounds.h"
#include "kernels/kernels.h"
#include "kernels/rows.h"

namespace louver {
namespace {

constexpr int kLanes = 8;
constexpr int kBlockVectors = kBlockCells / kLanes;

// 2^x for x up to 127.99, to 2^-21, and infinity beyond; 0 under -126. Minimax polynomial on [-1/2, 1/2] (Cephes, exp2f).
inline __m256 exp2_ps(__m256 x) {
    const __m256 bounded = _mm256_min_ps(_mm256_set1_ps(128.0f), x);  // in this order a NaN stays one
    const __m256 whole = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(bounded, whole);
    __m256 p = _mm256_set1_ps(1.535336188319500e-4f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.339887440266574e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.618437357674640e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550332471162809e-2f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402264791363012e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931472028550421e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    // Into the exponent: 128 makes 1 infinity, and of a NaN it is 0.
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23));
    const __m256 normal = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm256_and_ps(_mm256_castsi256_ps(bits), normal);
}

// All bits of the first n lanes.
inline __m256i first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

// All bits of the lanes whose bit is set, of the lowest 8.
inline __m256 lanes_of(uint64_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits & 0xff));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, each), each));
}

inline __m128 fold(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

inline float sum_of(__m256 v) {
    const __m128 four = fold(v);
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest_of(__m256 v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Lane i of the result is the sum of the lanes of v[i].
inline __m128 sums_of_4(const __m256 * v) {
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return fold(halves);
}

inline __m256 load_bf16(const void * p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

inline __m256 scale_of(const std::byte * group) {
    int16_t bits;
    __builtin_memcpy(&bits, group, sizeof(bits));
    return _mm256_cvtph_ps(_mm_set1_epi16(bits));
}

// Elements c to c + 7 of a row.
template <DType kType> inline __m256 load_ps(const std::byte * row, int c) {
    if constexpr (kType == DType::f32) {
        return _mm256_loadu_ps(reinterpret_cast<const float *>(row + 4 * c));
    } else if constexpr (kType == DType::f16) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(row + 2 * c)));
    } else if constexpr (kType == DType::bf16) {
        return load_bf16(row + 2 * c);
    } else if constexpr (kType == DType::q8_0) {
        const std::byte * group = row + c / 32 * 34;
        const __m128i levels = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(group + 2 + c % 32));
        return _mm256_mul_ps(scale_of(group), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(levels)));
    } else {
        const std::byte * group = row + c / 32 * 18;
        const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(group + 2 + c % 16)));
        const __m256i level = _mm256_and_si256(_mm256_srl_epi32(both, _mm_cvtsi32_si128(c % 32 / 16 * 4)), _mm256_set1_epi32(15));
        return _mm256_mul_ps(scale_of(group), _mm256_cvtepi32_ps(_mm256_sub_epi32(level, _mm256_set1_epi32(8))));
    }
}

// The same where the row ends at dim < c + 8: what lies beyond is 0, and not read.
template <DType kType> inline __m256 load_tail_ps(const std::byte * row, int c, int dim) {
    if constexpr (kType == DType::q8_0 || kType == DType::q4_0) {
        return load_ps<kType>(row, c);  // rows are whole groups of 32: never called
    } else {
        constexpr size_t kBytes = row_bytes(kType, 1);
        std::byte last[kLanes * kBytes] = {};
        __builtin_memcpy(last, row + kBytes * static_cast<size_t>(c), kBytes * static_cast<size_t>(dim - c));
        return load_ps<kType>(last, 0);
    }
}

void rows_to_f32(const Rows & rows, const int32_t * cells, int n, float * out) {
    const int dim_padded = padded(rows.dim);
    with_type(rows.type, [&]<DType kType>() {
        for (int i = 0; i < n; ++i, out += dim_padded) {
            const std::byte * row = rows.row(cells != nullptr ? cells[i] : i);
            _mm256_storeu_ps(out + dim_padded - kLanes, _mm256_setzero_ps());
            int c = 0;
            for (; c + kLanes <= rows.dim; c += kLanes) {
                _mm256_storeu_ps(out + c, load_ps<kType>(row, c));
            }
            if (c < rows.dim) {
                _mm256_storeu_ps(out + c, load_tail_ps<kType>(row, c, rows.dim));
            }
        }
    });
}

// Calls f with a number of heads as a constant, kMost at most and about as many each time, until all are done.
template <int kMost, class F> inline void for_heads(int n_query, F && f) {
    static_assert(kMost <= 4);
    for (int first = 0; first < n_query;) {
        const int left = n_query - first;
        const int calls = (left + kMost - 1) / kMost;
        const int n = (left + calls - 1) / calls;
        switch (n) {
            case 1: f.template operator()<1>(first); break;
            case 2: f.template operator()<2>(first); break;
            case 3: f.template operator()<3>(first); break;
            default: f.template operator()<kMost>(first); break;
        }
        first += n;
    }
}

// Heads that share each conversion of a row, and keys that are worked on together: their sums take 12 of 16 registers.
constexpr int kHeads = 3;
constexpr int kKeys = 4;

template <DType kType, int H> inline void dots_heads(const float * query, const Rows & keys, const int32_t * cells, int n,
                                                     float * out, int64_t out_stride, Prefetcher prefetcher) {
    const int dim = keys.dim;
    const int dim_padded = padded(dim);
    for (int i0 = 0; i0 < n; i0 += kKeys) {
        const std::byte * row[kKeys];
        const int count = n - i0 < kKeys ? n - i0 : kKeys;
        for (int i = 0; i < kKeys; ++i) {
            const int at = i < count ? i0 + i : i0;
            row[i] = keys.row(cells != nullptr ? cells[at] : at);
        }
        prefetcher.step();
        __m256 sum[H][kKeys];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
            for (int i = 0; i < kKeys; ++i) {
                sum[h][i] = _mm256_setzero_ps();
            }
        }
        const auto add = [&](int c, auto && load) {
            __m256 q[H];
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                q[h] = _mm256_loadu_ps(query + h * dim_padded + c);
            }
#pragma GCC unroll 4
            for (int i = 0; i < kKeys; ++i) {
                const __m256 key = load(row[i]);
#pragma GCC unroll 4
                for (int h = 0; h < H; ++h) {
                    sum[h][i] = _mm256_fmadd_ps(q[h], key, sum[h][i]);
                }
            }
        };
        int c = 0;
        for (; c + kLanes <= dim; c += kLanes) {
            add(c, [c](const std::byte * at) { return load_ps<kType>(at, c); });
        }
        if (c < dim) {
            add(c, [c, dim](const std::byte * at) { return load_tail_ps<kType>(at, c, dim); });
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            float * to = out + h * out_stride + i0;
            const __m128 sums = sums_of_4(sum[h]);
            if (count == kKeys) {
                _mm_storeu_ps(to, sums);
            } else {  // (many cycles on some machines)
                _mm_maskstore_ps(to, _mm256_castsi256_si128(first_lanes(count)), sums);
            }
        }
    }
}

void dots(const float * query, int n_query, const Rows & keys, const int32_t * cells, int n, float * out, int64_t out_stride,
          const Ahead & ahead) {
    with_type(keys.type, [&]<DType kType>() {
        for_heads<kHeads>(n_query, [&]<int H>(int first) {
            dots_heads<kType, H>(query + first * padded(keys.dim), keys, cells, n, out + first * out_stride, out_stride,
                                 Prefetcher(first == 0 ? ahead : Ahead{}, (n + kKeys - 1) / kKeys));
        });
    });
}

inline double sum_of(__m256d v) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

void dots_f64(const double * query, const Rows & keys, const int32_t * cells, int n, double * score, double * magnitude) {
    with_type(keys.type, [&]<DType kType>() {
        const __m256d sign = _mm256_set1_pd(-0.0);
        for (int i = 0; i < n; ++i) {
            const std::byte * row = keys.row(cells != nullptr ? cells[i] : i);
            __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
            __m256d size[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
            const auto add = [&](int c, __m256 key) {
                const __m256d term0 = _mm256_mul_pd(_mm256_loadu_pd(query + c), _mm256_cvtps_pd(_mm256_castps256_ps128(key)));
                const __m256d term1 =
                    _mm256_mul_pd(_mm256_loadu_pd(query + c + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(key, 1)));
                sum[0] = _mm256_add_pd(sum[0], term0);
                sum[1] = _mm256_add_pd(sum[1], term1);
                size[0] = _mm256_add_pd(size[0], _mm256_andnot_pd(sign, term0));
                size[1] = _mm256_add_pd(size[1], _mm256_andnot_pd(sign, term1));
            };
            int c = 0;
            for (; c + kLanes <= keys.dim; c += kLanes) {
                add(c, load_ps<kType>(row, c));
            }
            if (c < keys.dim) {
                add(c, load_tail_ps<kType>(row, c, keys.dim));
            }
            score[i] = sum_of(_mm256_add_pd(sum[0], sum[1]));
            magnitude[i] = sum_of(_mm256_add_pd(size[0], size[1]));
        }
    });
}

double squared_norm(const float * row, int dim) {
    __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (int c = 0; c < padded(dim); c += kLanes) {
        const __m256 x = _mm256_loadu_ps(row + c);
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
        sum[0] = _mm256_fmadd_pd(low, low, sum[0]);
        sum[1] = _mm256_fmadd_pd(high, high, sum[1]);
    }
    return sum_of(_mm256_add_pd(sum[0], sum[1]));
}

void widen(const float * row, int dim, float * low, float * high) {
    for (int c = 0; c < padded(dim); c += kLanes) {
        const __m256 x = _mm256_loadu_ps(row + c);
        _mm256_storeu_ps(low + c, _mm256_min_ps(_mm256_loadu_ps(low + c), x));
        _mm256_storeu_ps(high + c, _mm256_max_ps(_mm256_loadu_ps(high + c), x));
    }
}

inline __m256d residual_of(__m128 key, __m128 center, __m128 step, __m128 level) {
    const __m256d decoded = _mm256_add_pd(_mm256_cvtps_pd(center), _mm256_mul_pd(_mm256_cvtps_pd(step), _mm256_cvtps_pd(level)));
    return _mm256_sub_pd(_mm256_cvtps_pd(key), decoded);
}

Encoding encode(const float * key, const uint16_t * center, const uint16_t * step, int dim, uint8_t * code) {
    const __m256 zero = _mm256_setzero_ps();
    __m256d residual_squared[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    __m256i code_squared = _mm256_setzero_si256();
    for (int c = 0; c < padded(dim); c += kLanes) {
        const __m256i in = first_lanes(dim - c);
        const __m256 x = _mm256_loadu_ps(key + c);
        const __m256 middle = load_bf16(center + c);
        const __m256 width = load_bf16(step + c);
        const __m256 has_step = _mm256_cmp_ps(width, zero, _CMP_GT_OQ);
        const __m256 quotient = _mm256_div_ps(_mm256_sub_ps(x, middle), width);
        const __m256 level = _mm256_and_ps(has_step, _mm256_round_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        const __m256 in_range = _mm256_and_ps(_mm256_cmp_ps(level, _mm256_set1_ps(-128.0f), _CMP_GE_OQ),
                                              _mm256_cmp_ps(level, _mm256_set1_ps(127.0f), _CMP_LE_OQ));
        const __m256 fits = _mm256_and_ps(in_range, _mm256_or_ps(has_step, _mm256_cmp_ps(x, middle, _CMP_EQ_OQ)));
        if (_mm256_movemask_ps(_mm256_andnot_ps(fits, _mm256_castsi256_ps(in))) != 0) {
            return {false, 0, 0};
        }
        const __m256i levels = _mm256_cvtps_epi32(level);
        const __m256i codes = _mm256_and_si256(in, _mm256_add_epi32(levels, _mm256_set1_epi32(128)));
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(code + c), _mm_packus_epi16(words, words));
        code_squared = _mm256_add_epi32(code_squared, _mm256_mullo_epi32(levels, levels));
        const __m256d low = residual_of(_mm256_castps256_ps128(x), _mm256_castps256_ps128(middle), _mm256_castps256_ps128(width),
                                        _mm256_castps256_ps128(level));
        const __m256d high = residual_of(_mm256_extractf128_ps(x, 1), _mm256_extractf128_ps(middle, 1),
                                         _mm256_extractf128_ps(width, 1), _mm256_extractf128_ps(level, 1));
        residual_squared[0] = _mm256_fmadd_pd(low, low, residual_squared[0]);
        residual_squared[1] = _mm256_fmadd_pd(high, high, residual_squared[1]);
    }
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(code_squared), _mm256_extracti128_si256(code_squared, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return {true, sum_of(_mm256_add_pd(residual_squared[0], residual_squared[1])),
            _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1)};
}

float largest(const float * x, int n) {
    __m256 most = _mm256_set1_ps(x[0]);
    __m256 unordered = _mm256_setzero_ps();
    for (int i = 0; i < n; i += kLanes) {
        const __m256i valid = first_lanes(n - i);
        const __m256 v = _mm256_blendv_ps(most, _mm256_maskload_ps(x + i, valid), _mm256_castsi256_ps(valid));
        unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        most = _mm256_max_ps(most, v);
    }
    return _mm256_movemask_ps(unordered) != 0 ? __builtin_nanf("") : largest_of(most);
}

float exp2_sum(float * x, int n, float scale, float shift) {
    const __m256 s = _mm256_set1_ps(scale);
    const __m256 t = _mm256_set1_ps(shift);
    __m256 sum = _mm256_setzero_ps();
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const __m256 p = exp2_ps(_mm256_fmsub_ps(_mm256_loadu_ps(x + i), s, t));
        _mm256_storeu_ps(x + i, p);
        sum = _mm256_add_ps(sum, p);
    }
    if (i < n) {
        const __m256i valid = first_lanes(n - i);
        const __m256 p = exp2_ps(_mm256_fmsub_ps(_mm256_maskload_ps(x + i, valid), s, t));
        _mm256_maskstore_ps(x + i, valid, p);
        sum = _mm256_add_ps(sum, _mm256_and_ps(p, _mm256_castsi256_ps(valid)));
    }
    return sum_of(sum);
}

// H heads by V vectors of the accumulator, from column c on, held in registers across all rows. kTail: the vector ends the row.
template <DType kType, int H, int V, bool kTail>
inline void accumulate_tile(const float * weight, int64_t weight_stride, const float * rescale, const Rows & values,
                            const int32_t * cells, int n, int c, float * acc, Prefetcher prefetcher) {
    const int dim_padded = padded(values.dim);
    __m256 sum[H][V];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            sum[h][v] = _mm256_mul_ps(_mm256_loadu_ps(acc + h * dim_padded + c + v * kLanes), _mm256_set1_ps(rescale[h]));
        }
    }
    for (int i = 0; i < n; ++i) {
        const std::byte * row = values.row(cells != nullptr ? cells[i] : i);
        prefetcher.step();
        __m256 w[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            w[h] = _mm256_set1_ps(weight[h * weight_stride + i]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const __m256 value = kTail ? load_tail_ps<kType>(row, c, values.dim) : load_ps<kType>(row, c + v * kLanes);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                sum[h][v] = _mm256_fmadd_ps(w[h], value, sum[h][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            _mm256_storeu_ps(acc + h * dim_padded + c + v * kLanes, sum[h][v]);
        }
    }
}

void accumulate(const float * weight, int64_t weight_stride, const float * rescale, int n_query, const Rows & values,
                const int32_t * cells, int n, float * acc, const Ahead & ahead) {
    const int dim = values.dim;
    with_type(values.type, [&]<DType kType>() {
        for_heads<kHeads>(n_query, [&]<int H>(int first) {
            int c = 0;
            const auto tile = [&]<int V, bool kTail = false>() {
                accumulate_tile<kType, H, V, kTail>(weight + first * weight_stride, weight_stride, rescale + first, values, cells,
                                                    n, c, acc + first * padded(dim),
                                                    Prefetcher(first == 0 && c == 0 ? ahead : Ahead{}, n));
                c += V * kLanes;
            };
            while (H == 1 && c + 8 * kLanes <= dim) {
                tile.template operator()<8>();
            }
            while (c + 4 * kLanes <= dim) {
                tile.template operator()<4>();
            }
            while (c + kLanes <= dim) {
                tile.template operator()<1>();
            }
            if (c < dim) {
                tile.template operator()<1, true>();
            }
        });
    });
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
        __m256 most = _mm256_setzero_ps();
        for (int b = 0; b < a.n_blocks; ++b) {
            if (scans[b]) {
                most = _mm256_max_ps(most, load_bf16(a.step + static_cast<int64_t>(b) * dim_padded + c));
            }
        }
        _mm256_store_ps(largest + c, most);
    }
}

float largest_scaled(const float * query, const float * steps, int dim_padded) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    for (int c = 0; c < dim_padded; c += kLanes) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(query + c), _mm256_load_ps(steps + c));
        most = _mm256_max_ps(most, _mm256_andnot_ps(sign, scaled));
    }
    return largest_of(most);
}

// The query of one head: all of it times the inverse of its quantum, and one block's levels, each four of them in the order
// 0, 2, 1, 3, in which the codes come apart.
struct BlockQuery {
    alignas(32) float scaled[kMaxDim];
    alignas(32) int16_t level[kMaxDim];
};

// Rounds H heads' queries for one block to levels; base[h]: q . center - 128 * quantum * sum(levels).
template <int H> inline void round_queries(const ScanArgs & a, int block, const float * query, const HeadBound * head,
                                           BlockQuery * out, float * base) {
    const int dim_padded = padded(a.dim);
    const uint16_t * center = a.center + static_cast<int64_t>(block) * dim_padded;
    const uint16_t * step = a.step + static_cast<int64_t>(block) * dim_padded;
    __m256 sum[H];
    __m256i levels[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        sum[h] = _mm256_setzero_ps();
        levels[h] = _mm256_setzero_si256();
    }
    for (int c = 0; c < dim_padded; c += 2 * kLanes) {
        const __m256 s0 = load_bf16(step + c);
        const __m256 s1 = load_bf16(step + c + kLanes);
        const __m256 m0 = load_bf16(center + c);
        const __m256 m1 = load_bf16(center + c + kLanes);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const float * q = query + h * dim_padded + c;
            sum[h] = _mm256_fmadd_ps(_mm256_loadu_ps(q), m0, sum[h]);
            sum[h] = _mm256_fmadd_ps(_mm256_loadu_ps(q + kLanes), m1, sum[h]);
            const __m256i l0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(out[h].scaled + c), s0));
            const __m256i l1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(out[h].scaled + c + kLanes), s1));
            levels[h] = _mm256_add_epi32(levels[h], _mm256_add_epi32(l0, l1));
            // The pack works within 128 bits: fours stay whole and end up as 0, 2, 1, 3.
            const __m256i fours = _mm256_permute4x64_epi64(_mm256_packs_epi32(l0, l1), _MM_SHUFFLE(3, 1, 2, 0));
            const __m256i even_first =
                _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(fours, _MM_SHUFFLE(3, 1, 2, 0)), _MM_SHUFFLE(3, 1, 2, 0));
            _mm256_store_si256(reinterpret_cast<__m256i *>(out[h].level + c), even_first);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        base[h] = sum_of(_mm256_fnmadd_ps(_mm256_set1_ps(128.0f * head[h].quantum), _mm256_cvtepi32_ps(levels[h]), sum[h]));
    }
}

// Two levels, the same in each lane.
inline __m256i level_pair(const int16_t * levels) {
    int32_t both;
    __builtin_memcpy(&both, levels, sizeof(both));
    return _mm256_set1_epi32(both);
}

// An integer dot product's terms are at most 255 * 32512: the sum of those of this many groups of four channels fits an int32.
constexpr int kExactGroups = 64;
static_assert(int64_t{255} * static_cast<int64_t>(kQueryLevels) * 4 * kExactGroups <= INT32_MAX);

// Upper weights of H heads for V vectors of a block's keys, to `out`; sum[h] += them.
template <int H, int V> inline void scan_keys(const uint8_t * codes, const uint8_t * next_codes, int groups,
                                              const BlockQuery * query, const ToWeight * to, const uint64_t * cells,
                                              int first_cell, float * out, int64_t out_stride, __m256 * sum) {
    __m256 dot[H][V];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            dot[h][v] = _mm256_setzero_ps();
        }
    }
    const __m256i low_byte = _mm256_set1_epi16(0xff);
    for (int g0 = 0; g0 < groups; g0 += kExactGroups) {
        const int end = groups - g0 < kExactGroups ? groups : g0 + kExactGroups;
        __m256i exact[H][V];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                exact[h][v] = _mm256_setzero_si256();
            }
        }
        for (int g = g0; g < end; ++g) {
            const int64_t at = int64_t{g} * 4 * kBlockCells;
#pragma GCC unroll 4
            for (int v = 0; v < V; v += 2) {
                // The next block's: hardware prefetch ends with the page, which is about a block.
                _mm_prefetch(reinterpret_cast<const char *>(next_codes + at + v * 32), _MM_HINT_T1);
            }
            __m256i even[V];
            __m256i odd[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes + at + v * 32));
                even[v] = _mm256_and_si256(four, low_byte);
                odd[v] = _mm256_srli_epi16(four, 8);
            }
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                const __m256i level_even = level_pair(query[h].level + 4 * g);
                const __m256i level_odd = level_pair(query[h].level + 4 * g + 2);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) {
                    exact[h][v] = _mm256_add_epi32(exact[h][v], _mm256_madd_epi16(even[v], level_even));
                    exact[h][v] = _mm256_add_epi32(exact[h][v], _mm256_madd_epi16(odd[v], level_odd));
                }
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                dot[h][v] = _mm256_add_ps(dot[h][v], _mm256_cvtepi32_ps(exact[h][v]));
            }
        }
    }
    const __m256 most = _mm256_set1_ps(255.0f * kExponentUnit);  // the bits of infinity
    const __m256 least = _mm256_set1_ps((kMinLog2 + kExponentBias) * kExponentUnit);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        const __m256 scale = _mm256_set1_ps(to[h].scale);
        const __m256 offset = _mm256_set1_ps(to[h].offset);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const __m256 scaled = _mm256_fmadd_ps(dot[h][v], scale, offset);
            // min() with the operands in this order turns a NaN into infinity.
            const __m256i bits = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(scaled, most), least));
            const __m256 inside = lanes_of(cells[h] >> (first_cell + v * kLanes));
            const __m256 weight = _mm256_and_ps(inside, _mm256_castsi256_ps(bits));
            _mm256_storeu_ps(out + h * out_stride + v * kLanes, weight);
            sum[h] = _mm256_add_ps(sum[h], weight);
        }
    }
}

// Upper weights of H heads, from `first` on, for all blocks; the slacks; the lower bounds of the sums.
template <int H> void scan_heads(const ScanArgs & a, int first, const float * largest_step) {
    constexpr int V = H == 1 ? 8 : 2;  // so that all sums stay in registers
    const int groups = (a.dim + 3) / 4;
    const int dim_padded = padded(a.dim);
    const float * query = a.query + first * dim_padded;
    HeadBound head[H];
    BlockQuery rounded[H];
    __m256 lower[H];
    for (int h = 0; h < H; ++h) {
        const float * q = query + h * dim_padded;
        const float largest = largest_scaled(q, largest_step, dim_padded);
        head[h] = head_bound(largest, a.query_norm[first + h], a.dim, a.to_log2, a.reference[first + h], a.certified);
        const __m256 inverse = _mm256_set1_ps(head[h].inverse);
        for (int c = 0; c < dim_padded; c += kLanes) {
            _mm256_store_ps(rounded[h].scaled + c, _mm256_mul_ps(_mm256_loadu_ps(q + c), inverse));
        }
        lower[h] = _mm256_setzero_ps();
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
                    _mm256_storeu_ps(out + h * a.weight_stride + v * kLanes, _mm256_setzero_ps());
                }
            }
            continue;
        }
        float base[H];
        round_queries<H>(a, b, query, head, rounded, base);
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
        __m256 sum[H];
#pragma GCC unroll 4
        for (__m256 & lane : sum) {
            lane = _mm256_setzero_ps();
        }
        for (int cell = 0; cell < kBlockCells; cell += V * kLanes) {
            scan_keys<H, V>(codes + cell * 4, next + cell * 4, groups, rounded, to, cells, cell, out + cell, a.weight_stride,
                            sum);
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            lower[h] = _mm256_fmadd_ps(sum[h], _mm256_set1_ps(factor[h]), lower[h]);
        }
    }
    for (int h = 0; h < H; ++h) {
        a.lower[first + h] += static_cast<double>(sum_of(lower[h]));
    }
}

// below[j] += the sum of the n weights, 64 at most, that are under candidate j. A candidate per lane.
inline void add_below(const float * weight, int n, const float * candidate, double * below) {
    for (int first = 0; first < kCandidates; first += 2 * kLanes) {
        const __m256 threshold[2] = {_mm256_loadu_ps(candidate + first), _mm256_loadu_ps(candidate + first + kLanes)};
        __m256 sum[2][2] = {{_mm256_setzero_ps(), _mm256_setzero_ps()}, {_mm256_setzero_ps(), _mm256_setzero_ps()}};
        for (int i = 0; i < n; i += 2) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const __m256 p = _mm256_broadcast_ss(weight + i + k);
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) {
                    sum[k][j] = _mm256_add_ps(sum[k][j], _mm256_and_ps(p, _mm256_cmp_ps(p, threshold[j], _CMP_LT_OQ)));
                }
            }
        }
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m256 both = _mm256_add_ps(sum[0][j], sum[1][j]);
            double * to = below + first + j * kLanes;
            _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), _mm256_cvtps_pd(_mm256_castps256_ps128(both))));
            _mm256_storeu_pd(to + 4, _mm256_add_pd(_mm256_loadu_pd(to + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(both, 1))));
        }
    }
}

void scan(const ScanArgs & a) {
    alignas(32) float largest_step[kMaxDim];
    largest_steps(a, largest_step);
    for_heads<4>(a.n_query, [&]<int H>(int first) { scan_heads<H>(a, first, largest_step); });
    for (int h = 0; h < a.n_query && a.below != nullptr; ++h) {
        const float * weight = a.weight + h * a.weight_stride;
        for (int b = 0; b < a.n_blocks; ++b) {
            add_below(weight + b * kBlockCells + sampled_cell(b), kBlockCells / kSampleStep, a.candidate,
                      a.below + h * kCandidates);
        }
    }
}

void sums_below(const float * weight, int64_t n, const float * candidate, double * below) {
    for (int64_t i = 0; i < n; i += kBlockCells) {
        add_below(weight + i, kBlockCells, candidate, below);
    }
}

void select(const SelectArgs & a) {
    for (int b = 0; b < a.n_blocks; ++b) {
        const float * weight = a.weight + static_cast<int64_t>(b) * kBlockCells;
        uint64_t bits = a.kept[b];
        for (int h = 0; h < a.n_query; ++h) {
            const __m256 threshold = _mm256_set1_ps(a.threshold[h]);
            const float * w = weight + h * a.weight_stride;
#pragma GCC unroll 8
            for (int v = 0; v < kBlockVectors; ++v) {
                // Not less than: a NaN is kept.
                const __m256 reaches = _mm256_cmp_ps(_mm256_loadu_ps(w + v * kLanes), threshold, _CMP_NLT_UQ);
                bits |= static_cast<uint64_t>(_mm256_movemask_ps(reaches)) << (v * kLanes);
            }
        }
        bits &= a.visible[b];
        a.kept[b] = bits;
        for (int h = 0; h < a.n_query; ++h) {
            const float * w = weight + h * a.weight_stride;
            __m256 sum = _mm256_setzero_ps();
#pragma GCC unroll 8
            for (int v = 0; v < kBlockVectors; ++v) {
                sum = _mm256_add_ps(sum, _mm256_andnot_ps(lanes_of(bits >> (v * kLanes)), _mm256_loadu_ps(w + v * kLanes)));
            }
            a.dropped[h * a.dropped_stride + b] = sum_of(sum);
        }
    }
}

// A bit for each of 32 numbers of 16 bits of which all are set.
inline uint32_t bits_of_32(__m256i first, __m256i second) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), _MM_SHUFFLE(3, 1, 2, 0));
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

bool mask_to_bits(const uint16_t * mask, int64_t n, uint64_t * bits) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    const __m256i hidden = _mm256_set1_epi16(static_cast<int16_t>(0xfc00));
    __m256i plain = _mm256_set1_epi8(-1);
    for (int64_t i = 0; i < n; i += kBlockCells) {
        uint16_t last[kBlockCells];
        const uint16_t * block = mask + i;
        if (n - i < kBlockCells) {  // beyond the end all are hidden
            for (int k = 0; k < kBlockCells; ++k) {
                last[k] = k < n - i ? block[k] : 0xfc00;
            }
            block = last;
        }
        __m256i visible[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const __m256i m = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(block + 16 * v));
            visible[v] = _mm256_cmpeq_epi16(_mm256_and_si256(m, magnitude), _mm256_setzero_si256());
            plain = _mm256_and_si256(plain, _mm256_or_si256(visible[v], _mm256_cmpeq_epi16(m, hidden)));
        }
        bits[i / kBlockCells] = bits_of_32(visible[0], visible[1]) | uint64_t{bits_of_32(visible[2], visible[3])} << 32;
    }
    return _mm256_movemask_epi8(plain) == -1;
}

}  // namespace

const Kernels kAvx2Kernels = {"avx2",       rows_to_f32, dots,   dots_f64, largest,    exp2_sum, accumulate,
                              squared_norm, widen,       encode, scan,     sums_below, select,   mask_to_bits};

}  // namespace louver

#endif
