// What is left to do of a KV head once all groups that read it are done: no thread block scans it any more.
#pragma once

#include "cuda/encode.cuh"

namespace louver::cuda {

// Of the visible keys: above it a head is cheaper without a scan, which reads about a quarter of what dense attention reads.
inline constexpr double kUniformShare = 0.6;
inline constexpr uint8_t kStepsWithoutScan = 31;

// Whether the heads of the first token's groups attended to nearly all, and so are to go without a scan for some steps. By a
// thread block.
__device__ __forceinline__ void note_uniform(const Problem & p, int group) {
    const int part = static_cast<int>(threadIdx.x);
    if (!p.spares_uniform || part >= p.n_part.value) {
        return;
    }
    const int first_row = p.row_of_group(group) / p.n_token * p.n_token.value;
    const int first = (first_row * p.n_head_kv.value + p.kv_head_of(group)) * p.n_part.value + part;
    const HeadCertificate & certificate = p.certificates[static_cast<int64_t>(first_row) * p.n_head + p.head_of(first, 0)];
    const int n_visible = __ldcg(&certificate.n_visible);
    const int n_attended = __ldcg(&certificate.n_attended);
    uint8_t & left = *p.uniform_of(first);
    left = left > 0 ? static_cast<uint8_t>(left - 1) : n_attended > kUniformShare * n_visible ? kStepsWithoutScan : uint8_t{0};
}

// Blocks that were found complete and not indexed, which the next step scans. By the first kEncodeThreads threads, alone.
template <DType type> __device__ __noinline__ void encode_pending(const Problem & p, int group, int n, EncodeShared & shared) {
    const int stream = p.stream_of(group);
    const int head = p.kv_head_of(group);
    const int64_t first_slot = p.slot_of(group, 0);
    const uint64_t * visible = p.visible + static_cast<int64_t>(stream - p.first_stream) * p.n_token * p.visible_stride;
    for (int entry = 0; entry < n; ++entry) {
        const int slot = __ldcg(p.pending + first_slot + entry);
        const int block = static_cast<int>(slot - first_slot);
        const uint64_t wanted = complete_cells(visible, p.visible_stride, p.n_token, block, p.n_blocks);
        encode_block<type>(p.planes, p.keys, p.values, static_cast<int64_t>(stream) * p.kv_size, head, slot, block, wanted,
                           shared, p.totals);
        if (threadIdx.x == 0) {
            p.queued[slot] = 0;
        }
    }
    if (threadIdx.x == 0) {
        p.n_pending[p.pair_of(group)] = 0;
    }
}

}  // namespace louver::cuda
