#include "phases.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>

#include "cuda/attention.h"

namespace louver::bench {
namespace {

class Event {
  public:
    Event() { cuda::check(cudaEventCreate(&event_), "cudaEventCreate"); }
    ~Event() { cudaEventDestroy(event_); }
    Event(const Event &) = delete;
    Event & operator=(const Event &) = delete;
    void record(cudaStream_t stream = nullptr) { cuda::check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
    double microseconds_since(const Event & before) const {
        float milliseconds = 0;
        cuda::check(cudaEventSynchronize(event_), "cudaEventSynchronize");
        cuda::check(cudaEventElapsedTime(&milliseconds, before.event_, event_), "cudaEventElapsedTime");
        return 1e3 * static_cast<double>(milliseconds);
    }

  private:
    cudaEvent_t event_ = nullptr;
};

cuda::Plane plane_of(const ggml_tensor & view) {
    const DType type = view.type == GGML_TYPE_F16 ? DType::f16 : view.type == GGML_TYPE_BF16 ? DType::bf16 : DType::q8_0;
    return {static_cast<const std::byte *>(view.data), static_cast<int64_t>(view.nb[1]), static_cast<int64_t>(view.nb[2]),
            static_cast<int>(view.ne[0]), type};
}

// Of a layer, which `launch` puts on a stream.
double graph_microseconds(size_t n_layer, const std::function<void(size_t layer, cudaStream_t stream)> & launch) {
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda::check(cudaStreamCreate(&stream), "cudaStreamCreate");
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    for (size_t layer = 0; layer < n_layer; ++layer) {
        launch(layer, stream);
    }
    cuda::check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    cuda::check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    std::vector<double> times;
    constexpr int kRounds = 12;
    for (int round = 0; round < kRounds; ++round) {
        Event begin;
        Event end;
        begin.record(stream);
        cuda::check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
        end.record(stream);
        const double microseconds = end.microseconds_since(begin) / static_cast<double>(n_layer);
        if (round >= 2) {
            times.push_back(microseconds);
        }
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    return median(times);
}

}  // namespace

double median(std::vector<double> values) {
    if (values.empty()) {
        return 0;
    }
    std::sort(values.begin(), values.end());
    return 0.5 * (values[(values.size() - 1) / 2] + values[values.size() / 2]);
}

double copy_bandwidth() {
    constexpr size_t kBytes = size_t{1} << 30;
    const cuda::Memory from(kBytes);
    const cuda::Memory to(kBytes);
    std::vector<double> times;
    for (int i = 0; i < 12; ++i) {
        Event begin;
        Event end;
        begin.record();
        cuda::check(cudaMemcpyAsync(to.as<std::byte>(), from.as<std::byte>(), kBytes, cudaMemcpyDeviceToDevice, nullptr), "copy");
        end.record();
        times.push_back(end.microseconds_since(begin));
    }
    return 2.0 * static_cast<double>(kBytes) / (median(times) * 1e-6);
}

Phases phases_of(const std::vector<CapturedOp> & ops, int64_t n_kv, const DecodeSettings & settings) {
    Phases found;
    std::vector<std::unique_ptr<cuda::CacheIndex>> indexes;
    std::vector<cuda::AttentionOp> calls;
    cuda::Workspace space(0);
    const cuda::Memory output(1 << 20);
    for (const CapturedOp & captured : ops) {
        const auto n_head_kv = static_cast<int>(captured.keys.ne[2]);
        const auto n_head = static_cast<int>(captured.query.ne[2]);
        indexes.push_back(std::make_unique<cuda::CacheIndex>(0, plane_of(captured.keys), plane_of(captured.values), 1, n_head_kv,
                                                             n_kv, n_head / n_head_kv));
        cuda::AttentionOp op;
        op.n_head = n_head;
        op.n_kv = static_cast<int>(n_kv);
        std::memcpy(&op.scale, captured.op.op_params, sizeof(op.scale));
        op.query = static_cast<const std::byte *>(captured.query.data);
        op.query_token_stride = static_cast<int64_t>(captured.query.nb[1]);
        op.query_head_stride = static_cast<int64_t>(captured.query.nb[2]);
        op.output = output.as<std::byte>();
        op.output_head_stride = static_cast<int64_t>(captured.op.nb[1]);
        op.output_token_stride = static_cast<int64_t>(captured.op.nb[2]);
        op.mask = {static_cast<const std::byte *>(captured.mask.data), static_cast<int64_t>(captured.mask.nb[1]), 0};
        op.settings = settings;
        calls.push_back(op);
        Event begin;
        Event end;
        begin.record();
        indexes.back()->build(0, n_kv, nullptr);
        end.record();
        found.build_microseconds += end.microseconds_since(begin) / static_cast<double>(ops.size());
    }
    space.see(*indexes[0], calls[0], nullptr);
    cuda::check(cudaDeviceSynchronize(), "see");
    found.scan_microseconds = graph_microseconds(
        ops.size(), [&](size_t layer, cudaStream_t stream) { space.scan(*indexes[layer], calls[layer], stream); });
    found.step_microseconds = graph_microseconds(
        ops.size(), [&](size_t layer, cudaStream_t stream) { space.attend(*indexes[layer], calls[layer], stream); });
    cuda::Totals all{};
    double runs = 0;
    double cache = 0;
    double index = 0;
    for (size_t layer = 0; layer < ops.size(); ++layer) {
        const cuda::Totals totals = indexes[layer]->totals();
        runs += static_cast<double>(totals.tokens[0] + totals.tokens[1]);
        all.group_scanned += totals.group_scanned;
        all.group_attended += totals.group_attended;
        all.group_visible += totals.group_visible;
        index += static_cast<double>(indexes[layer]->bytes());
        cache += static_cast<double>(n_kv) * static_cast<double>(ops[layer].keys.nb[1] + ops[layer].values.nb[1]);
    }
    found.scan_bytes = static_cast<double>(all.group_scanned) * static_cast<double>(indexes[0]->bytes_per_cell()) / runs;
    found.survivors = static_cast<double>(all.group_attended) / static_cast<double>(all.group_visible);
    found.index_share = index / cache;
    return found;
}

}  // namespace louver::bench
