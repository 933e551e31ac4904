// The instructions of cpp/src/cuda/ptx.cuh in plain C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "louver/types.h"

namespace louver::cuda {

inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline float sqrt_fast(float x) { return x < 0x1p-126f ? 0.0f : std::sqrt(x); }

inline void multiply_add(int (&sum)[4], const uint4 & rows, const uint32_t (&columns)[2]) {
    struct Operands {
        uint32_t rows[4];
        uint32_t columns[2];
    };
    const simt::Exchange<Operands> all(Operands{{rows.x, rows.y, rows.z, rows.w}, {columns[0], columns[1]}});
    const auto byte = [](uint32_t word, int i) { return static_cast<int>(static_cast<int8_t>(word >> (8 * i) & 0xff)); };
    for (int k = 0; k < 4; ++k) {
        const int row = simt::lane() / 4 + k / 2 * 8;
        const int column = simt::lane() % 4 * 2 + k % 2;
        for (int channel = 0; channel < 32; ++channel) {
            const Operands left = all.of(row % 8 * 4 + channel % 16 / 4);
            const Operands right = all.of(column * 4 + channel % 16 / 4);
            sum[k] += byte(left.rows[row / 8 + channel / 16 * 2], channel % 4) * byte(right.columns[channel / 16], channel % 4);
        }
    }
}

template <DType type> float sixteen_bits(uint32_t word, int which) {
    const auto bits = static_cast<uint16_t>(word >> (16 * which) & 0xffff);
    return type == DType::f16 ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__nv_bfloat16{bits});
}

template <DType type> void multiply_add(float (&sum)[4], const uint32_t (&rows)[4], uint32_t column0, uint32_t column1) {
    struct Operands {
        uint32_t rows[4];
        uint32_t columns[2];
    };
    const simt::Exchange<Operands> all(Operands{{rows[0], rows[1], rows[2], rows[3]}, {column0, column1}});
    for (int e = 0; e < 4; ++e) {
        const int row = simt::lane() / 4 + e / 2 * 8;
        const int column = simt::lane() % 4 * 2 + e % 2;
        for (int k = 0; k < 16; ++k) {
            const Operands left = all.of(row % 8 * 4 + k % 8 / 2);
            const Operands right = all.of(column * 4 + k % 8 / 2);
            sum[e] += sixteen_bits<type>(left.rows[k / 8 * 2 + row / 8], k % 2) * sixteen_bits<type>(right.columns[k / 8], k % 2);
        }
    }
}

inline void load_tiles(uint32_t (&tiles)[4], const void * row) {
    const simt::Exchange<const void *> rows(row);
    for (int tile = 0; tile < 4; ++tile) {
        tiles[tile] = static_cast<const uint32_t *>(rows.of(8 * tile + simt::lane() / 4))[simt::lane() % 4];
    }
}
inline void load_tiles_transposed(uint32_t (&tiles)[4], const void * row) {
    const simt::Exchange<const void *> rows(row);
    for (int tile = 0; tile < 4; ++tile) {
        tiles[tile] = 0;
        for (int e = 0; e < 2; ++e) {
            const auto * of = static_cast<const uint16_t *>(rows.of(8 * tile + simt::lane() % 4 * 2 + e));
            tiles[tile] |= static_cast<uint32_t>(of[simt::lane() / 4]) << (16 * e);
        }
    }
}

inline uint32_t transpose(uint32_t tile) {
    const simt::Exchange<uint32_t> tiles(tile);
    uint32_t out = 0;
    for (int e = 0; e < 2; ++e) {
        const int row = simt::lane() % 4 * 2 + e;
        const int column = simt::lane() / 4;
        out |= (tiles.of(row * 4 + column / 2) >> (16 * (column % 2)) & 0xffffu) << (16 * e);
    }
    return out;
}

// What is on its way is poison until it has been waited for.
struct Copy {
    std::byte * to;
    const std::byte * from;
    int bytes;
};
void begin_copy(const Copy & copy);
void end_batch();
void end_copies(int n_batches);  // all but the last ones, in the order in which they began

inline void copy_async_or_zero(void * to, const void * from, int bytes) {  // 0 or 16
    begin_copy({static_cast<std::byte *>(to), bytes != 0 ? static_cast<const std::byte *>(from) : nullptr, 16});
}
inline void commit_copies() { end_batch(); }
template <int n> void wait_for_copies() { end_copies(n); }
inline void wait_for_copies() {
    end_batch();
    end_copies(0);
}

inline int arrive(int * count, int n) { return atomicAdd(count, n); }

inline void prefetch(const void *) {}

// Fails where a warp waits for another phase than the one that is open, or for nothing.
class Arrival {
  public:
    void init() {
        phase_ = 0;
        asked_ = false;
    }
    void copy(void * to, const void * from, int bytes);
    void wait(uint32_t phase);

  private:
    uint32_t phase_;
    bool asked_;
};

}  // namespace louver::cuda
