#include "ggml/registry.h"

#include <algorithm>
#include <vector>

#include "ggml/buffer_watch.h"

namespace louver {

// Never destroyed: llama.cpp may free its buffers after static destructors have run.
Registry & Registry::instance() {
    static Registry * registry = new Registry();
    return *registry;
}

Cache * Registry::find(const void * k_data) {
    const std::lock_guard lock(mutex_);
    const auto found = caches_.find(reinterpret_cast<uintptr_t>(k_data));
    return found == caches_.end() ? nullptr : found->second.get();
}

Cache * Registry::add(std::unique_ptr<Cache> cache, ggml_backend_buffer * k_buffer, ggml_backend_buffer * v_buffer) {
    forget(cache->k.data, cache->k.size());
    forget(cache->v.data, cache->v.size());
    watch_buffer(k_buffer);
    watch_buffer(v_buffer);

    const std::lock_guard lock(mutex_);
    Cache * added = cache.get();
    for (const CachePlane * plane : {&added->k, &added->v}) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(plane->data);
        spans_[begin] = {begin + plane->size(), added, plane};
    }
    caches_[reinterpret_cast<uintptr_t>(added->k.data)] = std::move(cache);
    set_limits();
    ++changes();
    return added;
}

// Calls f(span, first, last) for the spans that meet [begin, end), with the part of it that they share.
template <class F> void Registry::for_spans(uintptr_t begin, uintptr_t end, F && f) {
    auto it = spans_.upper_bound(begin);
    if (it != spans_.begin()) {
        --it;
    }
    for (; it != spans_.end() && it->first < end; ++it) {
        const uintptr_t first = std::max(begin, it->first);
        const uintptr_t last = std::min(end, it->second.end);
        if (first < last) {
            f(it->second, first - it->first, last - it->first);
        }
    }
}

Registry::Place Registry::at(const void * address) {
    const uintptr_t a = reinterpret_cast<uintptr_t>(address);
    const std::lock_guard lock(mutex_);
    Place place;
    for_spans(a, a + 1, [&](const Span & span, size_t first, size_t) {
        place = {span.cache, static_cast<int64_t>(first / span.plane->row_size), span.plane->row_size};
    });
    return place;
}

void Registry::written(const void * address, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const std::lock_guard lock(mutex_);
    for_spans(begin, begin + size, [](const Span & span, size_t first, size_t last) {
        const size_t row = first / span.plane->row_size;
        const size_t end = (last - 1) / span.plane->row_size + 1;
        span.cache->invalidate(static_cast<int64_t>(row), static_cast<int64_t>(end - row));
    });
}

void Registry::forget(const void * address, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const std::lock_guard lock(mutex_);
    std::vector<Cache *> found;
    for_spans(begin, begin + size, [&](const Span & span, size_t, size_t) { found.push_back(span.cache); });
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    for (Cache * cache : found) {
        erase(cache);
    }
    set_limits();
}

void Registry::forget(const Runtime * owner) {
    const std::lock_guard lock(mutex_);
    std::vector<Cache *> found;
    for (const auto & [address, cache] : caches_) {
        if (cache->owner == owner) {
            found.push_back(cache.get());
        }
    }
    for (Cache * cache : found) {
        erase(cache);
    }
    ++changes();  // whatever counts for it, with or without a cache
    set_limits();
}

void Registry::erase(Cache * cache) {
    std::erase_if(spans_, [&](const auto & entry) { return entry.second.cache == cache; });
    caches_.erase(reinterpret_cast<uintptr_t>(cache->k.data));
    ++changes();
}

void Registry::set_limits() {
    uintptr_t low = UINTPTR_MAX;
    uintptr_t high = 0;
    for (const auto & [begin, span] : spans_) {
        if (!span.cache->on_host()) {
            continue;
        }
        low = std::min(low, begin);
        high = std::max(high, span.end);
    }
    low_.store(low, std::memory_order_relaxed);
    high_.store(high, std::memory_order_relaxed);
}

}  // namespace louver
