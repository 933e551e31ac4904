// The kernels of attend.cuh by the type of the cache: each has a file of its own, since they take a while to compile.
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace louver::cuda {

template <DType type> size_t attend_bytes(const Problem & p);
template <DType type> void launch_attend(const Problem & p, cudaStream_t stream);

void launch_attend(const Problem & p, cudaStream_t stream) {
    with_type(p.keys.type, [&]<DType type>() { launch_attend<type>(p, stream); });
}

size_t attend_bytes(const Problem & p) {
    size_t bytes = 0;
    with_type(p.keys.type, [&]<DType type>() { bytes = attend_bytes<type>(p); });
    return bytes;
}

bool fits(const Problem & p) {
    if (p.n_blocks > 1 << kMostBlockBits || p.n_blocks > kMostOwnBlocks * p.n_even.value) {
        return false;
    }
    return attend_bytes(p) <= p.most_shared;
}

}  // namespace louver::cuda
