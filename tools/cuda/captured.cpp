#include "captured.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "ggml-cuda-extension.h"
#include "ggml-cuda.h"
#include "ggml-impl.h"

namespace louver::bench {
namespace {

// Runs while the extension that is registered is ours.
bool take(void * context, int, void * stream, ggml_tensor * op) {
    auto & ops = *static_cast<std::vector<CapturedOp> *>(context);
    CapturedOp captured{*op->src[0], *op->src[1], *op->src[2], *op->src[3], *op, {}};
    const size_t query_bytes = (ggml_nbytes(op->src[0]) + 255) / 256 * 256;
    captured.content = cuda::Memory(query_bytes + ggml_nbytes(op->src[3]));
    const auto to = captured.content.as<std::byte>();
    const auto on = static_cast<cudaStream_t>(stream);
    cuda::check(cudaMemcpyAsync(to, op->src[0]->data, ggml_nbytes(op->src[0]), cudaMemcpyDeviceToDevice, on), "capture");
    cuda::check(cudaMemcpyAsync(to + query_bytes, op->src[3]->data, ggml_nbytes(op->src[3]), cudaMemcpyDeviceToDevice, on),
                "capture");
    captured.query.data = to;
    captured.mask.data = to + query_bytes;
    ops.push_back(std::move(captured));
    return false;
}

// A tensor of ours that looks like a captured one.
ggml_tensor * like(ggml_context * context, const ggml_tensor & captured) {
    ggml_tensor * tensor = ggml_new_tensor(context, captured.type, GGML_MAX_DIMS, captured.ne);
    std::copy(std::begin(captured.nb), std::end(captured.nb), std::begin(tensor->nb));
    tensor->data = captured.data;
    tensor->buffer = captured.buffer;
    tensor->view_src = captured.view_src;
    tensor->view_offs = captured.view_offs;
    return tensor;
}

}  // namespace

std::vector<CapturedOp> begin_capture_and(void (*step)(void *), void * context) {
    std::vector<CapturedOp> ops;
    const ggml_cuda_extension extension = {&ops, [](void *, int, const ggml_cgraph *) { return true; },
                                           [](void *, int, void *, const ggml_cgraph *, bool) {}, take};
    ggml_cuda_set_extension(&extension);
    step(context);
    ggml_cuda_set_extension(nullptr);
    cuda::check(cudaDeviceSynchronize(), "capture");
    return ops;
}

LayerGraph::LayerGraph(const std::vector<CapturedOp> & ops, int64_t n_kv)
    : backend_(ggml_backend_cuda_init(0), ggml_backend_free),
      context_(nullptr, ggml_free),
      buffer_(nullptr, ggml_backend_buffer_free) {
    if (backend_ == nullptr) {
        throw std::runtime_error("ggml cannot use CUDA device 0");
    }
    const size_t n_tensors = ops.size() * 6;
    context_.reset(ggml_init({n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false), nullptr, true}));
    graph_ = ggml_new_graph_custom(context_.get(), n_tensors, false);
    // One mask for all layers, as llama.cpp has it.
    ggml_tensor mask_of_first = ops.front().mask;
    mask_of_first.ne[0] = n_kv;
    ggml_tensor * mask = like(context_.get(), mask_of_first);
    mask->buffer = ops.front().keys.buffer;  // any of the device: where the data lies is all that counts
    mask->view_src = nullptr;
    for (const CapturedOp & captured : ops) {
        ggml_tensor keys_of_n = captured.keys;
        ggml_tensor values_of_n = captured.values;
        keys_of_n.ne[1] = values_of_n.ne[1] = n_kv;
        ggml_tensor * query = like(context_.get(), captured.query);
        query->buffer = captured.keys.buffer;
        query->view_src = nullptr;
        float scale = 0;
        std::memcpy(&scale, captured.op.op_params, sizeof(scale));
        ggml_tensor * output = ggml_flash_attn_ext(context_.get(), query, like(context_.get(), keys_of_n),
                                                   like(context_.get(), values_of_n), mask, scale, 0.0f, 0.0f);
        std::copy(std::begin(captured.op.op_params), std::end(captured.op.op_params), std::begin(output->op_params));
        ggml_build_forward_expand(graph_, output);
        outputs_.push_back(output);
    }
    buffer_.reset(ggml_backend_alloc_ctx_tensors(context_.get(), backend_.get()));
    if (buffer_ == nullptr) {
        throw std::runtime_error("no device memory for the outputs");
    }
}

void LayerGraph::run(int n) {
    for (int i = 0; i < n; ++i) {
        if (ggml_backend_graph_compute_async(backend_.get(), graph_) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("the graph of all layers failed");
        }
    }
    ggml_backend_synchronize(backend_.get());
}

std::vector<float> LayerGraph::output(int layer) const {
    const ggml_tensor * tensor = outputs_[static_cast<size_t>(layer)];
    std::vector<float> content(ggml_nelements(tensor));
    ggml_backend_tensor_get(tensor, content.data(), 0, ggml_nbytes(tensor));
    return content;
}

}  // namespace louver::bench
