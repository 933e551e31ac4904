// What an attention op of ggml's asks for, read off its tensors once.
#pragma once

#include <cstdint>

#include "ggml/cache.h"
#include "louver/runtime.h"
#include "louver/types.h"

struct ggml_tensor;

namespace louver {

struct AttentionView {
    const ggml_tensor * op;
    const ggml_tensor * query;    // float32 [key_dim, n_token, n_head, n_stream]
    const ggml_tensor * k;        // [key_dim, n_kv, n_head_kv, n_stream], a permuted view of the cache
    const ggml_tensor * v;        // [value_dim, n_kv, n_head_kv, n_stream], the same
    const ggml_tensor * mask;     // float16 [n_kv, >= n_token, 1, n_stream], or null: everything is visible
    const ggml_tensor * k_cache;  // the cache tensor that k is a view of
    const ggml_tensor * v_cache;
    float scale;
    int n_token;
    int n_head;
    int n_head_kv;
    int n_stream;  // of this op; first_stream is the cache's number of the first one
    int first_stream;
    int64_t n_kv;
    int64_t kv_size;  // cells of one stream of the cache
    int key_dim;
    int value_dim;
    DType k_type;
    DType v_type;

    // Fills the view. Anything but Reason::none means that Louver does not serve this op, whatever the settings.
    Reason read(const ggml_tensor * op);

    int n_query() const { return n_token * n_stream; }

    // The rest holds once read() has returned Reason::none.
    CachePlane k_plane() const;
    CachePlane v_plane() const;
    int layer() const;  // -1: unknown
    bool reads(const Cache & cache) const;

    // The runtime whose cache this op reads, or for a cache seen for the first time the one in scope. Null: nobody's. Whatever
    // read() returned.
    Runtime * owner() const;
};

// More query tokens than this in one op is prefill: stock's tiled kernel serves it better.
inline constexpr int kMaxTokens = 16;

}  // namespace louver
