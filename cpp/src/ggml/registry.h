// Every cache that has been seen, by address; and every way its bytes can change, made known to its index.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "ggml/cache.h"

struct ggml_backend_buffer;

namespace louver {

// How often anything has changed that decides what is computed for an op: settings, caches.
inline std::atomic<int64_t> & changes() {
    static std::atomic<int64_t> count{0};
    return count;
}

class Registry {
  public:
    static Registry & instance();

    // The cache whose K starts at this address, or null. The cache lives until its buffer is freed.
    Cache * find(const void * k_data);

    // Replaces whatever was known at these addresses. `buffer` holds both planes; from now on its writes are seen.
    Cache * add(std::unique_ptr<Cache> cache, ggml_backend_buffer * k_buffer, ggml_backend_buffer * v_buffer);

    // Whether a write there could concern a cache in host memory; cheap, and never wrongly false.
    bool may_hold(const void * address) const {
        const uintptr_t a = reinterpret_cast<uintptr_t>(address);
        return a >= low_.load(std::memory_order_relaxed) && a < high_.load(std::memory_order_relaxed);
    }

    // The cache that holds this address, and the row there; null: none.
    struct Place {
        Cache * cache = nullptr;
        int64_t row = 0;
        size_t row_size = 0;
    };
    Place at(const void * address);

    // Bytes [address, address + size) were written.
    void written(const void * address, size_t size);

    // Forgets the caches of an address range, or of an owner.
    void forget(const void * address, size_t size);
    void forget(const Runtime * owner);

    // Calls f on each cache of the owner, in order of layers.
    template <class F> void for_each(const Runtime * owner, F && f) {
        const std::lock_guard lock(mutex_);
        std::multimap<int, Cache *> ordered;
        for (const auto & [address, cache] : caches_) {
            if (cache->owner == owner) {
                ordered.emplace(cache->layer, cache.get());
            }
        }
        for (const auto & [layer, cache] : ordered) {
            f(*cache);
        }
    }

  private:
    struct Span {
        uintptr_t end;
        Cache * cache;
        const CachePlane * plane;
    };

    void erase(Cache * cache);
    void set_limits();
    template <class F> void for_spans(uintptr_t begin, uintptr_t end, F && f);

    std::mutex mutex_;
    std::map<uintptr_t, std::unique_ptr<Cache>> caches_;  // by the address of K
    std::map<uintptr_t, Span> spans_;                     // K and V planes by first address; they do not overlap
    std::atomic<uintptr_t> low_{UINTPTR_MAX};
    std::atomic<uintptr_t> high_{0};
};

}  // namespace louver
