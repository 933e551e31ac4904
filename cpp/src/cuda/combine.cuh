// The parts of a query together, its certificate and its counts; and the blocks that the scan found complete and not indexed,
// which the next step scans.
#pragma once

#include "cuda/certify.cuh"
#include "cuda/encode.cuh"

namespace louver::cuda {

inline constexpr int kAttendWarps = 8;
inline constexpr int kEncoders = 16;  // thread blocks
// Of the visible keys: above it a head is cheaper without a scan, which reads about a quarter of what dense attention reads.
inline constexpr double kUniformShare = 0.6;
inline constexpr uint8_t kStepsWithoutScan = 31;

__device__ inline void raise(double * most, double value) {  // of non-negative doubles, whose bits rise with them
    atomicMax(reinterpret_cast<unsigned long long *>(most), static_cast<unsigned long long>(__double_as_longlong(value)));
}

__device__ __forceinline__ double power_of_two(int exponent) {
    return __longlong_as_double(static_cast<long long>(1023 + exponent) << 52);
}

// What the kernels before left of a query, by a warp: everything is under way at once, and added up when it is needed.
struct Left {
    static constexpr int kAtOnce = 2;  // parts to a lane

    int threshold;
    int n_visible;
    bool gave_up;
    uint8_t without_scan;
    float reference;
    float query_norm;
    double least;
    double dropped = 0;
    double compensation = 0;
    float key_norm = 0;
    float value_norm = 0;
    int scanned = 0;

    __device__ __forceinline__ Left(const Problem & p, int group, int i) {
        const int query = group * p.n_shared + i;
        threshold = p.threshold[query];
        n_visible = p.sight[p.row_of_group(group)].n_visible;
        gave_up = p.attend_all[group] != 0;
        without_scan = p.spares_uniform ? *p.uniform_of(group) : uint8_t{0};
        reference = p.reference[query];
        query_norm = p.query_norm[query];
        least = p.least[query];
        add(p, group, i, 0);
    }

    // Parts [first, first + 32 * kAtOnce). Where there is none, another is read and not taken.
    __device__ __forceinline__ void add(const Problem & p, int group, int i, int first) {
        float parts[kAtOnce][4];
        int counts[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int at = first + 32 * k + static_cast<int>(threadIdx.x) % 32;
            const int64_t selected = static_cast<int64_t>(group) * p.n_select + min(at, p.n_select - 1);
            const int of_scan = group * p.n_scan + min(at, p.n_scan - 1);
            parts[k][0] = p.dropped[selected * p.n_shared + i];
            parts[k][1] = p.compensation[selected * p.n_shared + i];
            parts[k][2] = p.value_norm[selected];
            parts[k][3] = p.key_norm[of_scan];
            counts[k] = p.scanned[of_scan];
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int at = first + 32 * k + static_cast<int>(threadIdx.x) % 32;
            const bool selected = at < p.n_select;
            dropped += selected ? static_cast<double>(parts[k][0]) : 0.0;
            compensation += selected ? static_cast<double>(parts[k][1]) : 0.0;
            value_norm = fmaxf(value_norm, selected ? parts[k][2] : 0.0f);
            key_norm = fmaxf(key_norm, at < p.n_scan ? parts[k][3] : 0.0f);
            scanned += at < p.n_scan ? counts[k] : 0;
        }
    }

    __device__ __forceinline__ void end(const Problem & p, int group, int i) {
        for (int first = 32 * kAtOnce; first < max(p.n_select, p.n_scan); first += 32 * kAtOnce) {
            add(p, group, i, first);
        }
        dropped = sum_of_warp(dropped);
        compensation = sum_of_warp(compensation);
        key_norm = largest_of_warp(key_norm);
        value_norm = largest_of_warp(value_norm);
        scanned = __reduce_add_sync(~0u, scanned);
        if (threshold == kAttendAll) {  // nothing was scanned, or not to the end
            dropped = compensation = 0;
            key_norm = value_norm = 0;
            scanned = 0;
        }
    }
};

// What the shares of a query kept, in the unit 2^peak.
struct Kept {
    double sum = 0;
    double unit;          // where it is out of range nothing is said of what was dropped, or it counts for less than it is
    double compensation;  // in the same unit

