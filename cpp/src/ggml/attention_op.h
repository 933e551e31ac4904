// ggml's FLASH_ATTN_EXT, taken over where Louver serves it.
#pragma once

#include <cstddef>

struct ggml_compute_params;
struct ggml_tensor;

namespace louver {

// Bytes of ggml's work buffer our side of this op may need, 0 where stock will run for sure.
size_t attention_work_size(int n_threads, const ggml_tensor * op);

// Called by every thread of ggml's pool. True: the op is done. False, to all of them: stock has to compute it.
bool attention_forward(ggml_compute_params * params, ggml_tensor * op);

}  // namespace louver
