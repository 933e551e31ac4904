// Attention on CUDA devices, through the extension that our patch adds to ggml-cuda (cmake/patches). Does nothing where this
// library is built without LOUVER_CUDA, or where there is no device.
#pragma once

namespace louver {

void attach_cuda();

}  // namespace louver
