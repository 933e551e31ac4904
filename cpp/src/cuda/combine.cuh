// The parts of a query together, its certificate and its counts; and the blocks that the scan found complete and not indexed,
// which the next step scans.
#pragma once

#include "cuda/certify.cuh"
#include "cuda/encode.cuh"

namespace louver::cuda {

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

// The shares of a group.
struct SharesOfGroup {
    int group;  // -1: none
    int first;
    int n;
    int survivors;
};

// What the kernels before and the shares left of a query, by a warp: everything is under way at once, and added up when it is
// needed.
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

    __device__ __forceinline__ Left(const Problem & p, const SharesOfGroup & of, int i) {
        const int group = of.group;
        const int query = group * p.n_shared + i;
        threshold = p.threshold[query];
        n_visible = p.sight[p.row_of_group(group)].n_visible;
        gave_up = p.attend_all[group] != 0;
        without_scan = p.spares_uniform ? *p.uniform_of(group) : uint8_t{0};
        reference = p.reference[query];
        query_norm = p.query_norm[query];
        least = p.least[query];
        add(p, of, i, 0);
    }

    // Parts [first, first + 32 * kAtOnce). Where there is none, another is read and not taken.
    __device__ __forceinline__ void add(const Problem & p, const SharesOfGroup & of, int i, int first) {
        float parts[kAtOnce][4];
        int counts[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int at = first + 32 * k + static_cast<int>(threadIdx.x) % 32;
            const int share = of.first + min(at, of.n - 1);
            const int of_scan = of.group * p.n_scan + min(at, p.n_scan - 1);
            parts[k][0] = __ldcg(p.dropped + share * p.n_shared + i);  // of this kernel: not from L1
            parts[k][1] = __ldcg(p.compensation + share * p.n_shared + i);
            parts[k][2] = __ldcg(p.value_norm + share);
            parts[k][3] = p.key_norm[of_scan];
            counts[k] = p.scanned[of_scan];
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int at = first + 32 * k + static_cast<int>(threadIdx.x) % 32;
            const bool is_there = at < of.n;
            dropped += is_there ? static_cast<double>(parts[k][0]) : 0.0;
            compensation += is_there ? static_cast<double>(parts[k][1]) : 0.0;
            value_norm = fmaxf(value_norm, is_there ? parts[k][2] : 0.0f);
            key_norm = fmaxf(key_norm, at < p.n_scan ? parts[k][3] : 0.0f);
            scanned += at < p.n_scan ? counts[k] : 0;
        }
    }

    // The compensation comes first: the output waits for it.
    __device__ __forceinline__ void end_compensation(const Problem & p, const SharesOfGroup & of, int i) {
        for (int first = 32 * kAtOnce; first < max(of.n, p.n_scan); first += 32 * kAtOnce) {
            add(p, of, i, first);
        }
        compensation = threshold == kAttendAll ? 0.0 : sum_of_warp(compensation);
    }
    __device__ __forceinline__ void end() {
        dropped = sum_of_warp(dropped);
        key_norm = largest_of_warp(key_norm);
        value_norm = largest_of_warp(value_norm);
        scanned = __reduce_add_sync(~0u, scanned);
        if (threshold == kAttendAll) {  // nothing was scanned, or not to the end
            dropped = 0;
            key_norm = value_norm = 0;
            scanned = 0;
        }
    }
};

// What the shares of a query kept, in the unit 2^peak.
struct Kept {
    double sum;
    double unit;          // where it is out of range nothing is said of what was dropped, or it counts for less than it is
    double compensation;  // in the same unit

    __device__ __forceinline__ Kept(double kept, float peak, const Left & left) : sum(kept) {
        const int exponent = peak == -infinity() ? 0 : static_cast<int>(fminf(fmaxf(peak, -1000.0f), 1000.0f));
        unit = power_of_two(exponent);
        compensation = left.compensation * power_of_two(-exponent);
    }
    // No visible cell: 0, as stock.
    __device__ __forceinline__ float inverse() const {
        const double mass = sum + compensation;
        return mass > 0 || isnan(mass) ? 1.0f / static_cast<float>(mass) : 0.0f;
    }
};

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

