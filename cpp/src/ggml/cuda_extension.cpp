#include "ggml/cuda_extension.h"

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/attention.h"
#include "cuda/device.h"
#include "ggml-cuda-extension.h"
#include "ggml-cuda.h"
#include "ggml-impl.h"
#include "ggml/device_cache.h"
#include "ggml/registry.h"

namespace louver {
namespace {

// More query tokens to a stream than this, and stock's kernel, which reads the cache once for all of them, is cheaper.
constexpr int kMostTokens = 4;

// Graphs remembered, before all are forgotten and captured anew.
constexpr size_t kMostGraphs = 512;

// What an op of a graph came to. A replay computes the same, and counts the same.
struct Action {
    Runtime * owner;
    DeviceCache * cache;  // null: not looked at
    Reason reason;        // stock's; none: ours
    int64_t n_query;
    DeviceCache::Step step;
};

struct Graph {
    int64_t changes = -1;
    int64_t workspace_generation = -1;
    std::vector<Action> actions;
    bool has_no_owner = false;  // an attention op of it counts for nobody
};

// The graph that this thread launches the nodes of.
struct Evaluation {
    std::shared_ptr<Graph> graph;
    // What of the mask the workspace has seen, since the graph began.
    const void * mask = nullptr;
    int64_t n_kv = 0;
    int n_row = 0;
    int sinks = 0;
    int recent = 0;
    int64_t workspace_generation = -1;
};
thread_local Evaluation evaluation;

class Engine {
  public:
    explicit Engine(const std::vector<cuda::Device> & devices) {
        for (const cuda::Device & device : devices) {
            supported_.push_back(device.supported() ? 1 : 0);
        }
    }

    bool changed(int device, const ggml_cgraph * graph) {
        const std::lock_guard lock(mutex_);
        const auto found = graphs_.find(key(device, graph));
        // With the workspace it was launched with; another stream's is not known before the launch.
        return found == graphs_.end() || found->second->changes != changes().load() ||
               found->second->workspace_generation != generation_ ||
               (found->second->has_no_owner && Runtime::current() != nullptr);
    }

    void compute(int device, void * stream, const ggml_cgraph * graph, bool replayed) {
        const std::lock_guard lock(mutex_);
        if (graphs_.size() > kMostGraphs) {
            graphs_.clear();
        }
        std::shared_ptr<Graph> & known = graphs_[key(device, graph)];
        if (replayed && known != nullptr) {
            for (const Action & action : known->actions) {
                apply(action);
            }
            return;
        }
        known = std::make_shared<Graph>(Graph{changes().load(), generation_, {}});
        evaluation = {};
        evaluation.graph = known;
        mark_writes(device, stream, graph);
    }

    bool attention(int device, void * stream, const ggml_tensor * op) {
        AttentionView view{};
        const Reason unread = view.read(op);
        Runtime * owner = view.owner();
        if (evaluation.graph == nullptr) {
            return false;
        }
        if (owner == nullptr) {
            evaluation.graph->has_no_owner = true;  // until a runtime finds it
            return false;
        }
        const std::lock_guard lock(mutex_);
        const bool is_copy = unread == Reason::layout && view.k_cache == nullptr;  // for this op, by ggml's scheduler
        Action action{owner, nullptr, is_copy ? Reason::host_cache : unread, view.n_query(), {}};
        if (unread == Reason::none) {
            action = decide(device, stream, view, owner);
        }
        // What it was launched with, if caches or the workspace are new.
        evaluation.graph->changes = changes().load();
        evaluation.graph->workspace_generation = generation_;
        evaluation.graph->actions.push_back(action);
        apply(action);
        return action.reason == Reason::none;
    }

  private:
    static std::pair<int, const void *> key(int device, const ggml_cgraph * graph) {
        return {device, graph->n_nodes > 0 ? graph->nodes[0] : nullptr};
    }

    // By the counts of changes it is certain that owner and cache are still there.
    static void apply(const Action & action) {
        if (action.reason != Reason::none) {
            action.owner->count(Path::stock, action.reason, action.n_query);
        }
        if (action.cache != nullptr) {
            action.cache->step = action.step;
            action.cache->is_current = action.reason == Reason::none || action.reason == Reason::prefill;
        }
    }

    // A stream's workspace lives as long as a cache that was attended to on it.
    cuda::Workspace & workspace(int device, void * stream, DeviceCache & cache) {
        std::weak_ptr<cuda::Workspace> & found = workspaces_[{device, stream}];
        std::shared_ptr<cuda::Workspace> space = found.lock();
        if (space == nullptr) {
            space = std::make_shared<cuda::Workspace>(device);
            found = space;
        }
        cache.workspaces.insert(space);
        return *space;
    }

