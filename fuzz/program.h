// What the fuzz targets read out of their input: choices, numbers, keys.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "louver/types.h"

namespace fuzz {

// The input's bytes, then some that follow from them: short inputs, too, make long programs.
class Choices {
  public:
    Choices(const uint8_t * data, size_t size) : data_(data), size_(size) {
        for (size_t i = 0; i < size; ++i) {
            more_ = (more_ ^ data[i]) * 0x100000001b3;
        }
    }

    bool done() const { return at_ >= size_; }
    uint8_t byte() {
        if (at_ < size_) {
            return data_[at_++];
        }
        more_ = more_ * 6364136223846793005 + 1442695040888963407;
        return static_cast<uint8_t>(more_ >> 56);
    }
    // In 0..n.
    int below(int n) { return (byte() | byte() << 8) % n; }

  private:
    const uint8_t * data_;
    size_t size_;
    size_t at_ = 0;
    uint64_t more_ = 0xcbf29ce484222325;
};

inline float f16_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return fraction != 0 ? std::nanf("") : sign * HUGE_VALF;
    }
    return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                 : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25));
}

// Towards zero: any stored number will do.
inline uint16_t f16_bits(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (!(size < 65536.0f)) {
        return static_cast<uint16_t>(sign | (std::isnan(x) ? 0x7e00 : std::isinf(x) ? 0x7c00 : 0x7bff));
    }
    int exponent = 0;
    std::frexp(size, &exponent);
    if (exponent < -13) {
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(size, 24)));
    }
    const int fraction = static_cast<int>(std::ldexp(size, 11 - exponent)) - 1024;
    return static_cast<uint16_t>(sign | (exponent + 14) << 10 | fraction);
}

// A number as it is stored, and back.
inline void store(louver::DType type, float x, std::byte * to) {
    if (type == louver::DType::f32) {
        std::memcpy(to, &x, 4);
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t half = type == louver::DType::f16 ? f16_bits(x) : static_cast<uint16_t>(bits >> 16);
    std::memcpy(to, &half, 2);
}

inline float load(louver::DType type, const std::byte * from) {
    float x;
    if (type == louver::DType::f32) {
        std::memcpy(&x, from, 4);
        return x;
    }
    uint16_t half;
    std::memcpy(&half, from, 2);
    if (type == louver::DType::f16) {
        return f16_value(half);
    }
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&x, &bits, 4);
    return x;
}

constexpr int kFlavours = 12;

// [n][dim] numbers of a kind that hurts.
inline std::vector<float> numbers(int flavour, int n, int dim, uint64_t seed, bool finite) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(n) * static_cast<size_t>(dim));
    for (size_t i = 0; i < x.size(); ++i) {
        const size_t row = i / static_cast<size_t>(dim);
        const size_t c = i % static_cast<size_t>(dim);
        const float g = normal(random);
        switch (flavour) {
            case 0: x[i] = g; break;
            case 1: x[i] = 0.5f; break;  // all equal
            case 2:
                x[i] = row > 0 ? x[i - row / 2 * static_cast<size_t>(dim) - static_cast<size_t>(dim)] : g;
                break;                                           // duplicates
            case 3: x[i] = c == 0 ? 1000.0f * g : g; break;      // one huge channel
            case 4: x[i] = std::ldexp(g, -140); break;           // subnormals
            case 5: x[i] = g > 0 ? 65504.0f : -65504.0f; break;  // the largest float16
            case 6: x[i] = g > 1 ? 3e38f : 1e30f * g; break;     // near the largest float32
            case 7: x[i] = 0; break;
            case 8: x[i] = c % 2 == 0 ? 1e4f + std::ldexp(g, -6) : -1e4f; break;  // terms that cancel
            case 9: x[i] = static_cast<float>(static_cast<int>(2 * g)); break;    // small integers: ties
            case 10: x[i] = g + 5.0f * static_cast<float>(c % 3); break;          // means far from 0
            default: x[i] = !finite && random() % 97 == 0 ? (random() % 2 ? std::nanf("") : -HUGE_VALF) : g; break;
        }
    }
    return x;
}

}  // namespace fuzz
