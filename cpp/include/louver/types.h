// The few plain types every layer shares. Functions here are always inlined: kernel files are compiled for one
// instruction set each and must not leave a copy that another file would link to.
#pragma once

#include <cstddef>
#include <cstdint>

namespace louver {

// Cells of one block: the unit of the index (docs/index.md).
inline constexpr int kBlockCells = 64;

// The largest head dimension.
inline constexpr int kMaxDim = 1024;

// How a row of keys or values is stored in the cache. q8_0 and q4_0 are ggml's: one float16 scale, then 32 int8, or 16 bytes with
// elements 0 to 15 in the low and 16 to 31 in the high halves, 8 more than they mean.
enum class DType : uint8_t { f32, f16, bf16, q8_0, q4_0 };

// Bytes of a row of n elements. n is a multiple of 32 for q8_0 and q4_0.
[[gnu::always_inline]] constexpr size_t row_bytes(DType type, int64_t n) {
    switch (type) {
        case DType::f32: return static_cast<size_t>(n) * 4;
        case DType::f16:
        case DType::bf16: return static_cast<size_t>(n) * 2;
        case DType::q8_0: return static_cast<size_t>(n) / 32 * 34;
        case DType::q4_0: return static_cast<size_t>(n) / 32 * 18;
    }
    return 0;
}

// The rows of one head in a cache: row i starts at base + i * stride bytes and holds dim elements.
struct Rows {
    const std::byte * base = nullptr;
    int64_t stride = 0;
    int dim = 0;
    DType type = DType::f32;

    [[gnu::always_inline]] const std::byte * row(int64_t i) const { return base + i * stride; }
};

// Vectors are padded with zeros to whole registers, so that no kernel has a tail in the head dimension.
[[gnu::always_inline]] constexpr int padded(int dim) { return (dim + 15) / 16 * 16; }

[[gnu::always_inline]] constexpr int n_blocks_for(int64_t n_cells) {
    return static_cast<int>((n_cells + kBlockCells - 1) / kBlockCells);
}

// What the index knows of a block besides its codes. Each field is rounded outward.
struct BlockBounds {
    float residual_norm = 0;  // largest |key - decoded key| of an indexed cell
    float code_norm = 0;      // largest |codes - 128| of an indexed cell
    float center_norm = 0;    // |center|
    float key_norm = 0;       // largest |key| of an indexed cell
    float value_norm = 0;     // largest |value| of an indexed cell; |mean value| is no larger
};

}  // namespace louver
