#include "cuda/attend.cuh"

namespace louver::cuda {

template size_t attend_bytes<DType::f16>(const Problem &);
template void launch_attend<DType::f16>(const Problem &, cudaStream_t);

}  // namespace louver::cuda
