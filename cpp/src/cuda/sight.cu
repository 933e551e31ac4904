// The mask as bits, and what each query token sees: once for all layers of a graph.
#include "cuda/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace louver::cuda {
namespace {

constexpr int kWarps = 8;

// One warp to a block of 64 cells.
__global__ void mask_to_bits(Mask mask, int n_token, int n_kv, int n_blocks, int64_t stride, uint64_t * visible, Sight * sight) {
    const int lane = threadIdx.x % 32;
    const int block = blockIdx.x * kWarps + threadIdx.x / 32;
    const int row = blockIdx.y;
    if (block >= n_blocks) {
        return;
    }
    uint32_t words[2];
    bool plain = true;
    for (int half = 0; half < 2; ++half) {
        const int cell = block * kBlockCells + half * 32 + lane;
        bool sees = cell < n_kv;
        if (sees && mask.data != nullptr) {
            const uint16_t entry = reinterpret_cast<const uint16_t *>(mask.data + row % n_token * mask.token_stride +
                                                                      row / n_token * mask.stream_stride)[cell];
            plain = plain && ((entry & 0x7fffu) == 0 || entry == 0xfc00u);
            sees = entry != 0xfc00u;
        }
        words[half] = __ballot_sync(~0u, sees);
    }
    const bool all_plain = __all_sync(~0u, plain);
    if (lane == 0) {
        visible[row * stride + block] = words[0] | static_cast<uint64_t>(words[1]) << 32;
        if (!all_plain) {
            sight[row].plain = 0;
        }
    }
}

__device__ int position_of(uint64_t word, int rank) {  // of the rank-th bit
    for (; rank > 0; --rank) {
        word &= word - 1;
    }
    return __ffsll(static_cast<long long>(word)) - 1;
}

// The cell of the n-th visible cell from the front (1 is the first), or one behind the last if there are fewer; and the first
// `most` of them into `cells`.
__device__ int from_front(const uint64_t * visible, int n_blocks, int n, int32_t * cells, int most) {
    const int lane = threadIdx.x % 32;
    int seen = 0;
    for (int first = 0; first < n_blocks; first += 32) {
        const uint64_t word = first + lane < n_blocks ? visible[first + lane] : 0;
        const int count = __popcll(static_cast<long long>(word));
        const int before = seen + exclusive_sum(count);
        for (int rank = before; rank < before + count && rank < most; ++rank) {
            cells[rank] = (first + lane) * kBlockCells + position_of(word, rank - before);
        }
        const bool here = before < n && n <= before + count;
        const uint32_t found = __ballot_sync(~0u, here);
        const int cell = here ? (first + lane) * kBlockCells + position_of(word, n - 1 - before) : 0;
        if (found != 0) {
            return __shfl_sync(~0u, cell, __ffs(static_cast<int>(found)) - 1);
        }
        seen += __reduce_add_sync(~0u, count);
    }
    return n_blocks * kBlockCells;
}

// The same from the back; 0 if there are fewer.
__device__ int from_back(const uint64_t * visible, int n_blocks, int n, int32_t * cells, int most) {
    const int lane = threadIdx.x % 32;
    int seen = 0;
    for (int last = n_blocks - 1; last >= 0; last -= 32) {
        const uint64_t word = last - lane >= 0 ? visible[last - lane] : 0;
        const uint64_t reversed = __brevll(word);
        const int count = __popcll(static_cast<long long>(word));
        const int before = seen + exclusive_sum(count);
        for (int rank = before; rank < before + count && rank < most; ++rank) {
            cells[rank] = (last - lane) * kBlockCells + 63 - position_of(reversed, rank - before);
        }
        const bool here = before < n && n <= before + count;
        const uint32_t found = __ballot_sync(~0u, here);
        const int cell = here ? (last - lane) * kBlockCells + 63 - position_of(reversed, n - 1 - before) : 0;
        if (found != 0) {
            return __shfl_sync(~0u, cell, __ffs(static_cast<int>(found)) - 1);
        }
        seen += __reduce_add_sync(~0u, count);
    }
    return 0;
}

// One block of threads to a query token: its first warp looks from the front, its second from the back, all count.
__global__ void see(const uint64_t * all_visible, int64_t stride, int n_blocks, int sinks, int recent, Sight * all) {
    __shared__ int32_t front[kProbes];
    __shared__ int32_t back[kProbes];
    __shared__ int counts[32];
    const uint64_t * visible = all_visible + blockIdx.x * stride;
    Sight & sight = all[blockIdx.x];
    int count = 0;
    for (int b = static_cast<int>(threadIdx.x); b < n_blocks; b += static_cast<int>(blockDim.x)) {
        count += __popcll(static_cast<long long>(visible[b]));
    }
    count = __reduce_add_sync(~0u, count);
    if (threadIdx.x % 32 == 0) {
        counts[threadIdx.x / 32] = count;
    }
    __syncthreads();
    int n_visible = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
        n_visible += counts[w];
    }
    if (threadIdx.x < 32) {
        const int most = min(kProbesFirst, n_visible);
        const int end = sinks > 0 ? from_front(visible, n_blocks, sinks, front, most) + 1 : 0;
        if (sinks < most) {
            from_front(visible, n_blocks, most, front, most);
        }
        if (threadIdx.x == 0) {
            sight.sinks_end = end;
            sight.n_visible = n_visible;
        }
    } else if (threadIdx.x < 64) {
        const int most = min(kProbesLast, n_visible - min(kProbesFirst, n_visible));  // no cell twice
        const int begin = recent > 0 ? from_back(visible, n_blocks, recent, back, most) : n_blocks * kBlockCells;
        if (recent < most) {
            from_back(visible, n_blocks, most, back, most);
        }
        if (threadIdx.x == 32) {
            sight.recent_begin = begin;
        }
    }
    __syncthreads();
    const int n_first = min(kProbesFirst, n_visible);
    const int n_last = min(kProbesLast, n_visible - n_first);
    if (static_cast<int>(threadIdx.x) < n_first) {
        sight.probes[threadIdx.x] = front[threadIdx.x];
    } else if (static_cast<int>(threadIdx.x) < n_first + n_last) {
        sight.probes[threadIdx.x] = back[static_cast<int>(threadIdx.x) - n_first];
    }
    if (threadIdx.x == 0) {
        sight.n_probes = n_first + n_last;
        sight.probes_end = n_first > 0 ? front[n_first - 1] + 1 : 0;
        sight.probes_begin = n_last > 0 ? back[n_last - 1] : n_blocks * kBlockCells;
    }
}

__global__ void forget(Sight * sight) { sight[threadIdx.x].plain = 1; }

}  // namespace

void launch_sight(const Mask & mask, int n_token, int n_stream, int n_kv, const DecodeSettings & settings, int64_t stride,
                  uint64_t * visible, Sight * sight, cudaStream_t stream) {
    const int n_blocks = n_blocks_for(n_kv);
    const int rows = n_token * n_stream;
    launch_kernel(forget, {dim3(1), static_cast<unsigned>(rows)}, stream, sight);
    const dim3 grid(static_cast<unsigned>((n_blocks + kWarps - 1) / kWarps), static_cast<unsigned>(rows));
    launch_kernel(mask_to_bits, {grid, kWarps * 32}, stream, mask, n_token, n_kv, n_blocks, stride, visible, sight);
    launch_kernel(see, {dim3(static_cast<unsigned>(rows)), 256}, stream, visible, stride, n_blocks, settings.sinks,
                  settings.recent, sight);
}

}  // namespace louver::cuda
