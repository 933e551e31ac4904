// What the library uses of CUB.
#pragma once

#include <cuda_runtime.h>

namespace cub {

struct DeviceScan {
    template <class From, class To>
    static cudaError_t ExclusiveSum(void * scratch, size_t & bytes, From from, To to, int64_t n, cudaStream_t) {
        if (scratch == nullptr) {
            bytes = 1;
            return cudaSuccess;
        }
        int64_t sum = 0;
        for (int64_t i = 0; i < n; ++i) {
            to[i] = sum;
            sum += from[i];
        }
        return cudaSuccess;
    }
};

}  // namespace cub
