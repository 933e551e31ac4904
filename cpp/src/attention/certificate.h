// What is proven of one query's output, from what the threads found (docs/guarantee.md).
#pragma once

#include "attention/scratch.h"
#include "louver/decode.h"

namespace louver {

// How far float32 may be from the exact score of a key of that norm, in log2 units.
double score_error(float query_norm, float key_norm, int dim, double to_log2);

// A dropped cell's upper weight is under the threshold; its q.k is under this. reference: log2 units.
float tau_of(float threshold, float reference, double to_log2);

// |output - dense| is at most this: (largest |value| + |output|) * max((y + U) / (K + U), y / K) with U dropped at most, y added
// by compensation, K kept at least (docs/guarantee.md, "The output").
float error_bound(double dropped, double compensation, double least, double value_norm, double output_norm);

// delta and error_bound. all: the team's parts together; unit: 2^all.peak; score_error as above; total: lower bound on the mass
// that the oracle used, in units of 2^reference; output_norm: |output|.
void certify(const Partial & all, double unit, double score_error, double total, double output_norm,
             HeadCertificate & certificate);

}  // namespace louver
