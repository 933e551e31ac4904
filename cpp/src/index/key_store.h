// The keys of an index, per KV head one row after the other: its own, or borrowed until the first change.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "louver/index.h"
#include "louver/types.h"

namespace louver {

class KeyStore {
  public:
    KeyStore(DType type, int n_head_kv, int dim);

    // Rows that are not its own.
    void borrow(const StridedKeys & keys, std::shared_ptr<const void> owner);

    // Room for n rows of its own for each head, those that it has among them. Returns whoever owned them until now: letting go of
    // that may wait for Python, so it must not happen under a lock.
    [[nodiscard]] std::shared_ptr<const void> reserve(int64_t n);

    // Row `position` of each head becomes row i of keys; it has to be within the room reserved.
    void set(int64_t position, const StridedKeys & keys, int64_t i);
    void set_size(int64_t n) { n_ = n; }

    DType type() const { return type_; }
    int n_head_kv() const { return static_cast<int>(rows_.size()); }
    int dim() const { return dim_; }
    int64_t size() const { return n_; }
    const Rows & rows(int head) const { return rows_[static_cast<size_t>(head)]; }
    bool is_borrowed() const { return owner_ != nullptr; }

    // Of rows in use, 0 while they are borrowed.
    size_t bytes() const;

  private:
    struct Unmap {
        size_t bytes;
        void operator()(std::byte * memory) const;
    };
    using Memory = std::unique_ptr<std::byte, Unmap>;

    DType type_;
    int dim_;
    int64_t n_ = 0;
    int64_t capacity_ = 0;
    std::vector<Rows> rows_;  // [n_head_kv]
    Memory memory_;           // [n_head_kv][capacity][dim]
    std::shared_ptr<const void> owner_;
};

}  // namespace louver
