// The parts of each query together, its certificate and its counts; and, in thread blocks of their own, the blocks that the scan
// found complete and not indexed: the next step scans them.
#include "cuda/certify.cuh"
#include "cuda/encode.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch.h"

namespace louver::cuda {
namespace {

constexpr int kThreads = kEncodeThreads;
constexpr int kEncoders = 16;  // thread blocks
// Of the visible keys: above it a head is cheaper without a scan, which reads about a quarter of what dense attention reads.
constexpr double kUniformShare = 0.6;
constexpr uint8_t kStepsWithoutScan = 31;
static_assert(kThreads >= kBins && kThreads >= kMaxKernelDim);

union Shared {
    EncodeShared encode;
    struct {
        double sums[4][kThreads / 32];
        float norms[2][kThreads / 32];
        float peak[kThreads / 32];
        float factor[kMaxShares + 2];  // of the shares that may reach into the group
        alignas(16) float output[kThreads / 32][kMaxKernelDim];
    } combine;
    __device__ Shared() {}
};

__device__ double dropped_share(double dropped, double kept) {
    const double most = dropped * (1.0 + kWeightError);
    const double least = fmax(kept, 0.0) * (1.0 - kWeightError);
    return most <= 0 ? 0.0 : fmin(1.0, most / (most + least));
}

__device__ void add_up(double value, double (&shared)[kThreads / 32]) {
    value = sum_of_warp(value);
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = value;
    }
}

__device__ double sum_of(const double (&shared)[kThreads / 32]) {
    double sum = 0;
    for (const double part : shared) {
        sum += part;
    }
    return sum;
}

__device__ void raise(double * most, double value) {  // of non-negative doubles, whose bits rise with them
    atomicMax(reinterpret_cast<unsigned long long *>(most), static_cast<unsigned long long>(__double_as_longlong(value)));
}

__device__ __forceinline__ double power_of_two(int exponent) {
    return __longlong_as_double(static_cast<long long>(1023 + exponent) << 52);
}

__device__ void combine(const Problem & p, int group, int i, Shared & shared) {
    auto & s = shared.combine;
    const int thread = static_cast<int>(threadIdx.x);
    const int dim = p.values.dim;
    const int query = group * p.n_shared + i;
    const int row = p.row_of_group(group);
    const Sight & sight = p.sight[row];
    const int threshold = p.threshold[query];
    const bool all = threshold == kAttendAll;
    // The shares that reached into this group.
    const int begin = p.group_begin[group];
    const int end = p.group_begin[group + 1];
    int first = 0;
    int n_shares = 0;
    if (begin < end) {
        const Shares shares(p.group_begin[p.n_group], p.n_attend);
        first = shares.of(begin);
        n_shares = shares.of(end - 1) - first + 1;
    }
    float peak = -infinity();
    double kept = 0;
    double dropped = 0;
    double compensation = 0;
    float key_norm = 0;
    float value_norm = 0;
    int scanned = 0;
    if (!all) {
        for (int part = thread; part < p.n_select; part += kThreads) {
            const int64_t at = static_cast<int64_t>(group) * p.n_select + part;
            dropped += static_cast<double>(p.dropped[at * p.n_shared + i]);
            compensation += static_cast<double>(p.compensation[at * p.n_shared + i]);
            value_norm = fmaxf(value_norm, p.value_norm[at]);
        }
        for (int part = thread; part < p.n_scan; part += kThreads) {
            key_norm = fmaxf(key_norm, p.key_norm[group * p.n_scan + part]);
            scanned += p.scanned[group * p.n_scan + part];
        }
    }
    constexpr int kOwn = (kMaxShares + 2 + kThreads - 1) / kThreads;
    PartialHead own[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        const int at = k * kThreads + thread;
        own[k] =
            at < n_shares ? p.partial[static_cast<int64_t>(first + at + group) * p.n_shared + i] : PartialHead{-infinity(), 0};
        peak = fmaxf(peak, own[k].peak);
    }
    peak = largest_of_warp(peak);
    if (thread % 32 == 0) {
        s.peak[thread / 32] = peak;
    }
    __syncthreads();
    for (const float part : s.peak) {
        peak = fmaxf(peak, part);
    }
    if (!all) {
        peak = fmaxf(peak, -100.0f);  // so that what is dropped, relative to the reference, can be put into its unit
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        const int at = k * kThreads + thread;
        // Without a peak it is either nothing or NaN.
        const float factor = own[k].peak == -infinity() ? 0.0f : exp2_fast(own[k].peak - peak);
        kept += static_cast<double>(own[k].kept) * (own[k].peak == -infinity() ? 1.0 : static_cast<double>(factor));
        if (at < n_shares) {
            s.factor[at] = factor;
        }
    }
    add_up(kept, s.sums[0]);
    add_up(dropped, s.sums[1]);
    add_up(compensation, s.sums[2]);
    add_up(scanned, s.sums[3]);
    key_norm = largest_of_warp(key_norm);
    value_norm = largest_of_warp(value_norm);
    if (thread % 32 == 0) {
        s.norms[0][thread / 32] = key_norm;
        s.norms[1][thread / 32] = value_norm;
    }
    __syncthreads();

    // The outputs: each warp takes some of the shares, each lane 4 channels of them at a time.
    const int warp = thread / 32;
    for (int c = thread % 32 * 4; c < dim; c += 128) {
        float4 sum = make_float4(0, 0, 0, 0);
        const auto add = [&](const float * part, float factor) {
            const float4 x = *reinterpret_cast<const float4 *>(part + c);
            sum.x = fmaf(x.x, factor, sum.x);
            sum.y = fmaf(x.y, factor, sum.y);
            sum.z = fmaf(x.z, factor, sum.z);
            sum.w = fmaf(x.w, factor, sum.w);
        };
#pragma unroll 4
        for (int k = warp; k < n_shares; k += kThreads / 32) {
            if (s.factor[k] != 0.0f) {
                add(p.part + ((static_cast<int64_t>(first) + k + group) * p.n_shared + i) * dim, s.factor[k]);
            }
        }
        if (!all && p.compensate) {
            const float factor = exp2_fast(-peak);
#pragma unroll 4
            for (int part = warp; part < p.n_select; part += kThreads / 32) {
                add(p.added + ((static_cast<int64_t>(group) * p.n_select + part) * p.n_shared + i) * dim, factor);
            }
        }
        *reinterpret_cast<float4 *>(&s.output[warp][c]) = sum;
    }
    __syncthreads();
    kept = sum_of(s.sums[0]);
    dropped = sum_of(s.sums[1]);
    compensation = sum_of(s.sums[2]);
    scanned = static_cast<int>(sum_of(s.sums[3]));
    for (const float part : s.norms[0]) {
        key_norm = fmaxf(key_norm, part);
    }
    for (const float part : s.norms[1]) {
        value_norm = fmaxf(value_norm, part);
    }
    // 2^peak, a whole number; where it is out of range nothing is said of what was dropped, or it counts for less than it is.
    const double unit = peak == -infinity() ? 1.0 : power_of_two(static_cast<int>(fminf(fmaxf(peak, -1000.0f), 1000.0f)));
    const double mass = kept + (compensation > 0 ? compensation / unit : 0.0);
    const float inverse = mass > 0 || isnan(mass) ? static_cast<float>(1.0 / mass) : 0.0f;  // no visible cell: 0, as stock
    double squared = 0;
    float * output = p.output_of(group, i);
    for (int c = thread; c < dim; c += kThreads) {
        float sum = 0;
        for (const auto & of_warp : s.output) {
            sum += of_warp[c];
        }
        const float out = sum * inverse;
        output[c] = out;
        squared += static_cast<double>(out) * static_cast<double>(out);
    }
    __syncthreads();
    add_up(squared, s.sums[0]);
    __syncthreads();

    if (thread < kBins) {  // a scan that was given up has counted too
        p.histogram[static_cast<int64_t>(query) * kBins + thread] = 0;
    }
    if (thread != 0) {
        return;
    }
    HeadCertificate certificate;
    certificate.tau = all ? -infinity() : tau_of(threshold, p.reference[query], p.to_log2);
    certificate.n_visible = sight.n_visible;
    certificate.n_scanned = scanned;
    certificate.n_attended = end - begin;
    if (!all && dropped > 0) {
        // The attended cells' exact weights came from float32 scores; the mass proper is at least this. And it is what the
        // dropped cells leave of the oracle's bound.
        const double error = score_error(p.query_norm[query], key_norm, p.keys.dim, p.to_log2);
        const double scored = kept * unit * fmax(1.0 - 0.6931472 * error, 0.0);  // 2^-error is no less
        const double left = p.least[query] * (1.0 - kWeightError) - dropped * (1.0 + kWeightError);
        const double least = fmax(scored, left);
        const double share = dropped_share(dropped, least) * (1 + 0x1p-20);
        certificate.delta = static_cast<float>(fmin(share, static_cast<double>(p.epsilon) * (1.0 - kWeightError)));
        const double upper = dropped * (1.0 + kWeightError);
        const double added = compensation * (1.0 + kWeightError);
        const double bound = fmax((added + upper) / (least + upper), added / fmax(least, 1e-300));
        certificate.error_bound =
            static_cast<float>((static_cast<double>(value_norm) + sqrt(sum_of(s.sums[0]))) * bound * (1 + 0x1p-20));
    }
    p.certificates[static_cast<int64_t>(row) * p.n_head + p.head_of(group, i)] = certificate;

    Totals & totals = *p.totals;
    atomicAdd(&totals.queries, 1ull);
    atomicAdd(&totals.visible, static_cast<unsigned long long>(certificate.n_visible));
    atomicAdd(&totals.scanned, static_cast<unsigned long long>(scanned));
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
    if (group % (p.n_head_kv * p.n_part) == 0) {
        atomicAdd(&totals.tokens[p.epsilon > 0 ? 1 : 0], 1ull);
    }
    atomicAdd(&totals.group_visible, static_cast<unsigned long long>(certificate.n_visible));
    atomicAdd(&totals.group_scanned, static_cast<unsigned long long>(scanned));
    atomicAdd(&totals.group_attended, static_cast<unsigned long long>(certificate.n_attended));
    if (!(p.epsilon > 0)) {
        return;
    }
    const unsigned long long n_query = static_cast<unsigned long long>(p.n_query_of(group));
    if (p.attend_all[group] != 0) {
        atomicAdd(sight.plain != 0 ? &totals.not_finite : &totals.not_plain, n_query);
        p.attend_all[group] = 0;
    } else if (all) {
        atomicAdd(&totals.uniform, n_query);
    }
    uint8_t * without_scan = p.uniform_of(group);
    if (p.spares_uniform && row % p.n_token == 0) {
        const bool uniform = certificate.n_attended > kUniformShare * certificate.n_visible;
        *without_scan = *without_scan > 0 ? static_cast<uint8_t>(*without_scan - 1) : uniform ? kStepsWithoutScan : uint8_t{0};
    }
}

template <DType type> __device__ void encode_pending(const Problem & p, int worker, Shared & shared) {
    const int n = p.n_pending[0];
    for (int entry = worker; entry < n; entry += kEncoders) {
        const int slot = p.pending[entry];
        const int block = slot % p.planes.n_blocks;
        const int head = slot / p.planes.n_blocks % p.n_head_kv;
        const int stream = slot / p.planes.n_blocks / p.n_head_kv;
        const uint64_t * visible = p.visible + static_cast<int64_t>(stream - p.first_stream) * p.n_token * p.visible_stride;
        const uint64_t wanted = complete_cells(visible, p.visible_stride, p.n_token, block, p.n_blocks);
        encode_block<type>(p.planes, p.keys, p.values, static_cast<int64_t>(stream) * p.kv_size, head, slot, block, wanted,
                           shared.encode, p.totals);
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

template <DType type> __global__ void __launch_bounds__(kThreads) combine_all(const __grid_constant__ Problem p) {
    wait_for_previous();
    __shared__ Shared shared;
    const int n_query = p.n_group * p.n_shared;
    const int block = static_cast<int>(blockIdx.x);
    if (block >= n_query) {
        encode_pending<type>(p, block - n_query, shared);
    } else if (block % p.n_shared < p.n_query_of(block / p.n_shared)) {
        combine(p, block / p.n_shared, block % p.n_shared, shared);
    }
}

}  // namespace

void launch_combine(const Problem & p, cudaStream_t stream) {
    with_type(p.keys.type, [&]<DType type>() {
        launch_kernel(combine_all<type>,
                      {dim3(static_cast<unsigned>(p.n_group * p.n_shared + kEncoders)), kThreads, 0, p.overlaps}, stream, p);
    });
}

}  // namespace louver::cuda