    // The rows that this graph will write are cleared from the indexes before any of its nodes runs. ROPE and SET_ROWS may be
    // fused and nodes reordered, but the row numbers are inputs of the graph, and nothing indexes a row before its layer's
    // attention.
    void mark_writes(int device, void * stream, const ggml_cgraph * graph) {
        std::map<std::tuple<const void *, bool, int64_t>, std::vector<cuda::CacheIndex::Target>> by_rows;
        for (int i = 0; i < graph->n_nodes; ++i) {
            const ggml_tensor * node = graph->nodes[i];
            if (node->data == nullptr || node->op == GGML_OP_NONE || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE ||
                node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE) {
                continue;
            }
            const Registry::Place place = Registry::instance().at(node->data);
            if (place.cache == nullptr || place.cache->on_host() || place.cache->owner->stale()) {
                continue;
            }
            const cuda::CacheIndex & index = static_cast<DeviceCache *>(place.cache)->index;
            if (index.device() != device) {
                continue;
            }
            const ggml_tensor * rows = node->src[1];
            const bool listed = node->op == GGML_OP_SET_ROWS && node->nb[1] == place.row_size && node->ne[2] == 1 &&
                                node->ne[3] == 1 && rows->op == GGML_OP_NONE && rows->view_src == nullptr &&
                                ggml_is_contiguous(rows) && rows->buffer != nullptr && !ggml_backend_buffer_is_host(rows->buffer);
            if (listed) {
                by_rows[{rows->data, rows->type == GGML_TYPE_I64, ggml_nelements(rows)}].push_back({&index, place.row});
            } else {
                const int64_t count = static_cast<int64_t>((ggml_nbytes(node) + place.row_size - 1) / place.row_size) + 1;
                cuda::write_range(index, place.row, std::min(count, place.cache->n_stream * place.cache->kv_size - place.row),
                                  stream);
            }
        }
        for (const auto & [rows, targets] : by_rows) {
            const auto & [data, wide, n] = rows;
            cuda::write_rows(targets, data, wide, static_cast<int>(n), stream);
        }
    }

    Action decide(int device, void * stream, const AttentionView & view, Runtime * owner) {
        const RuntimeConfig config = owner->config();
        Action action{owner, nullptr, Reason::none, view.n_query(), {}};
        const auto stock = [&](Reason reason) {
            action.reason = reason;
            return action;
        };
        Cache * known = Registry::instance().find(view.k_cache->data);
        if (known != nullptr && !known->on_host() && view.reads(*known)) {
            action.cache = static_cast<DeviceCache *>(known);
        }
        const ggml_backend_dev_t here = ggml_backend_reg_dev_get(ggml_backend_cuda_reg(), static_cast<size_t>(device));
        if (!config.enabled) return stock(Reason::disabled);
        if (config.n_ctx > view.kv_size) return stock(Reason::sliding_window);
        if (supported_.at(static_cast<size_t>(device)) == 0) return stock(Reason::device);
        if (ggml_backend_buft_get_device(ggml_backend_buffer_get_type(view.k_cache->buffer)) != here ||
            ggml_backend_buft_get_device(ggml_backend_buffer_get_type(view.v_cache->buffer)) != here) {
            return stock(Reason::layout);
        }
        if (view.k_type != view.v_type || view.k_type == DType::q4_0) return stock(Reason::cache_type);
        if (cuda::unsupported(device_plane(view.k_plane()), device_plane(view.v_plane())) != nullptr)
            return stock(Reason::head_dim);
        const bool prefill = view.n_token > kMostTokens || view.n_query() > cuda::kMaxRows;
        // A cache that can never be deep enough gets no index.
        if (view.kv_size < config.min_context_gpu || (!prefill && view.n_kv < config.min_context_gpu)) {
            return stock(prefill ? Reason::prefill : Reason::below_min_context);
        }
        if (action.cache == nullptr) {
            action.cache = add(device, view, owner);
            if (action.cache == nullptr) return stock(Reason::device_memory);
        }
        cuda::Workspace & space = workspace(device, stream, *action.cache);
        cuda::AttentionOp op = op_of(view, config.decode);
        try {
            space.reserve(action.cache->index, op.n_head, prefill ? std::min(op.n_stream, cuda::kMaxRows) : view.n_query());
            if (!prefill && !space.fits(action.cache->index, op)) return stock(Reason::device);
        } catch (const cuda::Error &) {
            cudaGetLastError();
            return stock(Reason::device_memory);
        }
        if (prefill) {
            // Brings the index up to date with what the last token sees.
            if (op.mask.data != nullptr) {
                op.mask.data += static_cast<int64_t>(op.n_token - 1) * op.mask.token_stride;
            }
            op.n_token = 1;
            if (op.n_stream <= cuda::kMaxRows) {
                space.see(action.cache->index, op, stream);
                note({});
                space.repair(action.cache->index, op, stream);
            }
            return stock(Reason::prefill);
        }
        see(space, *action.cache, op, stream);
        if (!action.cache->is_current && config.decode.epsilon > 0 && !is_capturing(stream)) {
            space.repair(action.cache->index, op, stream);  // else the step itself finds out, which takes longer
        }
        space.attend(action.cache->index, op, stream);
        action.step = {config.decode.epsilon > 0 ? Path::louver : Path::dense, op.n_token, op.n_stream, op.first_stream};
        return action;
    }

