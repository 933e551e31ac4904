// How kernels are launched, and what they share.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace louver::cuda {

// The dynamic shared memory of a thread block.
__device__ __forceinline__ std::byte * shared_memory() {
    extern __shared__ __align__(16) std::byte memory[];
    return memory;
}

struct Launch {
    dim3 grid;
    unsigned threads;
    size_t shared_bytes = 0;
};

template <class... Parameters> void launch_kernel(void (*kernel)(Parameters...), const Launch & launch, cudaStream_t stream,
                                                  const std::type_identity_t<Parameters> &... arguments) {
    constexpr size_t kWithoutAsking = 48 * 1024;
    const auto function = reinterpret_cast<const void *>(kernel);
    if (launch.shared_bytes > kWithoutAsking) {
        // All there is: the limit is the kernel's, and another thread may want more of it at the same time.
        int device = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        check(
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared_of(device))),
            "cudaFuncSetAttribute");
    }
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "cudaLaunchKernelEx");
}

}  // namespace louver::cuda
