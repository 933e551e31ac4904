// Our kernels alone on captured ops, all layers in a CUDA graph, so that nothing stands between them.
#pragma once

#include <vector>

#include "captured.h"
#include "louver/decode.h"

namespace louver::bench {

struct Phases {
    double step_microseconds = 0;   // of a layer, as the next two
    double scan_microseconds = 0;   // by the kernel that does nothing else
    double build_microseconds = 0;  // of the whole index at once
    double scan_bytes = 0;          // of a layer, codes and grids and what belongs to them
    double survivors = 0;           // share of the (key, KV head) pairs
    double index_share = 0;         // of the bytes of K and V
};

Phases phases_of(const std::vector<CapturedOp> & ops, int64_t n_kv, const DecodeSettings & settings);

// Bytes per second that a copy within the device moves, read and written counted.
double copy_bandwidth();

double median(std::vector<double> values);

}  // namespace louver::bench
