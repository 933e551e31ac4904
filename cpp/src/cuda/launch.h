// The kernels of one attention op, in the order in which they run (docs/cuda.md).
#pragma once

#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/problem.h"

namespace louver::cuda {

// Mask to bits, and each query token's Sight. Rows are [n_stream][n_token], `stride` words apart.
void launch_sight(const Mask & mask, int n_token, int n_stream, int n_kv, const DecodeSettings & settings, int64_t stride,
                  uint64_t * visible, Sight * sight, cudaStream_t stream);

// The whole step: upper bounds of all scores, thresholds, survivors, exact attention over them, what is added for the rest,
// certificates, counts; blocks that have become complete are encoded.
void launch_attend(const Problem & p, cudaStream_t stream);

// The bounds alone, sorted into bins; which blocks are to be encoded is noted.
void launch_scan(const Problem & p, cudaStream_t stream);

// Bytes of shared memory that a step wants at least.
size_t attend_bytes(const Problem & p);

// Whether a step has the shared memory that it wants, and its counts the bits.
bool fits(const Problem & p);

// Everything against brute force in float64, after launch_attend (DecodeSettings::check).
void launch_check(const Problem & p, cudaStream_t stream);

// Encodes every block of the problem's streams that is complete and has visible cells which are not indexed.
void launch_repair(const Problem & p, cudaStream_t stream);

// The same for the blocks [0, n_blocks) of every head of a stream, whose cells [0, n_cells) count as visible and complete.
void launch_build(const Planes & planes, const Plane & keys, const Plane & values, int64_t kv_size, int stream_of_cache,
                  int64_t n_cells, Totals * totals, cudaStream_t stream);

// Cells that are about to be rewritten: rows of a cache, [n_stream][kv_size].
struct WriteTarget {
    uint64_t * indexed;
    uint64_t * not_finite;
    int64_t kv_size;
    int64_t first_row;  // added to every row
    int n_stream;
    int n_head_kv;
    int n_blocks;
};
inline constexpr int kMaxTargets = 48;
struct WriteTargets {
    WriteTarget target[kMaxTargets];
    int n = 0;
};

// rows: [n_rows] int64 or int32, on the device.
void launch_invalidate(const WriteTargets & targets, const void * rows, bool wide, int n_rows, cudaStream_t stream);
// Rows [first, first + count).
void launch_invalidate(const WriteTarget & target, int64_t first, int64_t count, cudaStream_t stream);

}  // namespace louver::cuda
