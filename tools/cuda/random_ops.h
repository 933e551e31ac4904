// Attention ops without a model, for timing kernels: they say nothing of how much a real cache prunes.
#pragma once

#include "captured.h"

namespace louver::bench {

// n_layer layers in the shape of Llama-3.2-3B (24 query heads on 8 KV heads of dimension 128, F16) over n_kv cells. Channels are
// independent and normal, those of keys around a mean of their own; queries are long enough that few keys weigh much. Every layer
// has the same cache in memory of its own, and other queries.
std::vector<CapturedOp> random_ops(int n_layer, int64_t n_kv);

}  // namespace louver::bench
