// The shares of a group together: output, certificates, counts.
#pragma once

#include "cuda/certify.cuh"

namespace louver::cuda {

__device__ inline void raise(double * most, double value) {  // of non-negative doubles, whose bits rise with them
    atomicMax(reinterpret_cast<unsigned long long *>(most), static_cast<unsigned long long>(__double_as_longlong(value)));
}

// Written by other thread blocks of the same kernel: not from L1.
__device__ __forceinline__ ShareHead share_head(const Problem & p, int share, int i) {
    const auto * from = reinterpret_cast<const float4 *>(p.of_share + static_cast<int64_t>(share) * kMaxShared + i);
    const float4 first = __ldcg(from);
    const float4 second = __ldcg(from + 1);
    ShareHead head;
    head.peak = first.x;
    head.kept = first.y;
    head.dropped = first.z;
    head.compensation = first.w;
    head.least = second.x;
    head.threshold = __float_as_int(second.y);
    return head;
}

// Shares whose numbers are on their way together: an answer takes as long as all other work. 8 groups on the 132 processors of
// an H200 have 17 at most.
inline constexpr int kSharesAtOnce = 18;

// The mass of the shares [first, first + n), with what is added, in the unit 2^peak of the largest. By a warp, the same in all
// lanes; and by what the shares of query i count: factors [n + kSharesAtOnce], the last
// ones 0.
__device__ __forceinline__ float add_masses(const Problem & p, int first, int n, int i, float * factors) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    ShareHead head = share_head(p, first + min(lane, n - 1), i);
    float peak = head.peak;
#pragma unroll 1
    for (int share = lane + 32; share < n; share += 32) {
        peak = fmaxf(peak, share_head(p, first + share, i).peak);
    }
    peak = largest_of_warp(peak);
    const float unit = exp2_fast(-peak);
    float mass = 0;
#pragma unroll 1
    for (int share = lane; share < n; share += 32) {
        if (share > lane) {
            head = share_head(p, first + share, i);
        }
        // Without a peak a share is either nothing or NaN.
        const float factor = head.peak != -infinity() ? exp2_fast(head.peak - peak) : 0.0f;
        mass += head.peak != -infinity() ? head.kept * factor : head.kept;
        mass += head.compensation > 0 ? head.compensation * unit : 0.0f;
        factors[share] = factor;
    }
    for (int share = n + lane; share < n + kSharesAtOnce; share += 32) {
        factors[share] = 0;
    }
    return sum_of_warp(mass);
}

// What the shares know of a query, relative to its reference: sums of float32, which kWeightError covers for up to 100 shares to
// a lane.
struct AllShares {
    float added = 0;    // weight
    float dropped = 0;  // upper bound
    float least = 0;    // lower bound on the whole mass
    float value_norm = 0;
    int scanned = 0;
    int attended = 0;
    int threshold = kAttendAll;  // the highest; kAttendAll where all of them attended to all

    // By a warp, the same in all lanes.
    __device__ __forceinline__ void load(const Problem & p, int first, int n, int i) {
#pragma unroll 1
        for (int share = static_cast<int>(threadIdx.x) % 32; share < n; share += 32) {
            const ShareHead head = share_head(p, first + share, i);
            added += head.compensation;
            dropped += head.dropped;
            least += head.least;
            threshold = max(threshold, head.threshold);
            const int4 counts = __ldcg(reinterpret_cast<const int4 *>(p.counts + first + share));
            scanned += counts.x;
            attended += counts.y;
            value_norm = fmaxf(value_norm, __int_as_float(counts.z));
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {  // side by side
            added += __shfl_xor_sync(~0u, added, step);
            dropped += __shfl_xor_sync(~0u, dropped, step);
            least += __shfl_xor_sync(~0u, least, step);
            value_norm = fmaxf(value_norm, __shfl_xor_sync(~0u, value_norm, step));
        }
        scanned = __reduce_add_sync(~0u, scanned);
        attended = __reduce_add_sync(~0u, attended);
        threshold = __reduce_max_sync(~0u, threshold);
    }
};

// The certificate, but for the output's norm. By a warp, the same in all lanes.
struct Certified {
    float tau = 0;
    float delta = 0;
    float bound = 0;  // of the output's error, relative to the values' and the output's norm

