// Softmax attention over a selection, with compensation for the rest and a bound on the error.
#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attention/certificate.h"
#include "index/state.h"
#include "index/workers.h"
#include "kernels/bounds.h"
#include "kernels/kernels.h"

namespace louver {
namespace {

// What attention needs of the live values of one KV head.
struct ValueSummary {
    std::vector<float> mean;  // [n_blocks][padded(dim)] of the live ones; 0 for a block without any
    double norm = 0;          // the largest |value|, rounded up; a mean is no longer
    bool finite = true;
};

ValueSummary summarize(const Rows & values, const std::vector<uint64_t> & live) {
    const size_t width = static_cast<size_t>(padded(values.dim));
    ValueSummary summary;
    summary.mean.assign(live.size() * width, 0.0f);
    std::vector<float> row(width);
    std::vector<double> sum(width);
    for (size_t b = 0; b < live.size(); ++b) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (uint64_t left = live[b]; left != 0; left &= left - 1) {
            const int32_t cell = static_cast<int32_t>(b) * kBlockCells + std::countr_zero(left);
            kernels().rows_to_f32(values, &cell, 1, row.data());
            double squared = 0;
            for (size_t c = 0; c < width; ++c) {
                sum[c] += static_cast<double>(row[c]);
                squared += static_cast<double>(row[c]) * row[c];
            }
            summary.finite = summary.finite && std::isfinite(squared);
            summary.norm = std::max(summary.norm, std::sqrt(squared) * (1 + 0x1p-20));
        }
        for (size_t c = 0; c < width && live[b] != 0; ++c) {
            summary.mean[b * width + c] = static_cast<float>(sum[c] / std::popcount(live[b]));
        }
    }
    return summary;
}

class Attend {
  public:
    Attend(const Index::State & state, const QuerySet & queries, const StridedKeys & values, const Selected & selected,
           bool compensate)
        : s_(state),
          queries_(queries),
          values_(values.type, values.n_head_kv, values.dim),
          selected_(selected),
          compensate_(compensate) {
        if (values.dim == 1 || values.element_stride == static_cast<int64_t>(row_bytes(values.type, 1))) {
            values_.borrow(values, nullptr);
        } else {
            static_cast<void>(values_.reserve(values.n));
            for (int64_t i = 0; i < values.n; ++i) {
                values_.set(i, values, i);
            }
        }
        summaries_.resize(static_cast<size_t>(values.n_head_kv));
        parallel_for(values.n_head_kv, state.n_threads(), [&](int64_t head) {
            summaries_[static_cast<size_t>(head)] = summarize(values_.rows(static_cast<int>(head)), state.live);
        });
    }

    Attention run() {
        const size_t n = static_cast<size_t>(queries_.n());
        out_.output.resize(n * static_cast<size_t>(values_.dim()));
        out_.error_bound.resize(n);
        out_.dense.resize(n);
        out_.certificates = selected_.certificates;
        parallel_for(queries_.n(), s_.n_threads(), [&](int64_t query) { attend(static_cast<int>(query)); });
        return std::move(out_);
    }

  private:
    const ValueSummary & summary(int query) const { return summaries_[static_cast<size_t>(queries_.head_of(query))]; }

    void attend(int query) {
        const Scored & keys = selected_.keys[static_cast<size_t>(query)];
        const bool finite =
            std::all_of(keys.scores.begin(), keys.scores.end(), [](double score) { return std::isfinite(score); });
        finite && summary(query).finite ? attend_selected(query, keys) : attend_all(query);
    }

    // Weights are relative to the largest selected one, or to the reference where nothing was selected.
    void attend_selected(int query, const Scored & keys) {
        const size_t q = static_cast<size_t>(query);
        const double reference = static_cast<double>(selected_.reference[q]);
        double peak = keys.ids.empty() ? reference : -HUGE_VAL;
        for (const double score : keys.scores) {
            peak = std::max(peak, score * selected_.to_log2);
        }
        std::vector<double> sum(static_cast<size_t>(padded(values_.dim())));
        const double mass = add_selected(query, keys, peak, sum);
        double added = 0;
        if (compensate_ && selected_.dropped[q] > 0) {
            added = add_means(query, std::exp2(reference - peak), sum);
        }
        const double total = mass + added;
        double squared = 0;
        float * out = out_.output.data() + q * static_cast<size_t>(values_.dim());
        for (int c = 0; c < values_.dim(); ++c) {
            out[c] = total > 0 ? static_cast<float>(sum[static_cast<size_t>(c)] / total) : 0.0f;
            squared += static_cast<double>(out[c]) * out[c];
        }
        const double norm = std::sqrt(squared) * (1 + 0x1p-20);
        const double most = summary(query).norm + norm;  // two vectors differ by no more
        // In units of 2^reference, as the bounds are.
        const double bound =
            error_bound(selected_.dropped[q], added * std::exp2(peak - reference), selected_.kept[q], summary(query).norm, norm);
        out_.error_bound[q] = std::isfinite(bound) ? std::min(bound, most) : most;
    }

