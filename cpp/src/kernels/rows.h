// What the vector kernels share in walking over rows. In an unnamed namespace: each kernel file compiles its own copy
// (HACKING.md, "Add a kernel").
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace louver {
namespace {

// Calls f with the row type as a constant.
template <class F> inline void with_type(DType type, F && f) {
    switch (type) {
        case DType::f32: return f.template operator()<DType::f32>();
        case DType::f16: return f.template operator()<DType::f16>();
        case DType::bf16: return f.template operator()<DType::bf16>();
        case DType::q8_0: return f.template operator()<DType::q8_0>();
        case DType::q4_0: return f.template operator()<DType::q4_0>();
    }
}

// Spreads the prefetch of `ahead` over the steps of the work on other rows. Into L2: L1's fill buffers are few.
class Prefetcher {
  public:
    Prefetcher(const Ahead & ahead, int steps)
        : base_(reinterpret_cast<uintptr_t>(ahead.rows.base)),
          stride_(ahead.rows.stride),
          bytes_(row_bytes(ahead.rows.type, ahead.rows.dim)),
          next_(ahead.cells),
          left_(ahead.n),
          rows_per_step_(steps > 0 ? (ahead.n + steps - 1) / steps : 0) {}

    void step() {
        const int rows = left_ < rows_per_step_ ? left_ : rows_per_step_;
        left_ -= rows;
        for (int i = 0; i < rows; ++i) {
            const uintptr_t row = base_ + static_cast<uintptr_t>(*next_++ * stride_);
            for (uintptr_t line = row & ~uintptr_t{63}; line < row + bytes_; line += 64) {
                __builtin_prefetch(reinterpret_cast<const void *>(line), 0, 2);
            }
        }
    }

  private:
    uintptr_t base_;
    int64_t stride_;
    size_t bytes_;
    const int32_t * next_;
    int left_;
    int rows_per_step_;
};

}  // namespace
}  // namespace louver
