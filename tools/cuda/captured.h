// One decode step's attention ops as they came to ggml-cuda: what each layer asks of its cache, kept for measuring.
#pragma once

#include <memory>
#include <vector>

#include "cuda/device.h"
#include "ggml-backend.h"
#include "ggml.h"

namespace louver::bench {

struct CapturedOp {
    ggml_tensor query;  // as the op's own; the data is in `content`
    ggml_tensor keys;   // views of the cache, which stays where it is
    ggml_tensor values;
    ggml_tensor mask;
    ggml_tensor op;
    cuda::Memory content;
};

// Calls `step`, which decodes one token, and returns its attention ops. Whatever extension was registered is gone after it.
std::vector<CapturedOp> begin_capture_and(void (*step)(void *), void * context);

template <class F> std::vector<CapturedOp> capture(F && step) {
    return begin_capture_and([](void * context) { (*static_cast<F *>(context))(); }, &step);
}

// The ops of all layers over the first n_kv cells as one graph of a CUDA backend of its own.
class LayerGraph {
  public:
    LayerGraph(const std::vector<CapturedOp> & ops, int64_t n_kv);
    // n times, and waits for the last: what the host does meanwhile is no part of a layer.
    void run(int n);
    std::vector<float> output(int layer) const;
    int n_layer() const { return static_cast<int>(outputs_.size()); }

  private:
    std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)> backend_;
    std::unique_ptr<ggml_context, decltype(&ggml_free)> context_;
    std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> buffer_;
    std::vector<ggml_tensor *> outputs_;
    ggml_cgraph * graph_;
};

}  // namespace louver::bench
