// What a thread block keeps of its share between the scan and the attention: in its own shared memory where that is enough,
// because under load every answer of the memory takes two microseconds, and in global memory else.
#pragma once

#include "cuda/problem.h"

namespace louver::cuda {

// Blocks are numbered as in OwnBlocks.
struct ShareCells {
    uint8_t * bins;      // [n][n_most][kBlockCells] of indexed visible cells
    uint16_t * list;     // [n][kBlockCells] survivors (Survivors)
    uint64_t * seen;     // [n] visible cells
    uint64_t * indexed;  // [n]
    uint64_t * dropped;  // [n] cells that are, once they are selected
    float * slack;       // [n][n_most]
    float * longest;     // [n] norm of any value, where there are indexed visible cells

    ShareCells() = default;
    // memory: n * bytes_of_share_block(n_most), aligned to 16.
    LOUVER_BOTH ShareCells(std::byte * memory, int n, int n_most)
        : bins(reinterpret_cast<uint8_t *>(memory)),
          list(reinterpret_cast<uint16_t *>(bins + n * n_most * kBlockCells)),
          seen(reinterpret_cast<uint64_t *>(list + n * kBlockCells)),
          indexed(seen + n),
          dropped(indexed + n),
          slack(reinterpret_cast<float *>(dropped + n)),
          longest(slack + n * n_most) {}
};

}  // namespace louver::cuda
