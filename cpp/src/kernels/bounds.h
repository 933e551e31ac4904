// The slack of the scan, term by term. docs/guarantee.md derives each constant; all kernels use these.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/kernels.h"

namespace louver {

// Half an ulp of 1 in float32: the relative error of one rounded operation.
inline constexpr float kUnit = 0x1p-24f;

// Covers the relative error of a float32 norm of up to 1024 elements, whatever the order of summation.
inline constexpr float kNormInflation = 1.0f + 0x1p-12f;

// Covers the relative error of every 2^x in use and of the float32 sums of weights inside a block or chunk.
inline constexpr double kWeightError = 0x1p-16;

// Weights are kept at or above this, so that an upper bound never underflows to zero.
inline constexpr float kMinLog2 = -120.0f;

// The query scaled by a block's steps is rounded to integers in -kQueryLevels..kQueryLevels, each 256 * high + low with
// high and low in int8: two integer dot products with the codes. (One of 8 bits left two thirds of the slack to the query's
// rounding: docs/performance.md.)
inline constexpr float kQueryLevels = 127.0f * 256.0f;

// A query scaled by a block's steps that nowhere reaches this is rounded to zero, and this covers what that loses:
// its norm, with the underflow of its products.
inline constexpr float kTinyScaledQuery = 0x1p-40f;
static inline float tiny_error_norm(int dim) { return kTinyScaledQuery * static_cast<float>(dim); }

// What the integer dot products of one block and one query head have to be completed with:
// score <= quantum * (integer dot) + offset, in log2 units relative to the reference.
struct ScoreBound {
    float quantum;
    float offset;
    float slack;  // of the offset; the score is at least quantum * dot + offset - 2 * slack
};

// The query of a head as scaled by a block's steps and rounded: levels * quantum, with largest = max |q * step|.
// base: q.center - 128 * quantum * sum(levels); error_norm: |q * step - quantum * levels|; both as float32 computed them.
struct RoundedQuery {
    float largest;
    float quantum;
    float base;
    float error_norm;
};

static inline ScoreBound score_bound(const RoundedQuery & rounded, const BlockBounds & block, float query_norm, int dim,
                                     float to_log2, float reference, bool certified) {
    const float d = static_cast<float>(dim);
    // No partial sum of the integer and base terms is larger than this: it scales the rounding of those sums.
    const float magnitude = query_norm * block.center_norm + rounded.largest * 384.0f * d;
    const float rounding = (2.0f * d + 16.0f) * kUnit * magnitude;
    const float query_error = (rounded.error_norm * kNormInflation + 2.0f * kUnit * d * rounded.largest) * block.code_norm;
    const float slack = query_norm * block.residual_norm + query_error + rounding;
    // The products below round once or twice each; the reference is subtracted, so its own rounding counts too.
    const float scaled = (slack * to_log2 + 8.0f * kUnit * (magnitude * to_log2 + std::fabs(reference))) * kNormInflation;
    ScoreBound bound;
    bound.quantum = rounded.quantum * to_log2;
    bound.slack = certified ? scaled : 0.0f;
    bound.offset = rounded.base * to_log2 - reference + bound.slack;
    return bound;
}

// At most 2^(-2 * slack), the factor from a cell's upper weight down to its lower: (1 - x/4)^4 <= e^-x for 0 <= x <= 4.
static inline float lower_factor(float slack) {
    const float root = 1.0f - slack * 0.34658f;  // 2 ln 2 / 4, rounded up
    return root > 0.0f ? root * root * root * root * (1.0f - 0x1p-20f) : 0.0f;
}

}  // namespace louver
