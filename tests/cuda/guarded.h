// Device memory between sentinels, and poisoned inside.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/device.h"

namespace louver::checks {

class Guarded {
  public:
    explicit Guarded(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kGuard) {
        cuda::check(cudaMemset(memory_.as<std::byte>(), kSentinel, memory_.bytes()), "cudaMemset");
        poison();
    }
    template <class T> explicit Guarded(const std::vector<T> & content) : Guarded(content.size() * sizeof(T)) { set(content); }

    std::byte * data() const { return memory_.as<std::byte>(kGuard); }

    // 0xff everywhere: a NaN in every format.
    void poison() { cuda::check(cudaMemset(data(), 0xff, bytes_), "cudaMemset"); }

    template <class T> void set(const std::vector<T> & content, size_t offset = 0) {
        cuda::check(cudaMemcpy(data() + offset, content.data(), content.size() * sizeof(T), cudaMemcpyHostToDevice),
                    "cudaMemcpy");
    }
    template <class T> std::vector<T> get() const {
        std::vector<T> content(bytes_ / sizeof(T));
        cuda::check(cudaMemcpy(content.data(), data(), content.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return content;
    }
    bool intact() const {
        std::vector<unsigned char> all(memory_.bytes());
        cuda::check(cudaMemcpy(all.data(), memory_.as<std::byte>(), all.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
        const auto is_sentinel = [](unsigned char byte) { return byte == kSentinel; };
        return std::all_of(all.begin(), all.begin() + kGuard, is_sentinel) &&
               std::all_of(all.end() - kGuard, all.end(), is_sentinel);
    }

  private:
    static constexpr ptrdiff_t kGuard = 4096;
    static constexpr unsigned char kSentinel = 0xa5;
    size_t bytes_;
    cuda::Memory memory_;
};

}  // namespace louver::checks
