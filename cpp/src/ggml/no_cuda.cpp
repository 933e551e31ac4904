// In place of cuda_extension.cpp and device_cache.cpp in a build without CUDA.
#include "ggml/cuda_extension.h"
#include "louver/runtime.h"

namespace louver {

bool has_cuda() { return false; }

std::vector<DeviceInfo> devices() { return {}; }

void attach_cuda() {}

}  // namespace louver
