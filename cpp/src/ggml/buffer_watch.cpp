#include "ggml/buffer_watch.h"

#include <map>
#include <mutex>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml/registry.h"
#include "index/pages.h"

namespace louver {
namespace {

struct Watched {
    std::mutex mutex;
    std::map<ggml_backend_buffer_t, ggml_backend_buffer_i> interfaces;  // as they were
};

Watched & watched() {
    static Watched * all = new Watched();  // never destroyed, see Registry::instance
    return *all;
}

ggml_backend_buffer_i original(ggml_backend_buffer_t buffer) {
    const std::lock_guard lock(watched().mutex);
    return watched().interfaces.at(buffer);
}

void written(const ggml_tensor * tensor, size_t offset, size_t size) {
    Registry::instance().written(static_cast<const std::byte *>(tensor->data) + offset, size);
}

void free_buffer(ggml_backend_buffer_t buffer) {
    const ggml_backend_buffer_i before = original(buffer);
    Registry::instance().forget(ggml_backend_buffer_get_base(buffer), buffer->size);
    {
        const std::lock_guard lock(watched().mutex);
        watched().interfaces.erase(buffer);
    }
    buffer->iface = before;
    if (before.free_buffer != nullptr) {
        before.free_buffer(buffer);
    }
}

void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    original(buffer).memset_tensor(buffer, tensor, value, offset, size);
    written(tensor, offset, size);
}

void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    original(buffer).set_tensor(buffer, tensor, data, offset, size);
    written(tensor, offset, size);
}

void set_tensor_2d(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size,
                   size_t n_copies, size_t stride_tensor, size_t stride_data) {
    original(buffer).set_tensor_2d(buffer, tensor, data, offset, size, n_copies, stride_tensor, stride_data);
    if (n_copies > 0) {
        written(tensor, offset, (n_copies - 1) * stride_tensor + size);
    }
}

bool cpy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
    const bool copied = original(buffer).cpy_tensor(buffer, src, dst);
    written(dst, 0, ggml_nbytes(dst));
    return copied;
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    original(buffer).clear(buffer, value);
    Registry::instance().written(ggml_backend_buffer_get_base(buffer), buffer->size);
}

void reset(ggml_backend_buffer_t buffer) {
    original(buffer).reset(buffer);
    Registry::instance().written(ggml_backend_buffer_get_base(buffer), buffer->size);
}

}  // namespace

void watch_buffer(ggml_backend_buffer_t buffer) {
    const std::lock_guard lock(watched().mutex);
    if (!watched().interfaces.try_emplace(buffer, buffer->iface).second) {
        return;
    }
    // Our gathers are what profits; stock's kernel reads the same either way.
    if (ggml_backend_buffer_is_host(buffer)) {
        collapse_to_huge_pages(ggml_backend_buffer_get_base(buffer), buffer->size);
    }
    // An operation the buffer lacks stays missing: ggml takes its absence as an answer.
    const auto wrap = [](auto & slot, auto * wrapper) {
        if (slot != nullptr) {
            slot = wrapper;
        }
    };
    buffer->iface.free_buffer = free_buffer;
    wrap(buffer->iface.memset_tensor, memset_tensor);
    wrap(buffer->iface.set_tensor, set_tensor);
    wrap(buffer->iface.set_tensor_2d, set_tensor_2d);
    wrap(buffer->iface.cpy_tensor, cpy_tensor);
    wrap(buffer->iface.clear, clear);
    wrap(buffer->iface.reset, reset);
}

}  // namespace louver
