#include "index/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace louver {

void prefer_huge_pages([[maybe_unused]] void * memory, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
    if (bytes >= kHugePage) {
        madvise(memory, bytes, MADV_HUGEPAGE);
    }
#endif
}

}  // namespace louver
