#include "cuda/attend.cuh"

namespace louver::cuda {

template size_t attend_bytes<DType::q8_0>(const Problem &);
template void launch_attend<DType::q8_0>(const Problem &, cudaStream_t);

}  // namespace louver::cuda
