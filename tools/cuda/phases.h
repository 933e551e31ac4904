// Where a step's time goes: our kernels one after another on captured ops, each between two events.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "captured.h"
#include "louver/decode.h"

namespace louver::bench {

struct Phases {
    std::map<std::string, double> microseconds;  // of a layer: medians over layers and rounds
    double graph_microseconds = 0;               // of a layer where nothing stands between kernels: a CUDA graph of all layers
    double scan_bytes = 0;                       // of a layer, codes and grids and what belongs to them
    double survivors = 0;                        // share of the (key, KV head) pairs
    double index_share = 0;                      // of the bytes of K and V
    double build_microseconds = 0;               // of the index of a layer, all at once
};

Phases phases_of(const std::vector<CapturedOp> & ops, int64_t n_kv, const DecodeSettings & settings, int n_rounds);

// Bytes per second that a copy within the device moves, read and written counted.
double copy_bandwidth();

double median(std::vector<double> values);

}  // namespace louver::bench
