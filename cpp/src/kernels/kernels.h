// The operations that have one implementation per instruction set. scalar.cpp is the reference: every other
// set is tested against it. Vectors over the head dimension are padded to padded(dim) with zeros; weights are
// powers of two of scores in log2 units relative to a reference (docs/guarantee.md).
#pragma once

#include <cstdint>

#include "louver/types.h"

namespace louver {

// How many thresholds one pass over the weights tries at once.
inline constexpr int kCandidates = 16;

// The most blocks that one call scans.
inline constexpr int kMaxRun = 8;

// One KV head's blocks against the n_query query heads that share it.
struct ScanArgs {
    const uint8_t * codes;       // [n_blocks][dim4/4][64][4], dim4 = dim rounded up to 4
    const uint8_t * next_codes;  // what will be scanned next, to ask memory for it; or null
    const uint16_t * center;     // [n_blocks][padded] bfloat16
    const uint16_t * step;       // [n_blocks][padded] bfloat16
    const BlockBounds * bounds;  // [n_blocks]
    const uint64_t * cells;      // [n_query][n_blocks], rows cells_stride apart; bit i: cell i is visible and indexed
    int64_t cells_stride;        // 0: the same cells for all
    int n_blocks;                // kMaxRun at most
    int dim;
    int n_query;
    const float * query;       // [n_query][padded]
    const float * query_norm;  // [n_query] |q|, rounded up
    float to_log2;             // q.k times this is the score in log2 units
    bool certified;            // false: the slack is left out, weights are estimates
    const float * reference;   // [n_query] log2 units; a weight is 2^(score - reference)
    const float * candidate;   // [kCandidates] rising thresholds on the weight, the same for all heads; not read without `below`
    float * weight;            // out [n_query][weight_stride]: upper bound on each cell's weight, 0 for cells not in `cells`,
                               // infinity where it overflows or is not a number
    int64_t weight_stride;
    float * slack;  // out [n_query][slack_stride]: per block, log2 units; 0 for a block without cells
    int64_t slack_stride;
    double * lower;  // in/out [n_query] += lower bound on the sum of the exact weights
    double * below;  // in/out [n_query][kCandidates] += sum of the sampled upper weights under each candidate; or null

    [[gnu::always_inline]] uint64_t cells_of(int head, int block) const { return cells[head * cells_stride + block]; }
};

// Of each block one cell in kSampleStep is sampled: those of the 16 from sampled_cell(block) on.
inline constexpr int kSampleStep = 4;
[[gnu::always_inline]] constexpr int sampled_cell(int block) { return block % kSampleStep * (kBlockCells / kSampleStep); }

struct SelectArgs {
    const float * weight;  // [n_query][weight_stride]
    int64_t weight_stride;
    const float * threshold;  // [n_query]
    int n_query;
    int n_blocks;
    const uint64_t * visible;  // [n_blocks]
    uint64_t * kept;           // in/out [n_blocks]: |= the cells whose weight reaches any head's threshold, &= visible
    float * dropped;           // out [n_query][dropped_stride]: per block, sum of the weights of the cells not kept
    int64_t dropped_stride;
};

// Rows that will be read soon: a kernel asks memory for them while it works on others.
struct Ahead {
    Rows rows;
    const int32_t * cells = nullptr;
    int n = 0;
};

// How a key went into a block's grid.
struct Encoding {
    bool fits;                // else nothing else is meant
    double residual_squared;  // of key - (center + step * (code - 128)), off by less than 2^-40 relatively
    int64_t code_squared;     // of code - 128
};

// Where a function takes `cells`, it works on rows cells[0..n), or, where cells is null, on rows 0..n.
struct Kernels {
    const char * name;

    // Rows to float32, out [n][padded(rows.dim)].
    void (*rows_to_f32)(const Rows & rows, const int32_t * cells, int n, float * out);

    // out[h * out_stride + i] = query[h] . row i of keys; query [n_query][padded(keys.dim)].
    void (*dots)(const float * query, int n_query, const Rows & keys, const int32_t * cells, int n, float * out,
                 int64_t out_stride, const Ahead & ahead);

    // score[i] = query . row i of keys in float64, and magnitude[i] = the sum of its terms' magnitudes, in any order; query
    // [padded(keys.dim)].
    void (*dots_f64)(const double * query, const Rows & keys, const int32_t * cells, int n, double * score, double * magnitude);

    // The largest of n >= 1 numbers; NaN if one of them is.
    float (*largest)(const float * x, int n);

    // x[i] = 2^(x[i] * scale - shift), returns the sum. Exponents under -126 give 0 or a subnormal; x[i] may be -infinity.
    float (*exp2_sum)(float * x, int n, float scale, float shift);

    // acc[h] = acc[h] * rescale[h] + sum_i weight[h * weight_stride + i] * row i of values; acc [n_query][padded(values.dim)].
    void (*accumulate)(const float * weight, int64_t weight_stride, const float * rescale, int n_query, const Rows & values,
                       const int32_t * cells, int n, float * acc, const Ahead & ahead);

    // The sum of squares of a padded row, off by less than 2^-40 relatively; not finite exactly where one of its elements is not.
    double (*squared_norm)(const float * row, int dim);

    // low and high [padded(dim)] take the row in.
    void (*widen)(const float * row, int dim, float * low, float * high);

    // A padded, finite key against a grid of bfloat16 [padded(dim)]: code [padded(dim)] is round((key - center) / step) + 128, 0
    // behind dim. It does not fit where that is not in 0..255 or where the step is 0 and the key is not the centre.
    Encoding (*encode)(const float * key, const uint16_t * center, const uint16_t * step, int dim, uint8_t * code);

    void (*scan)(const ScanArgs & args);

    // below[j] += sum of the weights under candidate[j]; n is a multiple of 64.
    void (*sums_below)(const float * weight, int64_t n, const float * candidate, double * below);

    void (*select)(const SelectArgs & args);

    // A row of ggml's float16 mask to bits: 0 is visible, -inf is not. Returns false if any entry is neither.
    bool (*mask_to_bits)(const uint16_t * mask, int64_t n, uint64_t * bits);
};

// The table of the instruction set in use (louver/isa.h).
const Kernels & kernels();

// The table of a named set that the machine has, or null.
const Kernels * kernels_named(const char * name);

}  // namespace louver