    __device__ __forceinline__ Kept(const double (*of_warps)[kMaxShared], int i, float peak, const Left & left) {
        const int exponent = peak == -infinity() ? 0 : static_cast<int>(fminf(fmaxf(peak, -1000.0f), 1000.0f));
        unit = power_of_two(exponent);
        compensation = left.compensation * power_of_two(-exponent);
#pragma unroll
        for (int w = 0; w < kAttendWarps; ++w) {
            sum += of_warps[w][i];
        }
    }
};

// A query's output, by a warp: sums [kAttendWarps] `stride` floats apart. Returns its squared norm.
template <int n_channels> __device__ __forceinline__ float write_output(const Problem & p, int group, int i, const Kept & kept,
                                                                        const float * sums, int stride) {
    constexpr int kQuads = (n_channels + 127) / 128;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const double mass = kept.sum + kept.compensation;
    const float inverse = mass > 0 || isnan(mass) ? 1.0f / static_cast<float>(mass) : 0.0f;  // no visible cell: 0, as stock
    float squared = 0;
    float * output = p.output_of(group, i);
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
        if (const int c = j * 128 + lane * 4; c < p.values.dim) {
            float out[4] = {};
#pragma unroll
            for (int w = 0; w < kAttendWarps; ++w) {
                const float4 x = *reinterpret_cast<const float4 *>(sums + w * stride + c);
                out[0] += x.x;
                out[1] += x.y;
                out[2] += x.z;
                out[3] += x.w;
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                out[e] *= inverse;
                output[c + e] = out[e];
                squared = fmaf(out[e], out[e], squared);
            }
        }
    }
    return sum_of_warp(squared);
}

// The certificate, but for the output's norm. By a warp, the same in all lanes.
struct Certified {
    HeadCertificate certificate;
    float bound = 0;  // of the output's error, relative to the values' and the output's norm

    __device__ __forceinline__ Certified(const Problem & p, const Kept & kept, const Left & left, int n_attended) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const bool all = left.threshold == kAttendAll;
        certificate.tau = all ? -infinity() : tau_of(left.threshold, left.reference, p.to_log2);
        certificate.n_visible = left.n_visible;
        certificate.n_scanned = left.scanned;
        certificate.n_attended = n_attended;
        if (all || !(left.dropped > 0)) {
            return;
        }
        // The attended cells' exact weights came from float32 scores; the mass proper is at least this. And it is what the
        // dropped cells leave of the oracle's bound.
        const double error = score_error(left.query_norm, left.key_norm, p.keys.dim, p.to_log2);
        const double scored = kept.sum * kept.unit * fmax(1.0 - 0.6931472 * error, 0.0);  // 2^-error is no less
        const double rest = left.least * (1.0 - kWeightError) - left.dropped * (1.0 + kWeightError);
        const double least = fmax(scored, rest);
        const double upper = left.dropped * (1.0 + kWeightError);
        const double added = left.compensation * (1.0 + kWeightError);
        // Three quotients, a lane to each: one after another they take a microsecond.
        const double above = lane == 0 ? upper : lane == 1 ? added + upper : added;
        const double below = lane == 0   ? upper + fmax(least, 0.0) * (1.0 - kWeightError)
                             : lane == 1 ? least + upper
                                         : fmax(least, 1e-300);
        const double quotient = above / below * (1 + 0x1p-20);
        const double share = __shfl_sync(~0u, quotient, 0);
        certificate.delta = static_cast<float>(fmin(share, static_cast<double>(p.epsilon) * (1.0 - kWeightError)));
        bound = static_cast<float>(fmax(__shfl_sync(~0u, quotient, 1), __shfl_sync(~0u, quotient, 2))) * kNormInflation;
    }
};

