// Keeps what a context's decode steps read in attention, for tools that look at it outside of the model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "louver/export.h"

namespace louver {

// One layer, whichever path computes its attention.
struct CapturedLayer {
    int layer = 0;  // whose cache is read; some models have layers that share one
    int n_head = 0;
    int n_head_kv = 0;
    int key_dim = 0;
    int value_dim = 0;
    float scale = 1;     // of q.k
    std::string reason;  // why Louver does not serve the layer (reason_name), or "none"
    std::string type_k;  // ggml's names
    std::string type_v;
    std::vector<float> query;                   // [n_query][n_head][key_dim] of all captured tokens, as the op received them
    std::vector<std::vector<uint8_t>> visible;  // [n_query][cells of the op] 0 or 1
    int64_t n_cell = 0;
    std::vector<uint8_t> k;  // [n_cell][n_head_kv][bytes of a head's row] of the last op that was captured with its cache
    std::vector<uint8_t> v;
};

struct AttentionView;

// One thread at a time: the one that decodes.
class LOUVER_API Capture {
  public:
    // What the next decode steps leave behind: their queries, and all cells of the cache.
    void set(bool queries, bool cache);
    bool is_on() const { return queries_ || cache_; }

    // What was captured since the last call, in the order of the graph.
    std::vector<CapturedLayer> take();

    // For the adapter: a step, and an op of it that is about to be computed. Prefill, and ops over several streams, are passed
    // over.
    void begin_step();
    void see(const AttentionView & op, int layer, const char * reason);

  private:
    bool queries_ = false;
    bool cache_ = false;
    size_t next_ = 0;  // of layers_, in this step
    std::vector<CapturedLayer> layers_;
};

}  // namespace louver