    __device__ __forceinline__ void work_out(const Problem & p, const AllShares & shares, float reference) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        tau = shares.threshold == kAttendAll ? -infinity() : tau_of(shares.threshold, reference, p.to_log2);
        if (!(shares.dropped > 0)) {
            return;
        }
        constexpr auto kError = static_cast<float>(4 * kWeightError);  // of the sums, and of what follows
        // The mass proper is at least what the dropped cells leave of the oracle's bound.
        const float upper = shares.dropped * (1.0f + kError);
        const float least = fmaxf(shares.least * (1.0f - kError) - upper, 0.0f);
        const float added = shares.added * (1.0f + kError);
        // Three quotients, a lane to each: one after another they take a microsecond.
        const float above = lane == 0 ? upper : lane == 1 ? added + upper : added;
        const float below = lane == 2 ? fmaxf(least, 1e-37f) : upper + least;
        const float quotient = above / below * (1.0f + 0x1p-20f);
        const float share = __shfl_sync(~0u, quotient, 0);
        delta = fminf(share, p.epsilon * (1.0f - kError / 2));
        bound = fmaxf(__shfl_sync(~0u, quotient, 1), __shfl_sync(~0u, quotient, 2)) * kNormInflation;
    }
};

__device__ __forceinline__ HeadCertificate & certificate_of(const Problem & p, int group, int i) {
    return p.certificates[static_cast<int64_t>(p.row_of_group(group)) * p.n_head + p.head_of(group, i)];
}

// Bounds of a query, by a thread; squared: the output's norm.
__device__ __forceinline__ void write_certificate(const Problem & p, int group, int i, const Certified & certified,
                                                  float value_norm, float squared) {
    HeadCertificate & certificate = certificate_of(p, group, i);
    float error_bound = 0;
    if (certified.bound != 0) {  // NaN stays NaN
        error_bound = (value_norm + sqrtf(squared)) * kNormInflation * certified.bound;
    }
    certificate.tau = certified.tau;
    certificate.delta = certified.delta;
    certificate.error_bound = error_bound;
    raise(&p.totals->error_bound_max, static_cast<double>(error_bound));
    atomicAdd(&p.totals->delta_sum, static_cast<double>(certified.delta));
    raise(&p.totals->delta_max, static_cast<double>(certified.delta));
}

// Counts of a query, by a thread. Those of the group come with its first one.
__device__ __forceinline__ void count_query(const Problem & p, int group, int i, int n_scanned, int n_attended, bool all,
                                            int met) {
    const int row = p.row_of_group(group);
    const Sight & sight = p.sight[row];
    HeadCertificate & certificate = certificate_of(p, group, i);
    certificate.n_visible = sight.n_visible;
    certificate.n_scanned = n_scanned;
    certificate.n_attended = n_attended;
    const auto n_visible = static_cast<unsigned long long>(sight.n_visible);
    Totals & totals = *p.totals;
    atomicAdd(&totals.queries, 1ull);
    atomicAdd(&totals.visible, n_visible);
    atomicAdd(&totals.scanned, static_cast<unsigned long long>(n_scanned));
    atomicAdd(&totals.attended, static_cast<unsigned long long>(n_attended));
    if (i > 0) {
        return;
    }
    if (group % p.n_group_of_row == 0) {
        atomicAdd(&totals.tokens[p.epsilon > 0 ? 1 : 0], 1ull);
    }
    atomicAdd(&totals.group_visible, n_visible);
    atomicAdd(&totals.group_scanned, static_cast<unsigned long long>(n_scanned));
    atomicAdd(&totals.group_attended, static_cast<unsigned long long>(n_attended));
    if (p.gave_up != nullptr) {
        p.gave_up[group] = met;
    }
    if (!(p.epsilon > 0) || !all) {
        return;
    }
    unsigned long long & why = met == 0 ? totals.uniform : sight.plain != 0 ? totals.not_finite : totals.not_plain;
    atomicAdd(&why, static_cast<unsigned long long>(p.n_query_of(group)));
}