// The rest of it and the counts, by a thread.
__device__ __forceinline__ void write_certificate(const Problem & p, int group, int i, Certified & certified, const Left & left,
                                                  float squared) {
    HeadCertificate & certificate = certified.certificate;
    const int query = group * p.n_shared + i;
    const int row = p.row_of_group(group);
    const bool all = left.threshold == kAttendAll;
    if (certified.bound != 0) {  // NaN stays NaN
        certificate.error_bound = (left.value_norm + sqrtf(squared)) * kNormInflation * certified.bound;
    }
    p.certificates[static_cast<int64_t>(row) * p.n_head + p.head_of(group, i)] = certificate;

    Totals & totals = *p.totals;
    atomicAdd(&totals.queries, 1ull);
    atomicAdd(&totals.visible, static_cast<unsigned long long>(certificate.n_visible));
    atomicAdd(&totals.scanned, static_cast<unsigned long long>(left.scanned));
    atomicAdd(&totals.attended, static_cast<unsigned long long>(certificate.n_attended));
    atomicAdd(&totals.delta_sum, static_cast<double>(certificate.delta));
    raise(&totals.delta_max, static_cast<double>(certificate.delta));
    raise(&totals.error_bound_max, static_cast<double>(certificate.error_bound));
    if (p.check) {
        double * truth = p.check_sums + 2 * static_cast<int64_t>(query);
        const double share = truth[1] / fmax(truth[0] + truth[1], 1e-300);
        atomicAdd(&totals.mass_violations, share > static_cast<double>(certificate.delta) ? 1ull : 0ull);
        truth[0] = truth[1] = 0;
    }
    if (i > 0) {
        return;
    }
    // Once for the heads that read together; what other queries of the group still need is not touched.
    if (group % p.n_group_of_row == 0) {
        atomicAdd(&totals.tokens[p.epsilon > 0 ? 1 : 0], 1ull);
    }
    atomicAdd(&totals.group_visible, static_cast<unsigned long long>(certificate.n_visible));
    atomicAdd(&totals.group_scanned, static_cast<unsigned long long>(left.scanned));
    atomicAdd(&totals.group_attended, static_cast<unsigned long long>(certificate.n_attended));
    if (p.gave_up != nullptr) {
        p.gave_up[group] = left.gave_up ? 1 : 0;
    }
    if (!(p.epsilon > 0)) {
        return;
    }
    const unsigned long long n_query = static_cast<unsigned long long>(p.n_query_of(group));
    if (left.gave_up) {
        atomicAdd(p.sight[row].plain != 0 ? &totals.not_finite : &totals.not_plain, n_query);
        p.attend_all[group] = 0;
    } else if (all) {
        atomicAdd(&totals.uniform, n_query);
    }
    if (p.spares_uniform && row % p.n_token == 0) {
        const bool uniform = certificate.n_attended > kUniformShare * certificate.n_visible;
        *p.uniform_of(group) = left.without_scan > 0 ? static_cast<uint8_t>(left.without_scan - 1)
                               : uniform             ? kStepsWithoutScan
                                                     : uint8_t{0};
    }
}

// By a whole thread block, once all shares [first, first + n_shares) of the group are there. Scratch: sums [kAttendWarps][n_most]
// [n_channels], kept_of_warps [kAttendWarps], squared.
template <int n_channels, int n_most>
__device__ __forceinline__ void combine_group(const Problem & p, int group, int first, int n_shares, int n_attended, float * sums,
                                              double (*kept_of_warps)[kMaxShared], float (&squared)[kMaxShared]) {
    constexpr int kQuads = (n_channels + 127) / 128;  // 4 channels to a lane, 128 apart
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int dim = p.values.dim;
    const int n_query = p.n_query_of(group);
    // Written by other thread blocks of the same kernel: not from L1.
    const auto partial = [&](int share, int i) {
        const float2 of =
            __ldcg(reinterpret_cast<const float2 *>(p.partial + static_cast<int64_t>(first + share) * p.n_shared + i));
        return PartialHead{of.x, of.y};
    };
    // In the end a warp has the output of a query, and another one its certificate, if there are as many.
    constexpr int kQueries = n_most <= kAttendWarps / 2 ? kAttendWarps / 2 : kAttendWarps;
    const int query = warp % kQueries;
    const bool writes = query < n_query && warp == query;
    const bool certifies = query < n_query && warp + kQueries >= kAttendWarps;
    // Where there is no query, share or channel, another is read and not taken: no load waits for a branch.
    Left left(p, group, min(query, n_query - 1));
    float peak[n_most];
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
        peak[i] = partial(min(lane, n_shares - 1), min(i, n_query - 1)).peak;
    }
