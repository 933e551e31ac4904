// Which cells each token sees, and which of them are attended whatever their score.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "louver/types.h"

namespace louver {

class Visible {
  public:
    // bits: [n_blocks_for(n_kv)]
    Visible(const uint64_t * bits, int64_t n_kv) : bits_(bits), n_kv_(n_kv), n_blocks_(n_blocks_for(n_kv)) {}

    uint64_t operator[](int block) const { return bits_[block]; }

    int64_t count() const {
        int64_t n = 0;
        for (int b = 0; b < n_blocks_; ++b) {
            n += std::popcount(bits_[b]);
        }
        return n;
    }

    // Writes the first n cells, in order, to cells; returns how many there are.
    int first(int n, int32_t * cells) const {
        int found = 0;
        for (int b = 0; found < n && b < n_blocks_; ++b) {
            for (uint64_t left = bits_[b]; left != 0 && found < n; left &= left - 1) {
                cells[found++] = b * kBlockCells + std::countr_zero(left);
            }
        }
        return found;
    }

    // Writes the last n cells, last first.
    int last(int n, int32_t * cells) const {
        int found = 0;
        for (int b = n_blocks_ - 1; found < n && b >= 0; --b) {
            for (uint64_t left = bits_[b]; left != 0 && found < n;) {
                const int cell = 63 - std::countl_zero(left);
                cells[found++] = b * kBlockCells + cell;
                left &= ~(uint64_t{1} << cell);
            }
        }
        return found;
    }

    // One past the n-th cell, 0 for n = 0.
    int64_t end_of_first(int n) const {
        for (int b = 0; n > 0 && b < n_blocks_; ++b) {
            const int here = std::popcount(bits_[b]);
            if (here < n) {
                n -= here;
                continue;
            }
            uint64_t left = bits_[b];
            for (; n > 1; --n) {
                left &= left - 1;
            }
            return static_cast<int64_t>(b) * kBlockCells + std::countr_zero(left) + 1;
        }
        return n > 0 ? n_kv_ : 0;
    }

    // The n-th cell from the end, beyond all for n = 0.
    int64_t begin_of_last(int n) const {
        if (n == 0) {
            return std::numeric_limits<int64_t>::max();
        }
        for (int b = n_blocks_ - 1; b >= 0; --b) {
            const int here = std::popcount(bits_[b]);
            if (here < n) {
                n -= here;
                continue;
            }
            uint64_t left = bits_[b];
            for (int skip = here - n; skip > 0; --skip) {
                left &= left - 1;
            }
            return static_cast<int64_t>(b) * kBlockCells + std::countr_zero(left);
        }
        return 0;
    }

  private:
    const uint64_t * bits_;
    int64_t n_kv_;
    int n_blocks_;
};

// Cells before `first_end` and from `last_begin` on are always attended.
struct Always {
    int64_t first_end;
    int64_t last_begin;

    uint64_t of_block(int block) const {
        const int64_t start = static_cast<int64_t>(block) * kBlockCells;
        return below(first_end - start) | ~below(last_begin - start);
    }

  private:
    static uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }
};

}  // namespace louver
