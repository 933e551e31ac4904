// The reference kernels: what each operation means, in plain C++.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/bounds.h"
#include "kernels/kernels.h"
#include "kernels/numeric.h"
#include "kernels/tables.h"

namespace louver {
namespace {

// Whether any head has something to scan in the block.
bool scans(const ScanArgs & a, int block) {
    for (int h = 0; h < a.n_query; ++h) {
        if (a.cells_of(h, block) != 0) {
            return true;
        }
    }
    return false;
}

uint16_t scale_of(const std::byte * group) {
    uint16_t scale;
    std::memcpy(&scale, group, sizeof(scale));
    return scale;
}

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
                out[c] = f16_to_f32(scale_of(group)) * static_cast<float>(static_cast<int8_t>(group[2 + c % 32]));
            }
            break;
        case DType::q4_0:
            for (int c = 0; c < dim; ++c) {
                const std::byte * group = row + c / 32 * 18;
                const int both = static_cast<int>(group[2 + c % 16]);
                const int level = c % 32 < 16 ? both & 15 : both >> 4;
                out[c] = f16_to_f32(scale_of(group)) * static_cast<float>(level - 8);
            }
            break;
    }
}

void rows_to_f32(const Rows & rows, const int32_t * cells, int n, float * out) {
    const int dim_padded = padded(rows.dim);
    for (int i = 0; i < n; ++i, out += dim_padded) {
        row_to_f32(rows.type, rows.row(cells ? cells[i] : i), rows.dim, out);
        std::fill(out + rows.dim, out + dim_padded, 0.0f);
    }
}

void dots(const float * query, int n_query, const Rows & keys, const int32_t * cells, int n, float * out, int64_t out_stride,
          const Ahead &) {
    const int dim_padded = padded(keys.dim);
    float key[kMaxDim];
    for (int i = 0; i < n; ++i) {
        row_to_f32(keys.type, keys.row(cells ? cells[i] : i), keys.dim, key);
        for (int h = 0; h < n_query; ++h) {
            float sum = 0;
            for (int c = 0; c < keys.dim; ++c) {
                sum += query[h * dim_padded + c] * key[c];
            }
            out[h * out_stride + i] = sum;
        }
    }
}

