// Elements of cached rows as float32, which holds all of them exactly: of q8_0 too, whose scale has 11 bits and level 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/planes.h"

namespace louver::cuda {

__device__ __forceinline__ float bf16_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// 8 elements from `first` on, a multiple of 8, as they are stored; as float32 once they are needed, so that a load is only a
// load.
template <DType type> struct Eight;

template <> struct Eight<DType::f32> {
    float4 a, b;
    __device__ __forceinline__ void load(const std::byte * row, int first) {
        const float4 * at = reinterpret_cast<const float4 *>(row + first * 4);
        a = __ldg(at);
        b = __ldg(at + 1);
    }
    __device__ __forceinline__ void clear() { a = b = make_float4(0, 0, 0, 0); }
    __device__ __forceinline__ void widen(float (&out)[8]) const {
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
        out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    }
};

struct EightOf16Bits {
    uint4 bits;
    __device__ __forceinline__ void load(const std::byte * row, int first) {
        bits = __ldg(reinterpret_cast<const uint4 *>(row + first * 2));
    }
    __device__ __forceinline__ void clear() { bits = make_uint4(0, 0, 0, 0); }
};

template <> struct Eight<DType::f16> : EightOf16Bits {
    __device__ __forceinline__ void widen(float (&out)[8]) const {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2 *>(&words[i]));
            out[2 * i] = pair.x;
            out[2 * i + 1] = pair.y;
        }
    }
};

template <> struct Eight<DType::bf16> : EightOf16Bits {
    __device__ __forceinline__ void widen(float (&out)[8]) const {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = __uint_as_float(words[i] << 16);
            out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
};

template <> struct Eight<DType::q8_0> {
    uint16_t scale;
    uint16_t pairs[4];
    __device__ __forceinline__ void load(const std::byte * row, int first) {
        const uint16_t * at = reinterpret_cast<const uint16_t *>(row + first / 32 * 34);  // blocks are aligned to 2 bytes only
        scale = __ldg(at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = __ldg(at + 1 + first % 32 / 2 + i);
        }
    }
    __device__ __forceinline__ void clear() {
        scale = 0;
        pairs[0] = pairs[1] = pairs[2] = pairs[3] = 0;
    }
    __device__ __forceinline__ void widen(float (&out)[8]) const {
        const float factor = __half2float(__ushort_as_half(scale));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = factor * static_cast<float>(static_cast<int8_t>(pairs[i] & 0xff));
            out[2 * i + 1] = factor * static_cast<float>(static_cast<int8_t>(pairs[i] >> 8));
        }
    }
};

// One element.
template <DType type> __device__ __forceinline__ float element(const std::byte * row, int c) {
    if constexpr (type == DType::f32) {
        return __ldg(reinterpret_cast<const float *>(row) + c);
    } else if constexpr (type == DType::f16) {
        return __half2float(__ushort_as_half(__ldg(reinterpret_cast<const uint16_t *>(row) + c)));
    } else if constexpr (type == DType::bf16) {
        return bf16_float(__ldg(reinterpret_cast<const uint16_t *>(row) + c));
    } else {
        const std::byte * block = row + c / 32 * 34;
        return __half2float(__ushort_as_half(__ldg(reinterpret_cast<const uint16_t *>(block)))) *
               static_cast<float>(__ldg(reinterpret_cast<const int8_t *>(block + 2 + c % 32)));
    }
}

// Calls f.template operator()<type>().
template <class F> LOUVER_BOTH void with_type(DType type, F && f) {
    switch (type) {
        case DType::f32: f.template operator()<DType::f32>(); break;
        case DType::f16: f.template operator()<DType::f16>(); break;
        case DType::bf16: f.template operator()<DType::bf16>(); break;
        case DType::q8_0: f.template operator()<DType::q8_0>(); break;
        default: break;
    }
}

}  // namespace louver::cuda
