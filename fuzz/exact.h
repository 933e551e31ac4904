// The judge of the fuzz targets, sharing nothing with the library: sums of float64 as integers of 2,176 bits.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace fuzz {

// A sum of finite float64, exactly: a fixed-point number with 1,074 bits behind the point, in two's complement.
class ExactSum {
  public:
    void add(double x) {
        if (x == 0) {
            return;
        }
        int exponent;
        const double fraction = std::frexp(std::fabs(x), &exponent);  // in [1/2, 1)
        uint64_t mantissa = static_cast<uint64_t>(std::ldexp(fraction, 53));
        int bit = exponent - 53 + 1074;
        if (bit < 0) {  // a subnormal: the bits that go are zeros
            mantissa >>= -bit;
            bit = 0;
        }
        const size_t word = static_cast<size_t>(bit) / 64;
        const unsigned shift = static_cast<unsigned>(bit) % 64;
        const uint64_t low = mantissa << shift;
        const uint64_t high = shift == 0 ? 0 : mantissa >> (64 - shift);
        x > 0 ? plus(word, low, high) : minus(word, low, high);
    }

    int sign() const {
        if (words_.back() >> 63 != 0) {
            return -1;
        }
        for (const uint64_t word : words_) {
            if (word != 0) {
                return 1;
            }
        }
        return 0;
    }

  private:
    void plus(size_t word, uint64_t low, uint64_t high) {
        unsigned __int128 carry = low;
        for (size_t i = word; i < words_.size(); ++i) {
            carry += words_[i];
            words_[i] = static_cast<uint64_t>(carry);
            carry >>= 64;
            carry += i == word ? high : 0;
        }
    }
    void minus(size_t word, uint64_t low, uint64_t high) {
        unsigned __int128 borrow = low;
        for (size_t i = word; i < words_.size(); ++i) {
            const unsigned __int128 have = words_[i];
            const bool less = have < static_cast<uint64_t>(borrow);
            words_[i] = static_cast<uint64_t>(have - borrow);
            borrow = (borrow >> 64) + (less ? 1 : 0) + (i == word ? high : 0);
        }
    }

    std::array<uint64_t, 34> words_{};
};

// The sign of query . key - tau.
inline int exact_compare(const float * query, const float * key, int dim, double tau) {
    ExactSum sum;
    for (int c = 0; c < dim; ++c) {
        sum.add(static_cast<double>(query[c]) * key[c]);  // exact: 48 bits
    }
    sum.add(-tau);
    return sum.sign();
}

}  // namespace fuzz
