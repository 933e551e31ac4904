#include "louver/runtime.h"

#include <algorithm>

#include "ggml/registry.h"

namespace louver {
namespace {

thread_local std::vector<Runtime *> scopes;

}  // namespace

const char * reason_name(Reason reason) {
    static constexpr const char * kNames[] = {
        "none",          "prefill",     "disabled",   "below_min_context", "sliding_window", "alibi",
        "soft_cap",      "sinks",       "mla",        "n_kv_max",          "mask_values",    "cache_type",
        "layout",        "work_buffer", "not_finite", "epsilon_zero",      "head_dim",       "device",
        "device_memory", "host_cache"};
    static_assert(std::size(kNames) == static_cast<size_t>(Reason::count));
    return kNames[static_cast<size_t>(reason)];
}

Runtime::Runtime(const RuntimeConfig & config) : config_(config) {}

Runtime::~Runtime() { Registry::instance().forget(this); }

RuntimeConfig Runtime::config() const {
    const std::lock_guard lock(mutex_);
    return config_;
}

void Runtime::configure(const RuntimeConfig & config) {
    const std::lock_guard lock(mutex_);
    config_ = config;
    ++changes();
}

void Runtime::enter() {
    scopes.push_back(this);
    capture_.begin_step();
}

void Runtime::exit() {
    if (!scopes.empty() && scopes.back() == this) {
        scopes.pop_back();
    }
}

Runtime * Runtime::current() { return scopes.empty() ? nullptr : scopes.back(); }

Stats Runtime::stats() {
    Registry & registry = Registry::instance();
    registry.for_each(this, [](Cache & cache) { cache.collect(); });
    Stats all;
    {
        const std::lock_guard lock(mutex_);
        all = stats_;
    }
    registry.for_each(this, [&](Cache & cache) { cache.describe(all); });
    return all;
}

void Runtime::reset_stats() {
    Registry::instance().for_each(this, [](Cache & cache) { cache.collect(); });
    const std::lock_guard lock(mutex_);
    stats_ = Stats();
}

void Runtime::set_stale(bool stale) {
    stale_ = stale;
    ++changes();
}

void Runtime::count(Path path, Reason reason, int64_t n) {
    const std::lock_guard lock(mutex_);
    stats_.attention[static_cast<size_t>(path)] += n;
    stats_.reasons[static_cast<size_t>(path)][static_cast<size_t>(reason)] += n;
}

void Runtime::add(const Stats & part) {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < part.attention.size(); ++i) {
        stats_.attention[i] += part.attention[i];
        for (size_t j = 0; j < part.reasons[i].size(); ++j) {
            stats_.reasons[i][j] += part.reasons[i][j];
        }
    }
    stats_.n_queries += part.n_queries;
    stats_.heads_uniform += part.heads_uniform;
    stats_.heads_in_full += part.heads_in_full;
    stats_.keys_visible += part.keys_visible;
    stats_.keys_scanned += part.keys_scanned;
    stats_.keys_attended += part.keys_attended;
    stats_.bytes_read += part.bytes_read;
    stats_.bytes_dense += part.bytes_dense;
    stats_.delta_sum += part.delta_sum;
    stats_.delta_max = std::max(stats_.delta_max, part.delta_max);
    stats_.error_bound_max = std::max(stats_.error_bound_max, part.error_bound_max);
    stats_.checked += part.checked;
    stats_.blocks_built += part.blocks_built;
    stats_.cells_encoded += part.cells_encoded;
}

}  // namespace louver
