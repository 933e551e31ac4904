// The instructions that have no name in CUDA C++. tests/cuda/host has the same in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace louver::cuda {

// 2^x, off by less than 2^-21 relatively (PTX ISA, ex2.approx); results below 2^-126 become 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// mma.m16n8k32: sum += rows * columns, by a warp; signed bytes, in the order that cuda/planes.h describes.
__device__ __forceinline__ void multiply_add(int (&sum)[4], const uint4 & rows, const uint32_t (&columns)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(rows.x), "r"(rows.y), "r"(rows.z), "r"(rows.w), "r"(columns[0]), "r"(columns[1]));
}

// From global into shared memory; there for the thread that asked after wait_for_copies().
template <int bytes> __device__ __forceinline__ void copy_async(void * to, const void * from) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(bytes) : "memory");
    }
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Brings a line into L2.
__device__ __forceinline__ void prefetch(const void * address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

}  // namespace louver::cuda
