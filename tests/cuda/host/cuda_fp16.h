// float16 on the CPU.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half half) { return half.bits; }

inline float __half2float(__half half) {
    const int exponent = half.bits >> 10 & 31;
    const int mantissa = half.bits & 1023;
    const float sign = (half.bits & 0x8000) != 0 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return mantissa != 0 ? NAN : sign * INFINITY;
    }
    return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                 : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}
inline float2 __half22float2(const __half2 & pair) { return {__half2float(pair.x), __half2float(pair.y)}; }

// To nearest, ties to even.
inline __half __float2half_rn(float x) {
    const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
    const auto of = [&](int bits) { return __half{static_cast<uint16_t>(sign | bits)}; };
    if (std::isnan(x)) {
        return of(0x7e00);
    }
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) {
        return of(0x7c00);
    }
    const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
    const int mantissa =
        static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 2048 carries into the exponent
    return of((exponent + 14) * 1024 + mantissa);
}
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
