// A cache with queries on a device and on the host, and dense attention over it in float64.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "formats.h"
#include "guarded.h"

namespace louver::checks {

enum class Keys {
    gaussian,   // unrelated to the queries: nearly all of them matter
    clustered,  // some keys are what the queries look for, with channels of very different size
    constant,   // all the same
    large,      // scores in the thousands
};

struct Shape {
    int key_dim = 128;
    int value_dim = 128;
    DType type = DType::f16;
    int n_head_kv = 2;
    int n_gqa = 3;
    int n_stream = 1;  // of the cache
    int64_t kv_size = 2048;
    int n_kv = 2000;  // seen by an op
    int n_token = 1;
    Keys keys = Keys::clustered;

    std::string name() const {
        return std::string(name_of(type)) + " dim " + std::to_string(key_dim) + "/" + std::to_string(value_dim) + ", " +
               std::to_string(n_head_kv) + " x " + std::to_string(n_gqa) + " heads, " + std::to_string(n_stream) + " x " +
               std::to_string(n_kv) + " keys, " + std::to_string(n_token) + " tokens, kind " +
               std::to_string(static_cast<int>(keys));
    }
};

struct Dense {
    std::vector<double> score;   // q.k of each of n_kv
    std::vector<double> weight;  // softmax; 0 where invisible
    std::vector<double> output;
};

class Scene {
  public:
    Scene(const Shape & of, uint64_t seed)
        : shape(of),
          n_head(shape.n_head_kv * shape.n_gqa),
          scale(1.0f / std::sqrt(static_cast<float>(shape.key_dim))),
          keys(static_cast<size_t>(rows()) * key_row()),
          values(static_cast<size_t>(rows()) * value_row()),
          query(static_cast<size_t>(n_rows()) * query_stride() * sizeof(float)),
          output(static_cast<size_t>(n_rows()) * output_stride() * sizeof(float)),
          mask(static_cast<size_t>(n_rows()) * mask_stride() * sizeof(uint16_t)),
          random(seed) {
        host_keys.resize(static_cast<size_t>(rows()) * key_row());
        host_values.resize(static_cast<size_t>(rows()) * value_row());
        host_query.resize(static_cast<size_t>(n_rows()) * query_stride());
        host_mask.assign(static_cast<size_t>(n_rows()) * mask_stride(), 0);
        directions.resize(static_cast<size_t>(shape.n_head_kv * shape.key_dim));
        for (float & x : directions) {
            x = normal();
        }
        renew_cells(0, rows());
        renew_queries();
        see_all();
        upload();
    }

    int64_t rows() const { return shape.n_stream * shape.kv_size; }
    int n_rows() const { return shape.n_stream * shape.n_token; }
    size_t key_row() const { return row_bytes(shape.type, shape.key_dim) * static_cast<size_t>(shape.n_head_kv); }
    size_t value_row() const { return row_bytes(shape.type, shape.value_dim) * static_cast<size_t>(shape.n_head_kv); }
    // With some room between rows, which nobody may touch.
    size_t query_stride() const { return static_cast<size_t>(n_head * shape.key_dim + 4); }
    size_t output_stride() const { return static_cast<size_t>(n_head * shape.value_dim + 4); }
    size_t mask_stride() const { return static_cast<size_t>((shape.n_kv + 63) / 64 * 64); }

    cuda::Plane key_plane() const {
        return {keys.data(), static_cast<int64_t>(key_row()), head_bytes(shape.key_dim), shape.key_dim, shape.type};
    }
    cuda::Plane value_plane() const {
        return {values.data(), static_cast<int64_t>(value_row()), head_bytes(shape.value_dim), shape.value_dim, shape.type};
    }
    const std::byte * host_key(int64_t row, int head) const {
        return host_keys.data() + static_cast<size_t>(row) * key_row() + static_cast<size_t>(head * head_bytes(shape.key_dim));
    }
    const std::byte * host_value(int64_t row, int head) const {
        return host_values.data() + static_cast<size_t>(row) * value_row() +
               static_cast<size_t>(head * head_bytes(shape.value_dim));
    }

    cuda::AttentionOp op(const DecodeSettings & settings) const {
        cuda::AttentionOp op;
        op.n_token = shape.n_token;
        op.n_stream = shape.n_stream;
        op.n_head = n_head;
        op.n_kv = shape.n_kv;
        op.scale = scale;
        op.query = query.data();
        op.query_head_stride = shape.key_dim * 4;
        op.query_token_stride = static_cast<int64_t>(query_stride() * 4);
        op.query_stream_stride = shape.n_token * op.query_token_stride;
        op.output = output.data();
        op.output_head_stride = shape.value_dim * 4;
        op.output_token_stride = static_cast<int64_t>(output_stride() * 4);
        op.output_stream_stride = shape.n_token * op.output_token_stride;
        op.mask = {mask.data(), static_cast<int64_t>(mask_stride() * 2), static_cast<int64_t>(mask_stride() * 2) * shape.n_token};
        op.settings = settings;
        return op;
    }

    float normal() { return std::normal_distribution<float>()(random); }
    double uniform() { return std::uniform_real_distribution<double>()(random); }

