// The slack of the scan, term by term. docs/guarantee.md derives each constant; all kernels use these.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/kernels.h"

// The GPU's scan has the same slack.
#ifdef __CUDACC__
#define LOUVER_ANYWHERE __host__ __device__
#else
#define LOUVER_ANYWHERE
#endif

namespace louver {

// Half an ulp of 1 in float32: the relative error of one rounded operation.
inline constexpr float kUnit = 0x1p-24f;

// Covers the relative error of a float32 norm of up to 1024 elements, whatever the order of summation.
inline constexpr float kNormInflation = 1.0f + 0x1p-12f;

// Covers the relative error of every 2^x in use and of the float32 sums of weights inside a block or chunk.
inline constexpr double kWeightError = 0x1p-16;

// Weights are kept at or above this, so that an upper bound never underflows to zero.
inline constexpr float kMinLog2 = -120.0f;

// The scan's upper weight of x is 2^floor(x) * (1 + x - floor(x)), the chord of 2^x over each octave: the float whose bits are
// the integer next to (x + kExponentBias) * kExponentUnit. It lies above 2^x, by this factor at most (docs/guarantee.md).
inline constexpr float kExponentBias = 127.0f;
inline constexpr float kExponentUnit = 0x1p23f;
inline constexpr float kChordExcess = 1.06148f;
inline constexpr float kMeanChordExcess = 1.0406f;

// The query scaled by a block's steps is rounded to integers in -kQueryLevels..kQueryLevels, each 256 * high + low with
// high and low in int8: two integer dot products with the codes. (One of 8 bits left two thirds of the slack to the query's
// rounding: docs/performance.md.)
inline constexpr float kQueryLevels = 127.0f * 256.0f;

// A query scaled by the steps that nowhere reaches this is rounded to zero: it is bounded without its codes.
inline constexpr float kTinyScaledQuery = 0x1p-40f;

// The norm of a query is at most this, so that it does not overflow when it is scaled to levels (by 2^40 * kQueryLevels at most).
inline constexpr float kMaxQueryNorm = 0x1p72f;

// One query head against a run of blocks: how its scaled query q * step is rounded to levels * quantum, and the slack of a
// block as a linear form in what the index knows of the block. In log2 units where not said otherwise.
struct HeadBound {
    float inverse;   // of the quantum of q.k: levels = round(q * inverse * step)
    float quantum;   // of q.k
    float residual;  // slack per unit of residual_norm,
    float code;      // of code_norm,
    float center;    // of center_norm,
    float constant;  // and of any block
};

// largest: max |q_c * step_c| over the channels and blocks; query_norm: |q|, rounded up.
LOUVER_ANYWHERE static inline HeadBound head_bound(float largest, float query_norm, int dim, float to_log2, float reference,
                                                   bool certified) {
    const float d = static_cast<float>(dim);
    const bool tiny = largest < kTinyScaledQuery;
    HeadBound bound;
    bound.inverse = tiny ? 0.0f : kQueryLevels / largest;
    bound.quantum = tiny ? 0.0f : largest / kQueryLevels;
#ifdef LOUVER_ZERO_SLACK
    certified = false;  // the negative control of the tests: what they check has to fail then
#endif
    if (!certified) {
        bound.residual = bound.code = bound.center = bound.constant = 0;
        return bound;
    }
    const float unit = to_log2 * kNormInflation;
    // Rounding to levels is off by half a quantum, and by a hundredth for the products' own rounding, in each channel.
    const float off = tiny ? kTinyScaledQuery * d : 0.51f * bound.quantum * std::sqrt(d);
    // The float32 sum that is the base, its sum with the integer part, and the change of unit: relative to their magnitude,
    // at most query_norm * center_norm + 384 * largest * dim.
    const float rounding = (2.0f * d + 24.0f) * kUnit;
    bound.residual = query_norm * unit;
    bound.code = off * unit;
    bound.center = rounding * query_norm * unit;
    bound.constant = (rounding * 384.0f * d * largest * to_log2 + 8.0f * kUnit * (std::fabs(reference) + 2.0f * kExponentBias)) *
                     kNormInflation;
    return bound;
}

LOUVER_ANYWHERE static inline float block_slack(const HeadBound & head, const BlockBounds & block) {
    return head.residual * block.residual_norm + head.code * block.code_norm + head.center * block.center_norm + head.constant;
}

// What turns a query's integer dot products with a block's codes into upper weights (kExponentUnit): dot * scale + offset.
struct ToWeight {
    float scale;
    float offset;
};

// The offset is infinity, which makes every weight infinite, where the sum may overflow on the way: a step that ended at
// -infinity would be no bound.
static inline ToWeight to_weight(const HeadBound & head, float base, float slack, int dim, float to_log2, float reference) {
    ToWeight to;
    to.scale = head.quantum * (to_log2 * kExponentUnit);
    to.offset = (base * to_log2 - reference + slack + kExponentBias) * kExponentUnit;
    const float most = std::fabs(to.offset) + to.scale * (255.0f * kQueryLevels * static_cast<float>(dim));
    if (!(most < 0x1p127f)) {
        to.offset = HUGE_VALF;
    }
    return to;
}

// At most 2^(-2 * slack) / kChordExcess, the factor from a cell's upper weight down to its lower: (1 - x/4)^4 <= e^-x for
// 0 <= x <= 4.
static inline float lower_factor(float slack) {
    const float root = 1.0f - slack * 0.34658f;  // 2 ln 2 / 4, rounded up
    return root > 0.0f ? root * root * root * root * ((1.0f - 0x1p-20f) / kChordExcess) : 0.0f;
}

}  // namespace louver
