// The tables of functions, one per instruction set, and what the dispatcher needs to know of them.
#pragma once

#include "kernels/kernels.h"

namespace louver {

extern const Kernels kScalarKernels;
#ifdef LOUVER_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace louver
