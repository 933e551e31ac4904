// Rows in the cache's formats, written and read on the host by code that shares nothing with the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "louver/types.h"

namespace louver::checks {

inline void store_row(DType type, const float * from, int n, std::byte * to) {
    for (int c = 0; c < n; ++c) {
        switch (type) {
            case DType::f32: std::memcpy(to + c * 4, from + c, 4); break;
            case DType::f16: {
                const __half x = __float2half_rn(from[c]);
                std::memcpy(to + c * 2, &x, 2);
                break;
            }
            case DType::bf16: {
                const __nv_bfloat16 x = __float2bfloat16_rn(from[c]);
                std::memcpy(to + c * 2, &x, 2);
                break;
            }
            default: {
                if (c % 32 == 0) {
                    float largest = 0;
                    for (int e = 0; e < 32; ++e) {
                        largest = std::max(largest, std::fabs(from[c + e]));
                    }
                    const __half scale = __float2half_rn(largest / 127);
                    std::memcpy(to + c / 32 * 34, &scale, 2);
                }
                __half scale;
                std::memcpy(&scale, to + c / 32 * 34, 2);
                const float width = __half2float(scale);
                const float level = width > 0 ? std::nearbyint(from[c] / width) : 0.0f;
                const auto byte = static_cast<signed char>(std::clamp(level, -127.0f, 127.0f));
                std::memcpy(to + c / 32 * 34 + 2 + c % 32, &byte, 1);
            }
        }
    }
}

inline double load_element(DType type, const std::byte * row, int c) {
    switch (type) {
        case DType::f32: {
            float x;
            std::memcpy(&x, row + c * 4, 4);
            return static_cast<double>(x);
        }
        case DType::f16: {
            __half x;
            std::memcpy(&x, row + c * 2, 2);
            return static_cast<double>(__half2float(x));
        }
        case DType::bf16: {
            __nv_bfloat16 x;
            std::memcpy(&x, row + c * 2, 2);
            return static_cast<double>(__bfloat162float(x));
        }
        default: {
            __half scale;
            signed char level;
            std::memcpy(&scale, row + c / 32 * 34, 2);
            std::memcpy(&level, row + c / 32 * 34 + 2 + c % 32, 1);
            return static_cast<double>(__half2float(scale)) * level;
        }
    }
}

inline const char * name_of(DType type) {
    switch (type) {
        case DType::f32: return "f32";
        case DType::f16: return "f16";
        case DType::bf16: return "bf16";
        default: return "q8_0";
    }
}

}  // namespace louver::checks
