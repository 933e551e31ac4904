#include "attention/certificate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/bounds.h"

namespace louver {

float error_bound(double dropped, double compensation, double least, double value_norm, double output_norm) {
    if (dropped <= 0) {
        return 0;
    }
    const double upper = dropped * (1.0 + kWeightError);
    const double added = compensation * (1.0 + kWeightError);
    const double share = std::max((added + upper) / (least + upper), added / std::max(least, 1e-300));
    return static_cast<float>((value_norm + output_norm) * share * (1 + 0x1p-20));
}

double score_error(float query_norm, float key_norm, int dim, double to_log2) {
    return (2.0 * dim + 16.0) * kUnit * query_norm * key_norm * to_log2;
}

float tau_of(float threshold, float reference, double to_log2) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    if (!(threshold > 0)) {
        return -kInfinity;
    }
    const double log2_weight = std::log2(static_cast<double>(threshold)) + 4 * kWeightError;
    const double raw =
        (log2_weight + static_cast<double>(reference) + std::fabs(static_cast<double>(reference)) * 0x1p-20) / to_log2;
    return std::nextafter(static_cast<float>(raw), kInfinity);
}

void certify(const Partial & all, double unit, double score_error, double total, double output_norm,
             HeadCertificate & certificate) {
    // The attended cells' exact weights came from float32 scores; the mass proper is at least this. And it is what the dropped
    // cells leave of the oracle's total, which knows the error of each block apart.
    const double scored = all.kept * unit * std::exp2(-score_error);
    const double left = total * (1.0 - kWeightError) - all.dropped * (1.0 + kWeightError);
    const double least = std::max(scored, left);
    certificate.n_scanned = all.scanned;
    certificate.n_attended = all.attended;
    certificate.delta = static_cast<float>(dropped_share(all.dropped, least) * (1 + 0x1p-20));
    certificate.error_bound = error_bound(all.dropped, all.compensation, least, all.value_norm, output_norm);
}

}  // namespace louver
