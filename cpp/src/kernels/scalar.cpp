// The reference kernels: what each operation means, in plain C++.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/bounds.h"
#include "kernels/kernels.h"
#include "kernels/numeric.h"
#include "kernels/tables.h"

namespace louver {
namespace {

void row_to_f32(DType type, const std::byte * row, int dim, float * out) {
    switch (type) {
        case DType::f32: std::memcpy(out, row, static_cast<size_t>(dim) * sizeof(float)); break;
        case DType::f16:
        case DType::bf16:
            for (int c = 0; c < dim; ++c) {
                uint16_t bits;
                std::memcpy(&bits, row + 2 * c, sizeof(bits));
                out[c] = type == DType::f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
            }
            break;
        case DType::q8_0:
            for (int c = 0; c < dim; ++c) {
                const std::byte * group = row + c / 32 * 34;
                uint16_t scale;
                std::memcpy(&scale, group, sizeof(scale));
                out[c] = f16_to_f32(scale) * static_cast<float>(static_cast<int8_t>(group[2 + c % 32]));
            }
            break;
    }
}

void rows_to_f32(const Rows & rows, const int32_t * cells, int n, float * out, const Ahead &) {
    const int dim_padded = padded(rows.dim);
    for (int i = 0; i < n; ++i, out += dim_padded) {
        row_to_f32(rows.type, rows.row(cells ? cells[i] : i), rows.dim, out);
        std::fill(out + rows.dim, out + dim_padded, 0.0f);
    }
}

void dots(const float * query, int n_query, const float * keys, int n, int dim_padded, float * out, int64_t out_stride) {
    for (int h = 0; h < n_query; ++h) {
        for (int i = 0; i < n; ++i) {
            float sum = 0;
            for (int c = 0; c < dim_padded; ++c) {
                sum += query[h * dim_padded + c] * keys[i * dim_padded + c];
            }
            out[h * out_stride + i] = sum;
        }
    }
}

float largest(const float * x, int n) {
    float most = x[0];
    for (int i = 0; i < n; ++i) {
        if (std::isnan(x[i])) {
            return x[i];
        }
        most = std::max(most, x[i]);
    }
    return most;
}

float exp2_sum(float * x, int n, float scale, float shift) {
    float sum = 0;
    for (int i = 0; i < n; ++i) {
        x[i] = std::exp2(x[i] * scale - shift);
        sum += x[i];
    }
    return sum;
}

void accumulate(const float * weight, int64_t weight_stride, const float * rescale, int n_query, const float * values, int n,
                int dim_padded, float * acc) {
    for (int h = 0; h < n_query; ++h) {
        float * out = acc + h * dim_padded;
        for (int c = 0; c < dim_padded; ++c) {
            float sum = out[c] * rescale[h];
            for (int i = 0; i < n; ++i) {
                sum += weight[h * weight_stride + i] * values[i * dim_padded + c];
            }
            out[c] = sum;
        }
    }
}

// The largest |q_c * step_c| of one head over the blocks that have anything to scan.
float largest_scaled(const ScanArgs & a, int head) {
    const int dim_padded = padded(a.dim);
    float largest = 0;
    for (int b = 0; b < a.n_blocks; ++b) {
        for (int c = 0; c < a.dim && a.cells[b] != 0; ++c) {
            largest = std::max(largest, std::fabs(a.query[head * dim_padded + c] * bf16_to_f32(a.step[b * dim_padded + c])));
        }
    }
    return largest;
}

void scan(const ScanArgs & a) {
    const int groups = (a.dim + 3) / 4;
    const int dim_padded = padded(a.dim);
    for (int h = 0; h < a.n_query; ++h) {
        const float * query = a.query + h * dim_padded;
        const HeadBound head = head_bound(largest_scaled(a, h), a.query_norm[h], a.dim, a.to_log2, a.reference[h], a.certified);
        for (int b = 0; b < a.n_blocks; ++b) {
            float * weight = a.weight + h * a.weight_stride + static_cast<int64_t>(b) * kBlockCells;
            std::fill(weight, weight + kBlockCells, 0.0f);
            a.slack[h * a.slack_stride + b] = 0;
            if (a.cells[b] == 0) {
                continue;
            }
            // The query, scaled by the block's steps and rounded to integers; and what completes their dots with the codes.
            const uint16_t * center = a.center + static_cast<int64_t>(b) * dim_padded;
            const uint16_t * step = a.step + static_cast<int64_t>(b) * dim_padded;
            int32_t level[1024];
            float base = 0;
            for (int c = 0; c < a.dim; ++c) {
                // In this order nothing overflows: no scaled query exceeds the largest one.
                const float rounded = std::nearbyint(query[c] * bf16_to_f32(step[c]) * head.inverse);
                level[c] = std::isfinite(rounded) ? static_cast<int32_t>(rounded) : 0;  // else the base is not finite either
                base += query[c] * bf16_to_f32(center[c]) - 128.0f * head.quantum * rounded;
            }
            const float slack = block_slack(head, a.bounds[b]);
            const float offset = base * a.to_log2 - a.reference[h] + slack;
            a.slack[h * a.slack_stride + b] = slack;

            const uint8_t * codes = a.codes + static_cast<int64_t>(b) * groups * 4 * kBlockCells;
            double sum = 0;
            for (int i = 0; i < kBlockCells; ++i) {
                if ((a.cells[b] >> i & 1) == 0) {
                    continue;
                }
                int64_t dot = 0;
                for (int c = 0; c < a.dim; ++c) {
                    dot += int64_t{level[c]} * codes[(c / 4 * kBlockCells + i) * 4 + c % 4];
                }
                const float score = static_cast<float>(dot) * (head.quantum * a.to_log2) + offset;
                weight[i] = std::exp2(score < kMinLog2 ? kMinLog2 : score);
                sum += weight[i];
                for (int j = 0; j < kCandidates; ++j) {
                    if (weight[i] < a.candidate[j]) {
                        a.below[h * kCandidates + j] += weight[i];
                    }
                }
            }
            a.lower[h] += sum * lower_factor(slack);
        }
    }
}

void sums_below(const float * weight, int64_t n, const float * candidate, double * below) {
    for (int64_t i = 0; i < n; ++i) {
        for (int j = 0; j < kCandidates; ++j) {
            if (weight[i] < candidate[j]) {
                below[j] += weight[i];
            }
        }
    }
}

void select(const float * weight, int64_t weight_stride, const float * threshold, int n_query, int n_blocks, uint64_t * kept) {
    for (int b = 0; b < n_blocks; ++b) {
        for (int h = 0; h < n_query; ++h) {
            for (int i = 0; i < kBlockCells; ++i) {
                // Negated, so that a NaN is kept.
                if (!(weight[h * weight_stride + static_cast<int64_t>(b) * kBlockCells + i] < threshold[h])) {
                    kept[b] |= uint64_t{1} << i;
                }
            }
        }
    }
}

void dropped_sums(const float * weight, int64_t weight_stride, int n_query, const uint64_t * kept, int n_blocks, float * out,
                  int64_t out_stride) {
    for (int h = 0; h < n_query; ++h) {
        for (int b = 0; b < n_blocks; ++b) {
            float sum = 0;
            for (int i = 0; i < kBlockCells; ++i) {
                if ((kept[b] >> i & 1) == 0) {
                    sum += weight[h * weight_stride + static_cast<int64_t>(b) * kBlockCells + i];
                }
            }
            out[h * out_stride + b] = sum;
        }
    }
}

bool mask_to_bits(const uint16_t * mask, int64_t n, uint64_t * bits) {
    bool plain = true;
    for (int64_t i = 0; i < n; ++i) {
        if (i % 64 == 0) {
            bits[i / 64] = 0;
        }
        const bool visible = (mask[i] & 0x7fffu) == 0;
        plain = plain && (visible || mask[i] == 0xfc00u);
        bits[i / 64] |= static_cast<uint64_t>(visible) << (i % 64);
    }
    return plain;
}

}  // namespace

const Kernels kScalarKernels = {"scalar", rows_to_f32, dots,   largest,      exp2_sum,    accumulate,
                                scan,     sums_below,  select, dropped_sums, mask_to_bits};

}  // namespace louver