struct CombineShared {
    float inverse[kMaxShared];                       // of the mass
    float squares[kMaxShared * kMaxKernelDim / 32];  // of 32 channels of the output each
};

// Written by other thread blocks of the same kernel: not from L1.
__device__ __forceinline__ PartialHead partial_head(const Problem & p, int share, int i) {
    const float2 head = __ldcg(reinterpret_cast<const float2 *>(p.partial + static_cast<int64_t>(share) * p.n_shared + i));
    return {head.x, head.y};
}

// By a whole thread block, once all shares of the group are there. Scratch: factors [n_most][p.n_attend].
template <int n_channels, int n_most, int n_warps>
__device__ __forceinline__ void combine_group(const Problem & p, const SharesOfGroup & of, CombineShared & s, float * factors) {
    constexpr int kThreads = 32 * n_warps;
    constexpr int kItems = (n_most * n_channels + kThreads - 1) / kThreads;  // channels to a thread
    constexpr int kAtOnce = kItems < 16 ? 32 / kItems : 2;                   // shares
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int dim = p.values.dim;
    const int n_query = p.n_query_of(of.group);
    // The first warps have a query each, and channels only if there are more than the other warps can take.
    const auto number = [&](int item) { return kThreads - 1 - static_cast<int>(threadIdx.x) + item * kThreads; };
    const auto query_of = [&](int item) { return number(item) / n_channels; };
    const auto channel_of = [&](int item) { return number(item) % n_channels; };
    float x[kAtOnce][kItems];
    // Where there is no query, share or channel, another is read and not taken: no load waits for a branch.
    const auto load = [&](int first) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int64_t share = (of.first + min(first + u, of.n - 1)) * p.n_shared;
#pragma unroll
            for (int item = 0; item < kItems; ++item) {
                x[u][item] = __ldcg(p.part + (share + min(query_of(item), n_query - 1)) * dim + min(channel_of(item), dim - 1));
            }
        }
    };
    const bool leads = warp < n_query;
    const int query = min(warp, n_query - 1);
    Left left(p, of, query);
    PartialHead head = partial_head(p, of.first + min(lane, of.n - 1), query);
    load(0);
    float peak = head.peak;
    for (int share = lane + 32; share < of.n; share += 32) {
        peak = fmaxf(peak, partial_head(p, of.first + share, query).peak);
    }
    peak = largest_of_warp(peak);
    double sum = 0;
    for (int share = lane; share < of.n; share += 32) {
        if (share > lane) {
            head = partial_head(p, of.first + share, query);
        }
        // Without a peak a share is either nothing or NaN.
        const float factor = head.peak != -infinity() ? exp2_fast(head.peak - peak) : 0.0f;
        sum += static_cast<double>(head.peak != -infinity() ? head.kept * factor : head.kept);
        if (leads) {
            factors[query * p.n_attend + share] = factor;
        }
    }
    left.end_compensation(p, of, query);
    const Kept kept(sum_of_warp(sum), peak, left);
    if (leads && lane == 0) {
        s.inverse[query] = kept.inverse();
    }
    __syncthreads();
    float out[kItems] = {};
    for (int first = 0; first < of.n; first += kAtOnce) {
        if (first > 0) {
            load(first);
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
            for (int item = 0; item < kItems; ++item) {
                if (first + u < of.n) {
                    out[item] = fmaf(x[u][item], factors[min(query_of(item), n_query - 1) * p.n_attend + first + u], out[item]);
                }
            }
        }
    }
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
        const int i = query_of(item);
        const int c = channel_of(item);
        if (i < n_query) {
            const float value = c < dim ? out[item] * s.inverse[i] : 0.0f;
            if (c < dim) {
                p.output_of(of.group, i)[c] = value;
            }
            const float squared = sum_of_warp(value * value);
            if (lane == 0) {
                s.squares[number(item) / 32] = squared;
            }
        }
    }
    left.end();
    Certified certified(p, kept, left, of.survivors);
    __syncthreads();
    if (leads && lane == 0) {
        float squared = 0;
#pragma unroll
        for (int k = 0; k < n_channels / 32; ++k) {
            squared += s.squares[query * (n_channels / 32) + k];
        }
        write_certificate(p, of.group, query, certified, left, squared);
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
