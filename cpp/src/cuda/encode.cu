#include "cuda/encode.cuh"

#include "cuda/kernel.cuh"
#include "cuda/launch.h"

namespace louver::cuda {
namespace {

template <DType type> __global__ void __launch_bounds__(kEncodeThreads) repair(const __grid_constant__ Problem p) {
    __shared__ EncodeShared shared;
    const int block = static_cast<int>(blockIdx.x);
    const int head = static_cast<int>(blockIdx.y);
    const int stream = static_cast<int>(blockIdx.z);
    const uint64_t wanted = complete_cells(p.visible + static_cast<int64_t>(stream) * p.n_token * p.visible_stride,
                                           p.visible_stride, p.n_token, block, p.n_blocks);
    encode_block<type>(p.planes, p.keys, p.values, static_cast<int64_t>(p.first_stream + stream) * p.kv_size, head,
                       p.planes.slot(p.first_stream + stream, head, block), block, wanted, shared, p.totals);
}

template <DType type> __global__ void __launch_bounds__(kEncodeThreads)
    build(const __grid_constant__ Planes planes, const __grid_constant__ Plane keys, const __grid_constant__ Plane values,
          int64_t first_row, int stream, int64_t n_cells, Totals * totals) {
    __shared__ EncodeShared shared;
    const int block = static_cast<int>(blockIdx.x);
    const int head = static_cast<int>(blockIdx.y);
    const int64_t left = n_cells - static_cast<int64_t>(block) * kBlockCells;
    const uint64_t wanted = left >= kBlockCells ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    encode_block<type>(planes, keys, values, first_row, head, planes.slot(stream, head, block), block, wanted, shared, totals);
}

__device__ void clear_cell(const WriteTarget & target, int64_t row) {
    const int64_t stream = row / target.kv_size;
    if (row < 0 || stream >= target.n_stream) {
        return;
    }
    const int64_t cell = row % target.kv_size;
    const unsigned long long keep = ~(1ull << (cell % kBlockCells));
    for (int head = 0; head < target.n_head_kv; ++head) {
        const int64_t slot = (stream * target.n_head_kv + head) * target.n_blocks + cell / kBlockCells;
        atomicAnd(reinterpret_cast<unsigned long long *>(target.indexed) + slot, keep);
        atomicAnd(reinterpret_cast<unsigned long long *>(target.not_finite) + slot, keep);
    }
}

__global__ void invalidate_rows(const __grid_constant__ WriteTargets targets, const void * rows, bool wide, int n_rows) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n_rows) {
        const int64_t row = wide ? static_cast<const int64_t *>(rows)[i] : static_cast<const int32_t *>(rows)[i];
        const WriteTarget & target = targets.target[blockIdx.y];
        clear_cell(target, target.first_row + row);
    }
}

__global__ void invalidate_range(const __grid_constant__ WriteTarget target, int64_t first, int64_t count) {
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        clear_cell(target, first + i);
    }
}

}  // namespace

void launch_repair(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_blocks), static_cast<unsigned>(p.n_head_kv), static_cast<unsigned>(p.n_stream));
    with_type(p.keys.type, [&]<DType type>() { launch_kernel(repair<type>, {grid, kEncodeThreads}, stream, p); });
}

void launch_build(const Planes & planes, const Plane & keys, const Plane & values, int64_t kv_size, int stream_of_cache,
                  int64_t n_cells, Totals * totals, cudaStream_t stream) {
    if (n_cells == 0) {
        return;
    }
    const dim3 grid(static_cast<unsigned>(n_blocks_for(n_cells)), static_cast<unsigned>(planes.n_head_kv));
    with_type(keys.type, [&]<DType type>() {
        launch_kernel(build<type>, {grid, kEncodeThreads}, stream, planes, keys, values, stream_of_cache * kv_size,
                      stream_of_cache, n_cells, totals);
    });
}

void launch_invalidate(const WriteTargets & targets, const void * rows, bool wide, int n_rows, cudaStream_t stream) {
    if (targets.n == 0 || n_rows == 0) {
        return;
    }
    constexpr unsigned kThreads = 128;
    const dim3 grid((static_cast<unsigned>(n_rows) + kThreads - 1) / kThreads, static_cast<unsigned>(targets.n));
    launch_kernel(invalidate_rows, {grid, kThreads}, stream, targets, rows, wide, n_rows);
}

void launch_invalidate(const WriteTarget & target, int64_t first, int64_t count, cudaStream_t stream) {
    launch_kernel(invalidate_range, {dim3(256), 256}, stream, target, first, count);
}

}  // namespace louver::cuda