    DeviceCache * add(int device, const AttentionView & view, Runtime * owner) {
        const std::pair<const void *, int64_t> size{view.k_cache->data, view.kv_size};
        if (refused_.count(size) != 0) {
            return nullptr;
        }
        try {
            auto cache = std::make_unique<DeviceCache>(owner, device, view);
            return static_cast<DeviceCache *>(
                Registry::instance().add(std::move(cache), view.k_cache->buffer, view.v_cache->buffer));
        } catch (const cuda::Error &) {
            cudaGetLastError();
            refused_.insert(size);  // or every step would try again
            return nullptr;
        }
    }

    // The mask's bits, once for all layers that share it.
    void see(cuda::Workspace & space, const DeviceCache & cache, const cuda::AttentionOp & op, void * stream) {
        const Evaluation wanted{evaluation.graph,  op.mask.data,       op.n_kv,           op.n_token * op.n_stream,
                                op.settings.sinks, op.settings.recent, space.generation()};
        const bool same = evaluation.mask == wanted.mask && evaluation.n_kv == wanted.n_kv && evaluation.n_row == wanted.n_row &&
                          evaluation.sinks == wanted.sinks && evaluation.recent == wanted.recent &&
                          evaluation.workspace_generation == wanted.workspace_generation;
        if (!same || evaluation.mask == nullptr) {
            space.see(cache.index, op, stream);
        }
        note(wanted);
    }

    void note(const Evaluation & seen) {
        const std::shared_ptr<Graph> graph = evaluation.graph;
        evaluation = seen;
        evaluation.graph = graph;
        generation_ = 0;
        for (const auto & [at, other] : workspaces_) {
            if (const auto living = other.lock()) {
                generation_ += living->generation();
            }
        }
    }

    static bool is_capturing(void * stream) {
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
        return status != cudaStreamCaptureStatusNone;
    }

    static cuda::AttentionOp op_of(const AttentionView & view, const DecodeSettings & settings) {
        cuda::AttentionOp op;
        op.n_token = view.n_token;
        op.n_stream = view.n_stream;
        op.first_stream = view.first_stream;
        op.n_head = view.n_head;
        op.n_kv = static_cast<int>(view.n_kv);
        op.scale = view.scale;
        op.query = static_cast<const std::byte *>(view.query->data);
        op.query_token_stride = static_cast<int64_t>(view.query->nb[1]);
        op.query_head_stride = static_cast<int64_t>(view.query->nb[2]);
        op.query_stream_stride = static_cast<int64_t>(view.query->nb[3]);
        op.output = static_cast<std::byte *>(view.op->data);
        op.output_head_stride = static_cast<int64_t>(view.op->nb[1]);
        op.output_token_stride = static_cast<int64_t>(view.op->nb[2]);
        op.output_stream_stride = static_cast<int64_t>(view.op->nb[3]);
        if (view.mask != nullptr) {
            op.mask.data = static_cast<const std::byte *>(view.mask->data);
            op.mask.token_stride = static_cast<int64_t>(view.mask->nb[1]);
            op.mask.stream_stride = view.mask->ne[3] == 1 ? 0 : static_cast<int64_t>(view.mask->nb[3]);
        }
        op.settings = settings;
        return op;
    }

    std::mutex mutex_;
    std::vector<char> supported_;
    std::map<std::pair<int, const void *>, std::shared_ptr<Graph>> graphs_;
    std::map<std::pair<int, void *>, std::weak_ptr<cuda::Workspace>> workspaces_;
    int64_t generation_ = 0;  // of all workspaces
    std::set<std::pair<const void *, int64_t>> refused_;
};

}  // namespace

bool has_cuda() { return true; }

std::vector<DeviceInfo> devices() {
    std::vector<DeviceInfo> all;
    for (const cuda::Device & device : cuda::devices()) {
        const std::string capability = std::to_string(device.major) + "." + std::to_string(device.minor);
        all.push_back({device.id, device.name, capability,
                       device.supported() ? "" : "compute capability " + capability + ", the kernels need 8.0"});
    }
    return all;
}

void attach_cuda() {
    const std::vector<cuda::Device> all = cuda::devices();
    if (all.empty()) {
        return;
    }
    static Engine * engine = new Engine(all);  // never destroyed, see Registry::instance
    const ggml_cuda_extension extension = {
        /* .context   = */ engine,
        /* .changed   = */
        [](void * context, int device, const ggml_cgraph * graph) {
            return static_cast<Engine *>(context)->changed(device, graph);
        },
        /* .compute   = */
        [](void * context, int device, void * stream, const ggml_cgraph * graph, bool replayed) {
            static_cast<Engine *>(context)->compute(device, stream, graph, replayed);
        },
        /* .attention = */
        [](void * context, int device, void * stream, ggml_tensor * op) {
            return static_cast<Engine *>(context)->attention(device, stream, op);
        },
    };
    ggml_cuda_set_extension(&extension);
}

}  // namespace louver
