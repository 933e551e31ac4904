// Threshold oracles: what chooses tau for a query.
#pragma once

#include <cstdint>

namespace louver {

enum class OracleKind : uint8_t {
    fixed,            // tau itself
    sample_max,       // the largest score of the sample
    sample_mean_max,  // halfway between the sample's mean and its largest score
    sample_top_k,     // the k-th largest score of the sample
    sample_gap,       // the score below the highest of the three widest gaps in the upper half of the sorted sample
    budget,           // the score that a fraction of the sample reaches
    top_k,            // the k-th largest score of all keys
    mass,             // the largest whose dropped softmax mass is provably at most epsilon (louver/mass_oracle.h)
};

// Whether it takes its threshold from the scores of a sample.
constexpr bool samples(OracleKind kind) { return kind >= OracleKind::sample_max && kind <= OracleKind::budget; }

struct Oracle {
    OracleKind kind = OracleKind::mass;
    double tau = 0;         // fixed: of q.k, not NaN
    double epsilon = 0.05;  // mass: in [0, 1)
    double fraction = 0.1;  // budget: in (0, 1]
    int64_t k = 16;         // sample_top_k, top_k: >= 1
    int n_samples = 256;    // of the sampling ones: >= 1
    uint64_t seed = 0;      // of their sample
};

}  // namespace louver
