// Memory as llama.cpp's buffers are: plain, and aligned to cache lines.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace louver {

struct FreeMemory {
    void operator()(std::byte * p) const { std::free(p); }
};
using Memory = std::unique_ptr<std::byte[], FreeMemory>;

inline Memory allocate(size_t bytes) {
    Memory memory(static_cast<std::byte *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    return memory;
}

}  // namespace louver
