// How a cache and its index lie in device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "louver/types.h"

#ifdef __CUDACC__
#define LOUVER_BOTH __host__ __device__ __forceinline__
#else
#define LOUVER_BOTH inline
#endif

namespace louver::cuda {

// The largest head dimension that the kernels take; a multiple of 8 (of 32 for q8_0).
inline constexpr int kMaxKernelDim = 256;

// K or V. Element c of cell i of a stream's head is the c-th of the row at data + (stream * kv_size + i) * row_stride + head *
// head_stride; strides in bytes.
struct Plane {
    const std::byte * data = nullptr;
    int64_t row_stride = 0;
    int64_t head_stride = 0;
    int dim = 0;
    DType type = DType::f16;

    LOUVER_BOTH const std::byte * row(int64_t row, int head) const { return data + row * row_stride + head * head_stride; }
};

// The planes of a whole cache: what GridIndex holds per head (louver/grid_index.h), laid out for warps. `slot` numbers
// [n_stream][n_head_kv][n_blocks].
//
// Codes are signed, code - 128. A block's are 4 tiles of 16 keys by 32 channels (as many as the head has), each in the order
// in which a warp holds the left operand of mma.m16n8k32: one 16-byte load per lane and tile. Row r of tile t is the cell
// cell_of(t, r), so that the 8 results of a lane are neighbours.
struct Planes {
    int key_dim = 0;
    int value_dim = 0;
    int n_tiles = 0;  // of 32 channels
    int n_head_kv = 0;
    int n_blocks = 0;

    int8_t * codes = nullptr;         // [slot][4][n_tiles][32 lanes][16]
    uint16_t * grid = nullptr;        // [slot][2][32 n_tiles] bfloat16: centres, then steps, in the order of grid_position
    uint16_t * means = nullptr;       // [slot][value_dim] bfloat16
    BlockBounds * bounds = nullptr;   // [slot]
    uint64_t * indexed = nullptr;     // [slot] bit per cell, as in GridIndex
    uint64_t * not_finite = nullptr;  // [slot]

    LOUVER_BOTH int64_t slot(int stream, int head, int block) const {
        return (static_cast<int64_t>(stream) * n_head_kv + head) * n_blocks + block;
    }
    LOUVER_BOTH int width() const { return 32 * n_tiles; }
    LOUVER_BOTH int64_t codes_per_block() const { return static_cast<int64_t>(kBlockCells) * width(); }
    LOUVER_BOTH int8_t * codes_of(int64_t slot) const { return codes + slot * codes_per_block(); }
    LOUVER_BOTH uint16_t * center_of(int64_t slot) const { return grid + slot * 2 * width(); }
    LOUVER_BOTH uint16_t * step_of(int64_t slot) const { return center_of(slot) + width(); }
    LOUVER_BOTH uint16_t * means_of(int64_t slot) const { return means + slot * value_dim; }

    size_t block_bytes() const {
        return static_cast<size_t>(codes_per_block()) + static_cast<size_t>(2 * width()) * sizeof(uint16_t) +
               static_cast<size_t>(value_dim) * sizeof(uint16_t) + sizeof(BlockBounds) + 2 * sizeof(uint64_t);
    }
};

// Tiles of 32 channels that a head takes: as many as there is a scan kernel for.
constexpr int tiles_for(int dim) { return dim <= 64 ? 2 : dim <= 96 ? 3 : dim <= 128 ? 4 : 8; }

// mma.m16n8k32 gives lane l the bytes of rows l / 4 and l / 4 + 8 and of the channels 4 (l % 4) + 0..3 and 16 on from there.
LOUVER_BOTH int cell_of(int tile, int row) { return row % 8 * 8 + 2 * tile + row / 8; }
LOUVER_BOTH int tile_of(int cell) { return cell % 8 / 2; }
LOUVER_BOTH int row_of(int cell) { return cell / 8 + cell % 2 * 8; }

// Where the code of a cell's channel lies within its block.
LOUVER_BOTH int64_t code_position(int cell, int channel, int n_tiles) {
    const int row = row_of(cell);
    const int lane = row % 8 * 4 + channel % 16 / 4;
    const int byte = channel % 32 / 16 * 8 + row / 8 * 4 + channel % 4;
    return (static_cast<int64_t>(tile_of(cell) * n_tiles + channel / 32) * 32 + lane) * 16 + byte;
}

// Where a channel's centre and step lie: those that a lane works with, lane % 4, side by side.
LOUVER_BOTH int grid_position(int channel, int n_tiles) {
    return channel % 16 / 4 * (8 * n_tiles) + channel / 32 * 8 + channel % 32 / 16 * 4 + channel % 4;
}

}  // namespace louver::cuda
