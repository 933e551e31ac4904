// The instructions of cpp/src/cuda/ptx.cuh in plain C++.
#pragma once

#include <cuda_runtime.h>

namespace louver::cuda {

inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

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

// What is on its way is poison until it has been waited for.
struct Copy {
    std::byte * to;
    const std::byte * from;
    int bytes;
};
void begin_copy(const Copy & copy);
void end_copies();

template <int bytes> void copy_async(void * to, const void * from) {
    begin_copy({static_cast<std::byte *>(to), static_cast<const std::byte *>(from), bytes});
}
inline void wait_for_copies() { end_copies(); }

inline void prefetch(const void *) {}

}  // namespace louver::cuda
