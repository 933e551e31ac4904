// Thresholds from the scores of a sample: the paper's oracles (arXiv 2605.06763), with the definitions of its code, for which
// louver/oracle.h has a line each. Its sample-top-p, a share of the sample's softmax mass, is the mass oracle's business here.
#pragma once

#include <span>

#include "louver/oracle.h"

namespace louver {

// Throws std::invalid_argument for a parameter out of range.
void validate(const Oracle & oracle);

// tau for a sampling oracle. scores: q.k of the sample, in any order, reordered; what is not finite is left out. Fewer than k:
// the smallest. None: -infinity.
double sample_threshold(const Oracle & oracle, std::span<double> scores);

}  // namespace louver
