#include "index/pages.h"

#include <algorithm>
#include <cstdint>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

namespace louver {

#ifdef __linux__

std::byte * map_pages(size_t bytes) {
    void * memory = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        throw std::bad_alloc();
    }
    // Mappings that lie side by side share huge pages: small ones gain too.
    madvise(memory, bytes, MADV_HUGEPAGE);
    return static_cast<std::byte *>(memory);
}

void unmap_pages(std::byte * memory, size_t bytes) { munmap(memory, std::max<size_t>(bytes, 1)); }

void collapse_to_huge_pages(void * memory, size_t bytes) {
#ifndef MADV_COLLAPSE
    constexpr int MADV_COLLAPSE = 25;  // an older kernel refuses it
#endif
    constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
    if (begin < end) {
        madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
        madvise(reinterpret_cast<void *>(begin), end - begin, MADV_COLLAPSE);
    }
}

#else

std::byte * map_pages(size_t bytes) {
    constexpr size_t kAlignment = 64;
    const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    std::byte * memory = static_cast<std::byte *>(std::aligned_alloc(kAlignment, rounded));
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    std::fill_n(memory, rounded, std::byte{0});
    return memory;
}

void unmap_pages(std::byte * memory, size_t) { std::free(memory); }

void collapse_to_huge_pages(void *, size_t) {}

#endif

}  // namespace louver
