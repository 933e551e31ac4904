#include "cuda/attend.cuh"

namespace louver::cuda {

template size_t attend_bytes<DType::bf16>(const Problem &);
template void launch_attend<DType::bf16>(const Problem &, cudaStream_t);

}  // namespace louver::cuda
