#include "ggml/attention_view.h"

#include <charconv>
#include <cstring>
#include <string_view>

#include "ggml.h"
#include "ggml/registry.h"

namespace louver {
namespace {

bool to_dtype(ggml_type type, DType & out) {
    switch (type) {
        case GGML_TYPE_F32: out = DType::f32; return true;
        case GGML_TYPE_F16: out = DType::f16; return true;
        case GGML_TYPE_BF16: out = DType::bf16; return true;
        case GGML_TYPE_Q8_0: out = DType::q8_0; return true;
        case GGML_TYPE_Q4_0: out = DType::q4_0; return true;
        default: return false;
    }
}

// llama.cpp casts a float32 cache to float16 in front of the op; the cache behind the cast is what is indexed and read.
const ggml_tensor * before_cast(const ggml_tensor * t) {
    const bool cast =
        t->op == GGML_OP_CPY && t->src[0] != nullptr && t->src[0]->type == GGML_TYPE_F32 && ggml_are_same_shape(t, t->src[0]);
    return cast ? t->src[0] : t;
}

// The view covers whole heads side by side in the rows of its cache, from a stream's first row on.
bool covers_heads(const ggml_tensor * view, const ggml_tensor * cache) {
    const size_t head = ggml_row_size(view->type, view->ne[0]);
    const size_t row = ggml_row_size(cache->type, cache->ne[0]);
    return view->nb[2] == head && view->nb[1] == row && head * static_cast<size_t>(view->ne[2]) <= row &&
           (view->ne[3] == 1 || view->nb[3] == row * static_cast<size_t>(cache->ne[1])) && cache->nb[1] == row &&
           (cache->ne[2] == 1 || cache->nb[2] == row * static_cast<size_t>(cache->ne[1])) && cache->ne[3] == 1 &&
           view->view_offs % (row * static_cast<size_t>(cache->ne[1])) == 0;
}

CachePlane plane_of(const ggml_tensor * cache, const ggml_tensor * view, DType type) {
    return {static_cast<std::byte *>(cache->data), cache->nb[1],
            cache->ne[1] * cache->ne[2],           ggml_row_size(view->type, view->ne[0]),
            static_cast<int>(view->ne[0]),         type};
}

}  // namespace

Reason AttentionView::read(const ggml_tensor * tensor) {
    op = tensor;
    query = op->src[0];
    k = before_cast(op->src[1]);
    v = before_cast(op->src[2]);
    k_cache = k->view_src;
    v_cache = v->view_src;
    mask = op->src[3];

    float max_bias = 0;
    float soft_cap = 0;
    int32_t n_kv_max = 0;
    std::memcpy(&scale, &op->op_params[0], sizeof(scale));
    std::memcpy(&max_bias, &op->op_params[1], sizeof(max_bias));
    std::memcpy(&soft_cap, &op->op_params[2], sizeof(soft_cap));
    std::memcpy(&n_kv_max, &op->op_params[4], sizeof(n_kv_max));

    n_token = static_cast<int>(query->ne[1]);
    n_head = static_cast<int>(query->ne[2]);
    n_stream = static_cast<int>(query->ne[3]);
    n_head_kv = static_cast<int>(k->ne[2]);
    n_kv = k->ne[1];
    key_dim = static_cast<int>(k->ne[0]);
    value_dim = static_cast<int>(v->ne[0]);

    if (max_bias != 0) return Reason::alibi;
    if (soft_cap != 0) return Reason::soft_cap;
    if (op->src[4] != nullptr) return Reason::sinks;
    if (n_kv_max != 0) return Reason::n_kv_max;
    if (!to_dtype(k->type, k_type) || !to_dtype(v->type, v_type)) return Reason::cache_type;

    if (k_cache != nullptr && k_cache == v_cache) return Reason::mla;
    const bool known = k_cache != nullptr && v_cache != nullptr && k_cache->buffer != nullptr && v_cache->buffer != nullptr &&
                       query->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && query->nb[0] == sizeof(float) && scale > 0 &&
                       k->ne[3] == n_stream && v->ne[3] == n_stream && v->ne[1] == n_kv && v->ne[2] == n_head_kv &&
                       n_head_kv > 0 && n_head % n_head_kv == 0 && key_dim <= 1024 && value_dim <= 1024 &&
                       covers_heads(k, k_cache) && covers_heads(v, v_cache) && k_cache->ne[1] == v_cache->ne[1] &&
                       k_cache->ne[2] == v_cache->ne[2] && k->view_offs / k_cache->nb[1] == v->view_offs / v_cache->nb[1];
    if (!known) return Reason::layout;
    if (mask != nullptr && (mask->type != GGML_TYPE_F16 || mask->ne[2] != 1 || mask->ne[0] < n_kv || mask->ne[1] < n_token ||
                            (mask->ne[3] != n_stream && mask->ne[3] != 1) || mask->nb[0] != sizeof(uint16_t))) {
        return Reason::layout;
    }
    kv_size = k_cache->ne[1];
    first_stream = static_cast<int>(static_cast<int64_t>(k->view_offs / k_cache->nb[1]) / kv_size);
    return Reason::none;
}

CachePlane AttentionView::k_plane() const { return plane_of(k_cache, k, k_type); }

CachePlane AttentionView::v_plane() const { return plane_of(v_cache, v, v_type); }

int AttentionView::layer() const {
    const std::string_view name = k_cache->name;
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    int number = -1;
    std::from_chars(name.data() + digits, name.data() + name.size(), number);
    return number;
}

bool AttentionView::reads(const Cache & cache) const {
    return cache.k == k_plane() && cache.v == v_plane() && cache.kv_size == kv_size && cache.n_head_kv == n_head_kv;
}

Runtime * AttentionView::owner() const {
    const Cache * cache = k_cache != nullptr ? Registry::instance().find(k_cache->data) : nullptr;
    return cache != nullptr ? cache->owner : Runtime::current();
}

}  // namespace louver
