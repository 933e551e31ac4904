#include "louver/capture.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "ggml.h"
#include "ggml/attention_view.h"

namespace louver {
namespace {

constexpr uint16_t kHidden = 0xfc00;  // -infinity in float16

std::vector<uint8_t> visible_to(const AttentionView & a, int token) {
    std::vector<uint8_t> visible(static_cast<size_t>(a.n_kv), 1);
    if (a.mask != nullptr) {
        const std::byte * row = static_cast<const std::byte *>(a.mask->data) + static_cast<size_t>(token) * a.mask->nb[1];
        const auto * mask = reinterpret_cast<const uint16_t *>(row);
        std::transform(mask, mask + a.n_kv, visible.begin(), [](uint16_t bits) { return bits != kHidden; });
    }
    return visible;
}

// The rows of all heads, cell by cell, whatever their type and order in memory.
std::vector<uint8_t> rows_of(const ggml_tensor * cache) {
    const size_t row = ggml_row_size(cache->type, cache->ne[0]);
    std::vector<uint8_t> rows(row * static_cast<size_t>(cache->ne[1] * cache->ne[2]));
    uint8_t * out = rows.data();
    for (int64_t cell = 0; cell < cache->ne[1]; ++cell) {
        for (int64_t head = 0; head < cache->ne[2]; ++head, out += row) {
            std::memcpy(out,
                        static_cast<const std::byte *>(cache->data) + static_cast<size_t>(cell) * cache->nb[1] +
                            static_cast<size_t>(head) * cache->nb[2],
                        row);
        }
    }
    return rows;
}

}  // namespace

void Capture::set(bool queries, bool cache) {
    queries_ = queries;
    cache_ = cache;
}

void Capture::begin_step() { next_ = 0; }

std::vector<CapturedLayer> Capture::take() { return std::exchange(layers_, {}); }

void Capture::see(const AttentionView & a, int layer, const char * reason) {
    if (!is_on() || a.n_token > kMaxTokens || a.n_stream != 1) {
        return;
    }
    if (next_ == layers_.size()) {
        layers_.emplace_back();
    }
    CapturedLayer & seen = layers_[next_++];
    seen.layer = layer;
    seen.n_head = a.n_head;
    seen.n_head_kv = a.n_head_kv;
    seen.key_dim = a.key_dim;
    seen.value_dim = a.value_dim;
    seen.scale = a.scale;
    seen.reason = reason;
    seen.type_k = ggml_type_name(a.k->type);
    seen.type_v = ggml_type_name(a.v->type);
    for (int token = 0; queries_ && token < a.n_token; ++token) {
        for (int head = 0; head < a.n_head; ++head) {
            const auto * row = reinterpret_cast<const float *>(static_cast<const std::byte *>(a.query->data) +
                                                               static_cast<size_t>(token) * a.query->nb[1] +
                                                               static_cast<size_t>(head) * a.query->nb[2]);
            seen.query.insert(seen.query.end(), row, row + a.key_dim);
        }
        seen.visible.push_back(visible_to(a, token));
    }
    if (cache_) {
        seen.n_cell = a.n_kv;
        seen.k = rows_of(a.k);
        seen.v = rows_of(a.v);
    }
}

}  // namespace louver