void dots_f64(const double * query, const Rows & keys, const int32_t * cells, int n, double * score, double * magnitude) {
    float key[kMaxDim];
    for (int i = 0; i < n; ++i) {
        row_to_f32(keys.type, keys.row(cells ? cells[i] : i), keys.dim, key);
        score[i] = 0;
        magnitude[i] = 0;
        for (int c = 0; c < keys.dim; ++c) {
            const double term = query[c] * static_cast<double>(key[c]);
            score[i] += term;
            magnitude[i] += std::fabs(term);
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

void accumulate(const float * weight, int64_t weight_stride, const float * rescale, int n_query, const Rows & values,
                const int32_t * cells, int n, float * acc, const Ahead &) {
    const int dim_padded = padded(values.dim);
    for (int h = 0; h < n_query; ++h) {
        for (int c = 0; c < values.dim; ++c) {
            acc[h * dim_padded + c] *= rescale[h];
        }
    }
    float value[kMaxDim];
    for (int i = 0; i < n; ++i) {
        row_to_f32(values.type, values.row(cells ? cells[i] : i), values.dim, value);
        for (int h = 0; h < n_query; ++h) {
            for (int c = 0; c < values.dim; ++c) {
                acc[h * dim_padded + c] += weight[h * weight_stride + i] * value[c];
            }
        }
    }
}

double squared_norm(const float * row, int dim) {
    double sum = 0;
    for (int c = 0; c < dim; ++c) {
        sum += static_cast<double>(row[c]) * row[c];
    }
    return sum;
}

void widen(const float * row, int dim, float * low, float * high) {
    for (int c = 0; c < dim; ++c) {
        low[c] = std::min(low[c], row[c]);
        high[c] = std::max(high[c], row[c]);
    }
}

Encoding encode(const float * key, const uint16_t * center, const uint16_t * step, int dim, uint8_t * code) {
    Encoding encoding{true, 0, 0};
    std::fill(code, code + padded(dim), uint8_t{0});
    for (int c = 0; c < dim; ++c) {
        const float middle = bf16_to_f32(center[c]);
        const float width = bf16_to_f32(step[c]);
        const float level = width > 0 ? std::nearbyint((key[c] - middle) / width) : 0.0f;
        // A channel that was constant so far, or a key beside the grid.
        if ((width == 0 && key[c] != middle) || !(level >= -128.0f && level <= 127.0f)) {
            encoding.fits = false;
            return encoding;
        }
        const int signed_code = static_cast<int>(level);
        code[c] = static_cast<uint8_t>(signed_code + 128);
        encoding.code_squared += signed_code * signed_code;
        const double residual =
            static_cast<double>(key[c]) - (static_cast<double>(middle) + static_cast<double>(width) * signed_code);
        encoding.residual_squared += residual * residual;
    }
    return encoding;
}

// The largest |q_c * step_c| of one head over the blocks that have anything to scan.
float largest_scaled(const ScanArgs & a, int head) {
    const int dim_padded = padded(a.dim);
    float largest = 0;
    for (int b = 0; b < a.n_blocks; ++b) {
        for (int c = 0; c < a.dim && scans(a, b); ++c) {
            largest = std::max(largest, std::fabs(a.query[head * dim_padded + c] * bf16_to_f32(a.step[b * dim_padded + c])));
        }
    }
    return largest;
}

// Upper bound on 2^(scaled / kExponentUnit - kExponentBias): the float with those bits.
float upper_weight(float scaled) {
    constexpr float kMost = 255.0f * kExponentUnit;  // the bits of infinity
    if (!(scaled < kMost)) {
        return std::numeric_limits<float>::infinity();
    }
    const float least = (kMinLog2 + kExponentBias) * kExponentUnit;
    return f32_from_bits(static_cast<uint32_t>(std::nearbyint(std::max(scaled, least))));
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
            const uint64_t cells = a.cells_of(h, b);
            if (cells == 0) {
                continue;
            }
            // The query, scaled by the block's steps and rounded to integers; and what completes their dots with the codes.
            const uint16_t * center = a.center + static_cast<int64_t>(b) * dim_padded;
            const uint16_t * step = a.step + static_cast<int64_t>(b) * dim_padded;
            int32_t level[kMaxDim];
            int32_t levels = 0;
            float base = 0;
            for (int c = 0; c < a.dim; ++c) {
                level[c] = static_cast<int32_t>(std::nearbyint(query[c] * head.inverse * bf16_to_f32(step[c])));
                levels += level[c];
                base += query[c] * bf16_to_f32(center[c]);
            }
            base -= 128.0f * head.quantum * static_cast<float>(levels);
            const float slack = block_slack(head, a.bounds[b]);
            const ToWeight to = to_weight(head, base, slack, a.dim, a.to_log2, a.reference[h]);
            a.slack[h * a.slack_stride + b] = slack;

            const uint8_t * codes = a.codes + static_cast<int64_t>(b) * groups * 4 * kBlockCells;
            double sum = 0;
            for (int i = 0; i < kBlockCells; ++i) {
                if ((cells >> i & 1) == 0) {
                    continue;
                }
                int64_t dot = 0;
                for (int c = 0; c < a.dim; ++c) {
                    dot += int64_t{level[c]} * codes[(c / 4 * kBlockCells + i) * 4 + c % 4];
                }
                weight[i] = upper_weight(static_cast<float>(dot) * to.scale + to.offset);
                sum += weight[i];
            }
            a.lower[h] += sum * lower_factor(slack);
            for (int i = sampled_cell(b); a.below != nullptr && i < sampled_cell(b) + kBlockCells / kSampleStep; ++i) {
                for (int j = 0; j < kCandidates; ++j) {
                    a.below[h * kCandidates + j] += weight[i] < a.candidate[j] ? weight[i] : 0.0f;
                }
            }
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

void select(const SelectArgs & a) {
    for (int b = 0; b < a.n_blocks; ++b) {
        const int64_t start = static_cast<int64_t>(b) * kBlockCells;
        for (int h = 0; h < a.n_query; ++h) {
            for (int i = 0; i < kBlockCells; ++i) {
                // Negated, so that a NaN is kept.
                if (!(a.weight[h * a.weight_stride + start + i] < a.threshold[h])) {
                    a.kept[b] |= uint64_t{1} << i;
                }
            }
        }
        a.kept[b] &= a.visible[b];
        for (int h = 0; h < a.n_query; ++h) {
            float sum = 0;
            for (int i = 0; i < kBlockCells; ++i) {
                sum += (a.kept[b] >> i & 1) == 0 ? a.weight[h * a.weight_stride + start + i] : 0.0f;
            }
            a.dropped[h * a.dropped_stride + b] = sum;
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

const Kernels kScalarKernels = {"scalar",     rows_to_f32, dots,   dots_f64, largest,    exp2_sum, accumulate,
                                squared_norm, widen,       encode, scan,     sums_below, select,   mask_to_bits};

}  // namespace louver