template <int n_most, int n_channels> struct CombineShared {
    float inverse[n_most];                    // of the mass
    float squares[n_most * n_channels / 32];  // of 32 channels of the output each
};

// By a whole thread block, once the shares [first, first + n) of the group are there. A warp to each query adds the shares'
// masses up, another works the certificate out, and all add the outputs up, a thread to a channel. references: [n_most]. Scratch:
// factors [n_most][n + kSharesAtOnce].
template <int n_channels, int n_most, int n_warps>
__device__ __forceinline__ void combine_group(const Problem & p, int group, int first, int n, int met, const float * references,
                                              CombineShared<n_most, n_channels> & s, float * factors) {
    constexpr int kCertifier = n_warps - n_most;
    static_assert(n_most <= n_warps && n_channels % 32 == 0);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int n_query = p.n_query_of(group);
    const int n_items = n_query * n_channels;
    const int certified_query = warp - kCertifier;
    const bool certifies = certified_query >= 0 && certified_query < n_query;
    AllShares all;
#pragma unroll 1
    for (int item = thread; item - thread < n_items; item += 32 * n_warps) {
        const bool is_there = item < n_items;  // the same in a warp
        const int i = item / n_channels;
        const int c = item % n_channels;
        const float * from = p.part + static_cast<int64_t>(first) * kPartStride + i * kMaxKernelDim + c;
        const float * factor = factors + i * (n + kSharesAtOnce);
        float value = 0;
#pragma unroll 1
        for (int begin = 0; begin < n; begin += kSharesAtOnce) {
            float x[kSharesAtOnce];
#pragma unroll
            for (int u = 0; u < kSharesAtOnce; ++u) {
                x[u] = is_there && begin + u < n ? __ldcg(from + u * kPartStride) : 0.0f;
            }
            if (begin == 0 && item == thread) {  // while the first are on their way
                if (warp < n_query) {
                    const float mass = add_masses(p, first, n, warp, factors + warp * (n + kSharesAtOnce));
                    if (lane == 0) {
                        // No visible cell: 0, as stock.
                        s.inverse[warp] = mass > 0 || isnan(mass) ? 1.0f / mass : 0.0f;
                    }
                }
                if (certifies) {
                    all.load(p, first, n, certified_query);
                }
                __syncthreads();
            }
            if (is_there) {
#pragma unroll
                for (int u = 0; u < kSharesAtOnce; ++u) {
                    value = fmaf(x[u], factor[begin + u], value);
                }
            }
            from += kSharesAtOnce * kPartStride;
        }
        if (is_there) {
            value = c < p.values.dim ? value * s.inverse[i] : 0.0f;
            if (c < p.values.dim) {
                p.output_of(group, i)[c] = value;
            }
            const float squared = sum_of_warp(value * value);
            if (lane == 0) {
                s.squares[item / 32] = squared;
            }
        }
    }
    Certified certified;
    if (certifies) {
        certified.work_out(p, all, references[certified_query]);
        if (lane == 0) {
            count_query(p, group, certified_query, all.scanned, all.attended, all.threshold == kAttendAll, met);
        }
    }
    __syncthreads();
    if (certifies && lane == 0) {
        float squared = 0;
#pragma unroll
        for (int k = 0; k < n_channels / 32; ++k) {
            squared += s.squares[certified_query * (n_channels / 32) + k];
        }
        write_certificate(p, group, certified_query, certified, all.value_norm, squared);
    }
}

}  // namespace louver::cuda