    // New keys and values; on the device after upload().
    void renew_cells(int64_t first, int64_t count) {
        std::vector<float> row(static_cast<size_t>(std::max(shape.key_dim, shape.value_dim)));
        for (int64_t r = first; r < first + count; ++r) {
            for (int head = 0; head < shape.n_head_kv; ++head) {
                const bool wanted = uniform() < 0.02;
                for (int c = 0; c < shape.key_dim; ++c) {
                    const float direction = directions[static_cast<size_t>(head * shape.key_dim + c)];
                    float & x = row[static_cast<size_t>(c)];
                    switch (shape.keys) {
                        case Keys::gaussian: x = 0.1f * normal(); break;
                        case Keys::clustered:
                            x = (c % 16 == 3 ? 6.0f : 0.6f) * (normal() + 2) + (wanted ? 1.2f : 0.0f) * direction;
                            break;
                        case Keys::constant: x = direction; break;
                        case Keys::large: x = 60 * normal(); break;
                    }
                }
                store_row(shape.type, row.data(), shape.key_dim, const_cast<std::byte *>(host_key(r, head)));
                for (int c = 0; c < shape.value_dim; ++c) {
                    row[static_cast<size_t>(c)] = normal() + (wanted ? 3.0f : 0.0f);
                }
                store_row(shape.type, row.data(), shape.value_dim, const_cast<std::byte *>(host_value(r, head)));
            }
        }
    }
    void renew_queries() {
        for (int r = 0; r < n_rows(); ++r) {
            for (int head = 0; head < n_head; ++head) {
                for (int c = 0; c < shape.key_dim; ++c) {
                    const float direction = directions[static_cast<size_t>(head / shape.n_gqa * shape.key_dim + c)];
                    host_query[static_cast<size_t>(r) * query_stride() + static_cast<size_t>(head * shape.key_dim + c)] =
                        shape.keys == Keys::gaussian ? normal() : direction + 0.3f * normal();
                }
            }
        }
    }
    void see_all() { host_mask.assign(host_mask.size(), 0); }
    // Causal within the last tokens, and some cells hidden from all or from some.
    void see_some() {
        for (int stream = 0; stream < shape.n_stream; ++stream) {
            for (int cell = 0; cell < shape.n_kv; ++cell) {
                const bool hidden = uniform() < 0.1 || (cell / 64) % 5 == 4;
                for (int token = 0; token < shape.n_token; ++token) {
                    const bool later = cell > shape.n_kv - shape.n_token + token;
                    const bool own = uniform() < 0.02;
                    host_mask[static_cast<size_t>(stream * shape.n_token + token) * mask_stride() + static_cast<size_t>(cell)] =
                        hidden || later || own ? 0xfc00 : 0;
                }
            }
        }
    }
    void upload() {
        keys.set(host_keys);
        values.set(host_values);
        query.set(host_query);
        mask.set(host_mask);
    }

    bool sees(int row, int cell) const {
        return host_mask[static_cast<size_t>(row) * mask_stride() + static_cast<size_t>(cell)] != 0xfc00;
    }
    int64_t cell_row(int row, int cell) const { return row / shape.n_token * shape.kv_size + cell; }

    Dense dense(int row, int head) const {
        const int kv_head = head / shape.n_gqa;
        const float * q = &host_query[static_cast<size_t>(row) * query_stride() + static_cast<size_t>(head * shape.key_dim)];
        Dense dense;
        dense.score.resize(static_cast<size_t>(shape.n_kv));
        dense.weight.assign(static_cast<size_t>(shape.n_kv), 0);
        dense.output.assign(static_cast<size_t>(shape.value_dim), 0);
        double peak = -INFINITY;
        for (int cell = 0; cell < shape.n_kv; ++cell) {
            double dot = 0;
            const std::byte * key = host_key(cell_row(row, cell), kv_head);
            for (int c = 0; c < shape.key_dim; ++c) {
                dot += static_cast<double>(q[c]) * load_element(shape.type, key, c);
            }
            dense.score[static_cast<size_t>(cell)] = dot;
            if (sees(row, cell)) {
                peak = std::max(peak, dot * static_cast<double>(scale));
            }
        }
        double sum = 0;
        for (int cell = 0; cell < shape.n_kv; ++cell) {
            if (sees(row, cell)) {
                double & weight = dense.weight[static_cast<size_t>(cell)];
                weight = std::exp(dense.score[static_cast<size_t>(cell)] * static_cast<double>(scale) - peak);
                sum += weight;
            }
        }
        for (int cell = 0; cell < shape.n_kv; ++cell) {
            double & weight = dense.weight[static_cast<size_t>(cell)];
            weight /= sum;
            if (!(weight == 0)) {  // a NaN is passed on
                const std::byte * value = host_value(cell_row(row, cell), kv_head);
                for (int c = 0; c < shape.value_dim; ++c) {
                    dense.output[static_cast<size_t>(c)] += weight * load_element(shape.type, value, c);
                }
            }
        }
        return dense;
    }

    bool intact() const { return keys.intact() && values.intact() && query.intact() && output.intact() && mask.intact(); }

    const Shape shape;
    const int n_head;
    const float scale;
    Guarded keys;
    Guarded values;
    Guarded query;
    Guarded output;
    Guarded mask;
    std::mt19937_64 random;
    std::vector<std::byte> host_keys;
    std::vector<std::byte> host_values;
    std::vector<float> host_query;
    std::vector<uint16_t> host_mask;
    std::vector<float> directions;

  private:
    int64_t head_bytes(int dim) const { return static_cast<int64_t>(row_bytes(shape.type, dim)); }
};

}  // namespace louver::checks
