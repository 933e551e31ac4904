#include <cmath>
#include <stdexcept>
#include <string>

#include "index/state.h"
#include "kernels/bounds.h"

namespace louver {

QuerySet::QuerySet(const Index::State & state, std::span<const float> queries)
    : width_(static_cast<size_t>(padded(state.store.dim()))) {
    const size_t dim = static_cast<size_t>(state.store.dim());
    const size_t n_head_kv = static_cast<size_t>(state.store.n_head_kv());
    const size_t n = queries.size() / dim;
    if (n * dim != queries.size()) {
        throw std::invalid_argument("queries have " + std::to_string(queries.size()) +
                                    " numbers, accepted is a multiple of head_dim = " + std::to_string(dim));
    }
    if (n % n_head_kv != 0) {
        throw std::invalid_argument("queries are " + std::to_string(n) +
                                    ", accepted is a multiple of n_head_kv = " + std::to_string(n_head_kv));
    }
    n_ = static_cast<int>(n);
    per_head_ = n_ / static_cast<int>(n_head_kv);
    f32_.assign(n * width_, 0.0f);
    f64_.assign(n * width_, 0.0);
    norm_.resize(n);
    for (size_t i = 0; i < n; ++i) {
        double squared = 0;
        for (size_t c = 0; c < dim; ++c) {
            const float x = queries[i * dim + c];
            if (!std::isfinite(x)) {
                throw std::invalid_argument("queries has " + std::to_string(x) + " at [" + std::to_string(i) + ", " +
                                            std::to_string(c) + "], accepted are finite numbers");
            }
            f32_[i * width_ + c] = x;
            f64_[i * width_ + c] = x;
            squared += static_cast<double>(x) * x;
        }
        norm_[i] = static_cast<float>(std::sqrt(squared)) * kNormInflation;
    }
    for (int first = 0; first < n_;) {
        const int head = head_of(first);
        const int count = std::min(kMaxBatch, (head + 1) * per_head_ - first);
        const QueryBatch batch{count, f32(first), norm_.data() + first};
        batches_.push_back({first, count, head, state.heads[static_cast<size_t>(head)]->query(batch)});
        first += count;
    }
}

}  // namespace louver