    double add_selected(int query, const Scored & keys, double peak, std::vector<double> & sum) const {
        const Rows & rows = values_.rows(queries_.head_of(query));
        std::vector<float> row(sum.size());
        double mass = 0;
        for (size_t j = 0; j < keys.ids.size(); ++j) {
            const double weight = std::exp2(keys.scores[j] * selected_.to_log2 - peak);
            const int32_t cell = static_cast<int32_t>(keys.ids[j]);
            kernels().rows_to_f32(rows, &cell, 1, row.data());
            for (size_t c = 0; c < sum.size(); ++c) {
                sum[c] += weight * row[c];
            }
            mass += weight;
        }
        return mass;
    }

    double add_means(int query, double unit, std::vector<double> & sum) const {
        const size_t n_blocks = s_.live.size();
        const float * estimate = selected_.estimate.data() + static_cast<size_t>(query) * n_blocks;
        double added = 0;
        for (size_t b = 0; b < n_blocks; ++b) {
            const double weight = estimate[b] * unit;
            if (!(weight > 0) || !std::isfinite(weight)) {
                continue;
            }
            const float * mean = summary(query).mean.data() + b * sum.size();
            for (size_t c = 0; c < sum.size(); ++c) {
                sum[c] += weight * mean[c];
            }
            added += weight;
        }
        return added;
    }

    // What dense attention gives, NaN and infinities included.
    void attend_all(int query) {
        const size_t q = static_cast<size_t>(query);
        const int head = queries_.head_of(query);
        std::vector<int32_t> cells;
        for (size_t b = 0; b < s_.live.size(); ++b) {
            for (uint64_t left = s_.live[b]; left != 0; left &= left - 1) {
                cells.push_back(static_cast<int32_t>(b) * kBlockCells + std::countr_zero(left));
            }
        }
        std::vector<double> score(cells.size());
        std::vector<double> magnitude(cells.size());
        Scorer(s_.store.rows(head), queries_.f32(query), queries_.f64(query))
            .score(cells.data(), static_cast<int>(cells.size()), score.data(), magnitude.data());
        double peak = -HUGE_VAL;
        for (const double s : score) {
            peak = std::isnan(s) || std::isnan(peak) ? NAN : std::max(peak, s);
        }
        std::vector<double> sum(static_cast<size_t>(padded(values_.dim())));
        std::vector<float> row(sum.size());
        double mass = 0;
        for (size_t j = 0; j < cells.size(); ++j) {
            const double weight = std::exp2((score[j] - peak) * selected_.to_log2);
            kernels().rows_to_f32(values_.rows(head), &cells[j], 1, row.data());
            for (size_t c = 0; c < sum.size(); ++c) {
                sum[c] += weight * row[c];
            }
            mass += weight;
        }
        for (size_t c = 0; c < static_cast<size_t>(values_.dim()); ++c) {
            out_.output[q * static_cast<size_t>(values_.dim()) + c] = static_cast<float>(sum[c] / mass);
        }
        out_.dense[q] = 1;
        out_.certificates[q].delta = 0;
        out_.certificates[q].n_scored = out_.certificates[q].n_selected = static_cast<int64_t>(cells.size());
    }

    const Index::State & s_;
    const QuerySet & queries_;
    KeyStore values_;
    const Selected & selected_;
    bool compensate_;
    std::vector<ValueSummary> summaries_;  // [n_head_kv]
    Attention out_;
};

void require(bool holds, const std::string & message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

}  // namespace

Attention attend_keys(const Index::State & state, const QuerySet & queries, const StridedKeys & values, const Oracle & oracle,
                      std::span<const int64_t> sample, double scale, bool compensate) {
    require(values.type == DType::f32 || values.type == DType::f16 || values.type == DType::bf16,
            "type of values: accepted are f32, f16, bf16");
    require(values.n_head_kv == state.store.n_head_kv(), "n_head_kv of values is " + std::to_string(values.n_head_kv) +
                                                             ", accepted is the index's " +
                                                             std::to_string(state.store.n_head_kv()));
    require(values.n == state.store.size(), "values have " + std::to_string(values.n) +
                                                " rows, accepted is one for each of the index's " +
                                                std::to_string(state.store.size()) + " positions");
    require(values.dim >= 1 && values.dim <= kMaxDim,
            "dim of values is " + std::to_string(values.dim) + ", accepted is 1 to 1024");
    const Selected selected = select_keys(state, queries, oracle, sample, scale);
    return Attend(state, queries, values, selected, compensate).run();
}

}  // namespace louver
