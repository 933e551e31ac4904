#include "random_ops.h"

#include <cmath>
#include <cstring>
#include <random>

namespace louver::bench {
namespace {

constexpr int64_t kHeads = 24;
constexpr int64_t kHeadsKv = 8;
constexpr int64_t kDim = 128;
constexpr float kQueryLength = 3.2f;  // deviation of a channel

ggml_tensor tensor_of(ggml_type type, int64_t dim, int64_t rows, int64_t heads, int64_t row_stride, int64_t head_stride,
                      void * data) {
    ggml_tensor tensor{};
    tensor.type = type;
    const int64_t ne[] = {dim, rows, heads, 1};
    const int64_t nb[] = {static_cast<int64_t>(ggml_type_size(type)), row_stride, head_stride, 0};
    for (int i = 0; i < 4; ++i) {
        tensor.ne[i] = ne[i];
        tensor.nb[i] = static_cast<size_t>(nb[i]);
    }
    tensor.data = data;
    return tensor;
}

}  // namespace

std::vector<CapturedOp> random_ops(int n_layer, int64_t n_kv) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    // A few normal numbers, taken in random order: drawing each anew would take minutes.
    std::vector<ggml_fp16_t> numbers(1 << 16);
    for (ggml_fp16_t & x : numbers) {
        x = ggml_fp32_to_fp16(normal(random));
    }
    constexpr int64_t kRow = kHeadsKv * kDim;
    std::vector<ggml_fp16_t> keys(static_cast<size_t>(n_kv * kRow));
    std::vector<ggml_fp16_t> values(keys.size());
    std::vector<float> means(kRow);
    for (float & x : means) {
        x = 2 * normal(random);
    }
    for (size_t i = 0; i < keys.size(); ++i) {
        const auto bits = static_cast<uint32_t>(random());
        keys[i] = ggml_fp32_to_fp16(ggml_fp16_to_fp32(numbers[bits & 0xffff]) + means[i % kRow]);
        values[i] = numbers[bits >> 16];
    }

    const size_t cache_bytes = keys.size() * sizeof(ggml_fp16_t);
    const size_t mask_bytes = static_cast<size_t>(n_kv) * sizeof(ggml_fp16_t);
    constexpr size_t kQueryBytes = kHeads * kDim * sizeof(float);
    std::vector<CapturedOp> ops;
    for (int layer = 0; layer < n_layer; ++layer) {
        CapturedOp op{};
        op.content = cuda::Memory(2 * cache_bytes + kQueryBytes + mask_bytes);  // zeros: the mask hides nothing
        auto * data = op.content.as<std::byte>();
        std::vector<float> queries(kHeads * kDim);
        for (float & x : queries) {
            x = kQueryLength * normal(random);
        }
        cuda::check(cudaMemcpy(data, keys.data(), cache_bytes, cudaMemcpyHostToDevice), "keys");
        cuda::check(cudaMemcpy(data + cache_bytes, values.data(), cache_bytes, cudaMemcpyHostToDevice), "values");
        cuda::check(cudaMemcpy(data + 2 * cache_bytes, queries.data(), kQueryBytes, cudaMemcpyHostToDevice), "queries");
        constexpr int64_t kHalf = sizeof(ggml_fp16_t);
        op.keys = tensor_of(GGML_TYPE_F16, kDim, n_kv, kHeadsKv, kRow * kHalf, kDim * kHalf, data);
        op.values = tensor_of(GGML_TYPE_F16, kDim, n_kv, kHeadsKv, kRow * kHalf, kDim * kHalf, data + cache_bytes);
        op.query = tensor_of(GGML_TYPE_F32, kDim, 1, kHeads, kQueryBytes, kDim * 4, data + 2 * cache_bytes);
        op.mask = tensor_of(GGML_TYPE_F16, n_kv, 1, 1, static_cast<int64_t>(mask_bytes), 0, data + 2 * cache_bytes + kQueryBytes);
        op.op = tensor_of(GGML_TYPE_F32, kDim, kHeads, 1, kDim * 4, kQueryBytes, nullptr);
        const float scale = 1.0f / std::sqrt(static_cast<float>(kDim));
        std::memcpy(op.op.op_params, &scale, sizeof(scale));
        ops.push_back(std::move(op));
    }
    return ops;
}

}  // namespace louver::bench