#pragma unroll 1
    for (int share = lane + 32; share < n_shares; share += 32) {
#pragma unroll
        for (int i = 0; i < n_most; ++i) {
            peak[i] = fmaxf(peak[i], partial(share, min(i, n_query - 1)).peak);
        }
    }
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
        peak[i] = largest_of_warp(peak[i]);
    }

    float4 sum[n_most][kQuads] = {};
    double kept[n_most] = {};
    constexpr int kAtOnce = n_most * kQuads <= 4 ? 2 : 1;
#pragma unroll 1
    for (int from = warp; from < n_shares; from += kAtOnce * kAttendWarps) {
        PartialHead own[kAtOnce][n_most];
        float4 x[kAtOnce][n_most][kQuads];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int share = min(from + k * kAttendWarps, n_shares - 1);
            const float * parts = p.part + static_cast<int64_t>(first + share) * p.n_shared * dim;
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                own[k][i] = partial(share, min(i, n_query - 1));
#pragma unroll
                for (int j = 0; j < kQuads; ++j) {
                    x[k][i][j] = __ldcg(
                        reinterpret_cast<const float4 *>(parts + min(i, n_query - 1) * dim + min(j * 128 + lane * 4, dim - 4)));
                }
            }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const bool is_there = from + k * kAttendWarps < n_shares;
#pragma unroll
            for (int i = 0; i < n_most; ++i) {
                // Without a peak a share is either nothing or NaN.
                const bool has_peak = own[k][i].peak != -infinity();
                const float factor = is_there && has_peak ? exp2_fast(own[k][i].peak - peak[i]) : 0.0f;
                kept[i] += static_cast<double>(is_there && !has_peak ? own[k][i].kept : own[k][i].kept * factor);
#pragma unroll
                for (int j = 0; j < kQuads; ++j) {
                    sum[i][j].x = fmaf(x[k][i][j].x, factor, sum[i][j].x);
                    sum[i][j].y = fmaf(x[k][i][j].y, factor, sum[i][j].y);
                    sum[i][j].z = fmaf(x[k][i][j].z, factor, sum[i][j].z);
                    sum[i][j].w = fmaf(x[k][i][j].w, factor, sum[i][j].w);
                }
            }
        }
    }
    left.end(p, group, min(query, n_query - 1));
    float own_peak = 0;
#pragma unroll
    for (int i = 0; i < n_most; ++i) {
        own_peak = i == query ? peak[i] : own_peak;
        if (i < n_query) {
#pragma unroll
            for (int j = 0; j < kQuads; ++j) {
                if (const int c = j * 128 + lane * 4; c < n_channels) {
                    *reinterpret_cast<float4 *>(sums + (warp * n_most + i) * n_channels + c) = sum[i][j];
                }
            }
            if (lane == 0) {
                kept_of_warps[warp][i] = kept[i];
            }
        }
    }
    __syncthreads();
    const Kept all_kept(kept_of_warps, min(query, n_query - 1), own_peak, left);
    if (writes) {
        const float norm = write_output<n_channels>(p, group, query, all_kept, sums + query * n_channels, n_most * n_channels);
        if (lane == 0) {
            squared[query] = norm;
        }
    }
    Certified certified(p, all_kept, left, n_attended);
    __syncthreads();
    if (certifies && lane == 0) {
        write_certificate(p, group, query, certified, left, squared[query]);
    }
}

template <DType type> __device__ __noinline__ void encode_pending(const Problem & p, int worker, EncodeShared & shared) {
    const int n = p.n_pending[0];
    for (int entry = worker; entry < n; entry += kEncoders) {
        const int slot = p.pending[entry];
        const int block = slot % p.planes.n_blocks;
        const int head = slot / p.planes.n_blocks % p.n_head_kv.value;
        const int stream = slot / p.planes.n_blocks / p.n_head_kv.value;
        const uint64_t * visible = p.visible + static_cast<int64_t>(stream - p.first_stream) * p.n_token * p.visible_stride;
        const uint64_t wanted = complete_cells(visible, p.visible_stride, p.n_token, block, p.n_blocks);
        encode_block<type>(p.planes, p.keys, p.values, static_cast<int64_t>(stream) * p.kv_size, head, slot, block, wanted,
                           shared, p.totals);
        if (threadIdx.x == 0) {
            p.queued[slot] = 0;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&p.n_pending[1], 1) == kEncoders - 1) {
        p.n_pending[0] = 0;
        p.n_pending[1] = 0;
    }
}

}  // namespace louver::cuda
