#include "index/key_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "index/pages.h"

namespace louver {

void KeyStore::Unmap::operator()(std::byte * memory) const { unmap_pages(memory, bytes); }

KeyStore::KeyStore(DType type, int n_head_kv, int dim)
    : type_(type),
      dim_(dim),
      rows_(static_cast<size_t>(n_head_kv), Rows{nullptr, static_cast<int64_t>(row_bytes(type, dim)), dim, type}) {}

void KeyStore::borrow(const StridedKeys & keys, std::shared_ptr<const void> owner) {
    for (size_t h = 0; h < rows_.size(); ++h) {
        rows_[h] = {keys.base + static_cast<int64_t>(h) * keys.head_stride, keys.row_stride, dim_, type_};
    }
    n_ = keys.n;
    owner_ = std::move(owner);
}

std::shared_ptr<const void> KeyStore::reserve(int64_t n) {
    if (n <= capacity_) {
        return nullptr;
    }
    // Twice as much as before, so that single keys are copied a constant number of times.
    const int64_t capacity = std::max({n, 2 * capacity_, int64_t{kBlockCells}});
    const size_t row = row_bytes(type_, dim_);
    const size_t head_bytes = static_cast<size_t>(capacity) * row;
    const size_t bytes = head_bytes * rows_.size();
    Memory memory(map_pages(bytes), Unmap{bytes});
    for (size_t h = 0; h < rows_.size(); ++h) {
        std::byte * to = memory.get() + h * head_bytes;
        if (rows_[h].stride == static_cast<int64_t>(row) && n_ > 0) {
            std::memcpy(to, rows_[h].base, static_cast<size_t>(n_) * row);
        } else {
            for (int64_t i = 0; i < n_; ++i) {
                std::memcpy(to + static_cast<size_t>(i) * row, rows_[h].row(i), row);
            }
        }
        rows_[h].base = to;
        rows_[h].stride = static_cast<int64_t>(row);
    }
    memory_ = std::move(memory);
    capacity_ = capacity;
    return std::exchange(owner_, nullptr);
}

void KeyStore::set(int64_t position, const StridedKeys & keys, int64_t i) {
    const size_t element = row_bytes(type_, 1);
    for (size_t h = 0; h < rows_.size(); ++h) {
        std::byte * to = const_cast<std::byte *>(rows_[h].row(position));  // in memory_: reserve() saw to it
        const std::byte * from = keys.base + static_cast<int64_t>(h) * keys.head_stride + i * keys.row_stride;
        if (keys.element_stride == static_cast<int64_t>(element)) {
            std::memcpy(to, from, element * static_cast<size_t>(dim_));
            continue;
        }
        for (int c = 0; c < dim_; ++c) {
            std::memcpy(to + element * static_cast<size_t>(c), from + c * keys.element_stride, element);
        }
    }
}

size_t KeyStore::bytes() const { return is_borrowed() ? 0 : static_cast<size_t>(n_) * row_bytes(type_, dim_) * rows_.size(); }

}  // namespace louver
