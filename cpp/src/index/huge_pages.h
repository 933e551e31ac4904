// Memory that is read in streams is read faster from huge pages: fewer page walks. Only a hint: where the system has none,
// nothing changes.
#pragma once

#include <cstddef>

namespace louver {

inline constexpr size_t kHugePage = size_t{2} << 20;

// For memory that starts a page and is not touched yet. Less than a huge page is left alone.
void prefer_huge_pages(void * memory, size_t bytes);

}  // namespace louver
