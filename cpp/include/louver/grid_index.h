// The grid index over the keys of one KV head of one stream.
//
// The limit of Louver's subspace decomposition (arXiv 2605.06763): every channel a subspace of its own, its groups the
// cells of a uniform grid. Per block of 64 cells and channel c a centre and a step; per key and channel an 8-bit code,
// so that key_c = center_c + step_c * (code_c - 128) + residual_c, with the norm of the residual bounded per block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "louver/types.h"

namespace louver {

class GridIndex {
  public:
    // Up to n_cells keys of key_dim elements (1 to 1024) and values of value_dim (0: the index has no values).
    // Memory is reserved for all of them and touched only as blocks are built.
    GridIndex(int key_dim, int value_dim, int64_t n_cells);

    // Room for more cells; what is indexed stays.
    void grow(int64_t n_cells);

    int key_dim() const { return key_dim_; }
    int value_dim() const { return value_dim_; }
    int64_t n_cells() const { return n_cells_; }
    int n_blocks() const { return n_blocks_; }

    // Bit i: the codes of cell i of the block describe the key that is stored there now.
    uint64_t indexed(int block) const { return indexed_[static_cast<size_t>(block)]; }

    // Cells [first, first + count) were rewritten: they are no longer indexed.
    void invalidate(int64_t first, int64_t count);

    struct Repair {
        int encoded = 0;       // cells that were encoded
        bool rebuilt = false;  // with a new grid, all cells anew
    };

    // Indexes the cells of `wanted` that are not indexed yet: into the block's grid where they fit, else with a new grid.
    // keys.row(i) and values.row(i) are cell i of the whole index. A cell with a NaN or an infinity is never indexed; a few
    // keys outside the grid are left out rather than rebuilding for each. Different blocks can be repaired at the same time.
    Repair repair(int block, uint64_t wanted, const Rows & keys, const Rows & values);

    // Bytes of one block, everything counted, and of the blocks built so far.
    size_t block_bytes() const;
    size_t bytes() const { return block_bytes() * static_cast<size_t>(built_blocks()); }
    int built_blocks() const;
    int64_t indexed_cells() const;

    // The planes from a block on, as ScanArgs wants them.
    const uint8_t * codes(int block) const { return codes_ + static_cast<size_t>(block) * codes_per_block(); }
    const uint16_t * center(int block) const { return grid_ + static_cast<size_t>(block) * key_padded(); }
    const uint16_t * step(int block) const { return center(n_blocks_) + static_cast<size_t>(block) * key_padded(); }
    const BlockBounds * bounds(int block) const { return bounds_ + block; }
    // Mean of the indexed values of each block, bfloat16, a row of padded(value_dim) each.
    Rows value_means() const;

  private:
    size_t codes_per_block() const { return static_cast<size_t>(key_dim_ + 3) / 4 * 4 * kBlockCells; }
    size_t key_padded() const { return static_cast<size_t>(padded(key_dim_)); }
    size_t value_padded() const { return static_cast<size_t>(padded(value_dim_)); }
    uint16_t * center_of(int block) { return grid_ + static_cast<size_t>(block) * key_padded(); }
    uint16_t * step_of(int block) { return grid_ + static_cast<size_t>(n_blocks_ + block) * key_padded(); }

    void set_grid(int block, uint64_t cells, const float * keys);
    bool encode(int block, int cell, const float * key);
    void summarize_values(int block, uint64_t cells, const float * values);

    struct Unmap {
        size_t bytes;
        void operator()(std::byte * memory) const;
    };

    int key_dim_;
    int value_dim_;
    int64_t n_cells_;
    int n_blocks_;
    std::unique_ptr<std::byte, Unmap> memory_;  // of the next four
    uint8_t * codes_;       // [n_blocks][key_dim/4][64][4]: 4 channels of a key side by side, as the dot product reads them
    uint16_t * grid_;       // [2][n_blocks][key_padded] bfloat16: centres, then steps
    uint16_t * means_;      // [n_blocks][value_padded] bfloat16; read with weight 0 where nothing is indexed
    BlockBounds * bounds_;  // [n_blocks]
    std::vector<uint64_t> indexed_;
    std::vector<uint64_t> not_finite_;  // cells seen to hold a NaN or an infinity, until they are rewritten
    std::vector<uint8_t> built_;
};

}  // namespace louver
