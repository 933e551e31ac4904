// Every visible cell in float64 against what was decided without looking (DecodeSettings::check). Runs when the step is done.
#include "cuda/certify.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace louver::cuda {
namespace {

constexpr int kWarps = 8;

template <DType type> __global__ void __launch_bounds__(kWarps * 32) compare(const __grid_constant__ Problem p) {
    const int group = static_cast<int>(blockIdx.y) / p.n_shared;
    const int i = static_cast<int>(blockIdx.y) % p.n_shared;
    if (i >= p.n_query_of(group)) {
        return;
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int query = group * p.n_shared + i;
    int threshold = kAttendAll;
    const GroupShares shares = p.shares_of_group(group);
    for (int share = shares.first; share < shares.first + shares.n; ++share) {
        threshold = max(threshold, p.of_share[static_cast<int64_t>(share) * kMaxShared + i].threshold);
    }
    const bool all = threshold == kAttendAll;
    const float reference = all ? 0.0f : p.reference[query];
    const double tau = all ? -HUGE_VAL : static_cast<double>(tau_of(threshold, reference, p.to_log2));
    const float * q = p.query_of(group, i);
    unsigned long long pairs = 0;
    unsigned long long misses = 0;
    unsigned long long violations = 0;
    double sums[2] = {0, 0};  // kept, dropped
    const int workers = static_cast<int>(gridDim.x) * kWarps;
    for (int block = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32; block < p.n_blocks;
         block += workers) {
        const uint64_t seen = p.visible_of(group)[block];
        const uint64_t kept = p.kept[static_cast<int64_t>(group) * p.n_blocks + block];
        const uint64_t bounded = p.bounded[static_cast<int64_t>(group) * p.n_blocks + block];
        for (int half = 0; half < 2; ++half) {
            const int bit = half * 32 + lane;
            if ((seen >> bit & 1) == 0) {
                continue;
            }
            const std::byte * key = p.keys.row(p.first_row(group) + block * kBlockCells + bit, p.kv_head_of(group));
            double dot = 0;
            for (int c = 0; c < p.keys.dim; ++c) {
                dot += static_cast<double>(q[c]) * static_cast<double>(element<type>(key, c));
            }
            const bool attended = (kept >> bit & 1) != 0;
            const double place = (dot * static_cast<double>(p.to_log2) - static_cast<double>(reference));
            ++pairs;
            misses += !attended && dot >= tau;
            if ((bounded >> bit & 1) != 0) {
                const int bin = p.bins[((static_cast<int64_t>(query) * p.n_blocks) + block) * kBlockCells + bit];
                violations += bin < kBins - 1 && place * kBinsPerOctave + kReferenceBin >= bin + 1;
            }
            sums[attended ? 0 : 1] += all ? 1.0 : exp2(place);
        }
    }
    sums[0] = sum_of_warp(sums[0]);
    sums[1] = sum_of_warp(sums[1]);
    for (int step = 16; step > 0; step /= 2) {
        pairs += __shfl_xor_sync(~0u, pairs, step);
        misses += __shfl_xor_sync(~0u, misses, step);
        violations += __shfl_xor_sync(~0u, violations, step);
    }
    if (lane == 0) {
        atomicAdd(&p.check_sums[2 * static_cast<int64_t>(query)], sums[0]);
        atomicAdd(&p.check_sums[2 * static_cast<int64_t>(query) + 1], sums[1]);
        atomicAdd(&p.totals->pairs, pairs);
        atomicAdd(&p.totals->misses, misses);
        atomicAdd(&p.totals->bound_violations, violations);
    }
}

// The certificates against the true masses.
__global__ void judge(const __grid_constant__ Problem p) {
    const int group = static_cast<int>(blockIdx.x);
    const int i = static_cast<int>(threadIdx.x);
    if (i >= p.n_query_of(group)) {
        return;
    }
    double * truth = p.check_sums + 2 * static_cast<int64_t>(group * p.n_shared + i);
    const double share = truth[1] / fmax(truth[0] + truth[1], 1e-300);
    const float delta = p.certificates[static_cast<int64_t>(p.row_of_group(group)) * p.n_head + p.head_of(group, i)].delta;
    atomicAdd(&p.totals->mass_violations, share > static_cast<double>(delta) ? 1ull : 0ull);
    truth[0] = truth[1] = 0;
}

}  // namespace

void launch_check(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(min((p.n_blocks + kWarps - 1) / kWarps, 64)),
                    static_cast<unsigned>(p.n_group * p.n_shared));
    with_type(p.keys.type, [&]<DType type>() { launch_kernel(compare<type>, {grid, kWarps * 32}, stream, p); });
    launch_kernel(judge, {dim3(static_cast<unsigned>(p.n_group)), kMaxShared}, stream, p);
}

}  // namespace louver::cuda
