// cpp/src/cuda/kernel.cuh on the CPU.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace louver::cuda {

inline std::byte * shared_memory() { return simt::dynamic_memory(); }

struct Launch {
    dim3 grid;
    unsigned threads;
    size_t shared_bytes = 0;
};

template <class... Parameters> void launch_kernel(void (*kernel)(Parameters...), const Launch & launch, cudaStream_t,
                                                  const std::type_identity_t<Parameters> &... arguments) {
    launch_on_stream([=] {
        simt::run({launch.grid.x, launch.grid.y, launch.grid.z}, launch.threads, launch.shared_bytes,
                  [&] { kernel(arguments...); });
    });
}

}  // namespace louver::cuda
