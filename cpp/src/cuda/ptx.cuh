// The instructions that have no name in CUDA C++. tests/cuda/host has the same in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "louver/types.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LOUVER_BULK_COPIES 1
#else
#define LOUVER_BULK_COPIES 0
#endif

namespace louver::cuda {

// 2^x, off by less than 2^-21 relatively (PTX ISA, ex2.approx); results below 2^-126 become 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Off by less than 2^-22 relatively (PTX ISA, sqrt.approx); of numbers below 2^-126 it is 0.
__device__ __forceinline__ float sqrt_fast(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// mma.m16n8k32: sum += rows * columns, by a warp; signed bytes, in the order that cuda/planes.h describes.
__device__ __forceinline__ void multiply_add(int (&sum)[4], const uint4 & rows, const uint32_t (&columns)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
                 : "r"(rows.x), "r"(rows.y), "r"(rows.z), "r"(rows.w), "r"(columns[0]), "r"(columns[1]));
}

// mma.m16n8k16: sum += rows * columns, by a warp; 16-bit floats, sums in float32.
template <DType type>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&rows)[4], uint32_t column0, uint32_t column1) {
    if constexpr (type == DType::f16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(column0), "r"(column1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(column0), "r"(column1));
    }
}

// 4 tiles of 8 rows of 16 bytes from shared memory; lane l names row l % 8 of tile l / 8.
__device__ __forceinline__ void load_tiles(uint32_t (&tiles)[4], const void * row) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(shared)
                 : "memory");
}
__device__ __forceinline__ void load_tiles_transposed(uint32_t (&tiles)[4], const void * row) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(shared)
                 : "memory");
}

// A tile of 8 rows of 8 16-bit numbers, of which a lane has two of row lane / 4, with rows and columns exchanged.
__device__ __forceinline__ uint32_t transpose(uint32_t tile) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(tile));
    return out;
}

// For what is read once, so that it does not displace other things in L2, the code of the next kernel among them.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes from global into shared memory, of which the first `bytes` are read, and the others are zeros; there for the thread
// that asked after wait_for_copies().
__device__ __forceinline__ void copy_async_or_zero(void * to, const void * from, int bytes) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(from), "r"(bytes),
                 "l"(read_once())
                 : "memory");
}
// What was asked for since the last commit_copies() is a batch; all but the last n batches are there after it.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Counts up what thread blocks arrive at; what each wrote before, with a barrier in between, is there for whoever finds it
// counted. Returns what it was.
__device__ __forceinline__ int arrive(int * count, int n) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(count), "r"(n) : "memory");
    return before;
}

// Brings a line into L2.
__device__ __forceinline__ void prefetch(const void * address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// What a warp waits for: a copy from global into shared memory, 16 bytes or a multiple of them. With compute
// capability 9.0 one lane asks for a whole piece, before it every lane for its part. Its phases alternate between 0 and 1.
class Arrival {
  public:
    // By a thread, and then visible to the warp after __syncwarp().
    __device__ __forceinline__ void init() {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "n"(kArrivals) : "memory");
#if LOUVER_BULK_COPIES
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    // A phase: the next wait() is for it. What is copied is not to stay in L2.
    __device__ __forceinline__ void copy(void * to, const void * from, int bytes) {
        const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
#if LOUVER_BULK_COPIES
        if (threadIdx.x % 32 == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
                    "r"(shared),
                "l"(from), "r"(bytes), "r"(address()), "l"(read_once())
                : "memory");
        }
#else
        for (int at = static_cast<int>(threadIdx.x) % 32 * 16; at < bytes; at += 32 * 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared + static_cast<uint32_t>(at)),
                         "l"(static_cast<const std::byte *>(from) + at)
                         : "memory");
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address()) : "memory");
#endif
    }
    __device__ __forceinline__ void wait(uint32_t phase) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
#if LOUVER_BULK_COPIES
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#else
            "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#endif
            "@!done bra again;\n"
            "}" ::"r"(address()),
            "r"(phase)
            : "memory");
    }

  private:
    static constexpr int kArrivals = LOUVER_BULK_COPIES ? 1 : 32;

    __device__ __forceinline__ uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&barrier_)); }

    uint64_t barrier_;
};

}  // namespace louver::cuda
