// The operations that have one implementation per instruction set. scalar.cpp is the reference: every other
// set is tested against it. Vectors over the head dimension are padded to padded(dim) with zeros; weights are
// powers of two of scores in log2 units relative to a reference (docs/guarantee.md).
#pragma once

#include <cstdint>

#include "louver/types.h"

namespace louver {

// How many thresholds one pass over the weights tries at once.
inline constexpr int kCandidates = 8;

// One KV head's blocks against the n_query query heads that share it.
struct ScanArgs {
    const uint8_t * codes;       // [n_blocks][dim4/4][64][4], dim4 = dim rounded up to 4
    const uint16_t * center;     // [n_blocks][padded] bfloat16
    const uint16_t * step;       // [n_blocks][padded] bfloat16
    const BlockBounds * bounds;  // [n_blocks]
    const uint64_t * cells;      // [n_blocks] bit i: cell i is visible and indexed
    int n_blocks;
    int dim;
    int n_query;
    const float * query;       // [n_query][padded]
    const float * query_norm;  // [n_query] |q|, rounded up
    float to_log2;             // q.k times this is the score in log2 units
    bool certified;            // false: the slack is left out, weights are estimates
    const float * reference;   // [n_query] log2 units; a weight is 2^(score - reference)
    const float * candidate;   // [kCandidates] rising thresholds on the weight, the same for all heads
    float * weight;            // out [n_query][weight_stride]: upper bound on each cell's weight, 0 for cells not in `cells`
    int64_t weight_stride;
    float * slack;  // out [n_query][slack_stride]: per block, log2 units
    int64_t slack_stride;
    double * lower;  // in/out [n_query] += lower bound on the sum of the exact weights
    double * below;  // in/out [n_query][kCandidates] += sum of upper weights under each candidate
};

// Rows that will be read soon: a gather asks memory for them while it converts others.
struct Ahead {
    Rows rows;
    const int32_t * cells = nullptr;
    int n = 0;
};

struct Kernels {
    const char * name;

    // Rows `cells[0..n)` (or, where cells is null, rows 0..n) to float32, out [n][padded(rows.dim)].
    void (*rows_to_f32)(const Rows & rows, const int32_t * cells, int n, float * out, const Ahead & ahead);

    // out[h * out_stride + i] = query[h] . keys[i], both padded to dim_padded.
    void (*dots)(const float * query, int n_query, const float * keys, int n, int dim_padded, float * out, int64_t out_stride);

    // The largest of n >= 1 numbers; NaN if one of them is.
    float (*largest)(const float * x, int n);

    // x[i] = 2^(x[i] * scale - shift), returns the sum. Exponents under -126 give 0 or a subnormal.
    float (*exp2_sum)(float * x, int n, float scale, float shift);

    // acc[h] = acc[h] * rescale[h] + sum_i weight[h * weight_stride + i] * values[i]
    void (*accumulate)(const float * weight, int64_t weight_stride, const float * rescale, int n_query, const float * values,
                       int n, int dim_padded, float * acc);

    void (*scan)(const ScanArgs & args);

    // below[j] += sum of the weights under candidate[j]; n is a multiple of 64.
    void (*sums_below)(const float * weight, int64_t n, const float * candidate, double * below);

    // kept[b] |= bit i where any head's weight of cell i of block b reaches that head's threshold.
    void (*select)(const float * weight, int64_t weight_stride, const float * threshold, int n_query, int n_blocks,
                   uint64_t * kept);

    // out[h * out_stride + b] = sum of head h's weights of block b over the cells not in kept[b].
    void (*dropped_sums)(const float * weight, int64_t weight_stride, int n_query, const uint64_t * kept, int n_blocks,
                         float * out, int64_t out_stride);

    // A row of ggml's float16 mask to bits: 0 is visible, -inf is not. Returns false if any entry is neither.
    bool (*mask_to_bits)(const uint16_t * mask, int64_t n, uint64_t * bits);
};

// The table of the instruction set in use (louver/isa.h).
const Kernels & kernels();

// The table of a named set that the machine has, or null.
const Kernels * kernels_named(const char * name);

}  // namespace louver
