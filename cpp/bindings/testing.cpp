// The core on numpy arrays, for the tests: kernels by instruction set, grid index, mass oracle, decode. Sizes are checked,
// because tests call with arbitrary arrays; whatever a kernel writes lies between guards.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "attention/scratch.h"
#include "bindings.h"
#include "kernels/bounds.h"
#include "kernels/kernels.h"
#include "louver/decode.h"
#include "louver/grid_index.h"
#include "louver/mass_oracle.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace louver {
namespace {

// An array that a kernel writes, poisoned (a NaN, all bits set) and between two guards.
template <class T> class Guarded {
  public:
    explicit Guarded(size_t n) : n_(n), memory_(n + 2 * kGuard) {
        std::memset(static_cast<void *>(memory_.data()), 0xff, memory_.size() * sizeof(T));
    }
    Guarded(const T * source, size_t n) : Guarded(n) { std::copy(source, source + n, data()); }

    T * data() { return memory_.data() + kGuard; }

    // No element from first up to last was written.
    bool untouched(size_t first, size_t last) const { return poison(kGuard + first, kGuard + last); }

    template <class... Size> Out<T, sizeof...(Size)> to_numpy(Size... shape) {
        if (!poison(0, kGuard) || !poison(kGuard + n_, memory_.size())) {
            throw std::runtime_error("written outside of the output array");
        }
        auto owned = std::make_unique<std::vector<T>>(std::move(memory_));
        T * first = owned->data() + kGuard;
        const nb::capsule owner(owned.release(), [](void * p) noexcept { delete static_cast<std::vector<T> *>(p); });
        return Out<T, sizeof...(Size)>(first, {static_cast<size_t>(shape)...}, owner);
    }

  private:
    bool poison(size_t first, size_t last) const {
        const auto * bytes = reinterpret_cast<const uint8_t *>(memory_.data());
        return std::all_of(bytes + first * sizeof(T), bytes + last * sizeof(T), [](uint8_t byte) { return byte == 0xff; });
    }

    static constexpr size_t kGuard = 33;  // odd: what a kernel writes is not aligned
    size_t n_;
    std::vector<T> memory_;
};

const Kernels & kernels_of(const std::string & isa) {
    const Kernels * table = kernels_named(isa.c_str());
    require(table != nullptr, "isa is \"" + isa + "\", which this machine does not have");
    return *table;
}

// The K or V of one layer as llama.cpp lays them out: a row per cell, in it all heads side by side.
class Cache {
  public:
    using Data = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<2>, nb::device::cpu>;

    Cache(Data data, const std::string & dtype, int dim) : data_(std::move(data)), type_(dtype_named(dtype)), dim_(dim) {
        require(dim >= 1 && dim <= 1024, "Cache: dim is " + std::to_string(dim) + ", accepted are 1 to 1024");
        require((type_ != DType::q8_0 && type_ != DType::q4_0) || dim % 32 == 0, "Cache: dim is no multiple of 32");
        require(data_.shape(1) > 0 && data_.shape(1) % row_bytes(type_, dim) == 0, "Cache: a row does not hold whole heads");
        require(data_.stride(1) == 1, "Cache: the bytes of a row do not lie side by side");
    }
    int dim() const { return dim_; }
    int64_t n_cells() const { return static_cast<int64_t>(data_.shape(0)); }
    int n_head() const { return static_cast<int>(data_.shape(1) / row_bytes(type_, dim_)); }

    Rows rows(int head) const {
        require(head >= 0 && head < n_head(), "head is " + std::to_string(head) + " of " + std::to_string(n_head()));
        const auto * first =
            reinterpret_cast<const std::byte *>(data_.data()) + row_bytes(type_, dim_) * static_cast<size_t>(head);
        return {first, data_.stride(0), dim_, type_};
    }
    void require_cells(const In<int32_t, 1> & cells) const {
        for (size_t i = 0; i < cells.shape(0); ++i) {
            require(cells.data()[i] >= 0 && cells.data()[i] < n_cells(), "a cell is not in the cache");
        }
    }

  private:
    Data data_;
    DType type_;
    int dim_;
};

// The rows that a kernel works on and those that it prefetches: `cells`, or all, of one head.
struct RowsArgs {
    Rows rows;
    const int32_t * cells = nullptr;
    int n = 0;
    Ahead ahead;
};

using Cells = std::optional<In<int32_t, 1>>;

RowsArgs rows_of(const Cache & cache, int head, const Cells & cells, const Cells & ahead) {
    RowsArgs args;
    args.rows = cache.rows(head);
    args.n = static_cast<int>(cache.n_cells());
    if (cells) {
        cache.require_cells(*cells);
        args.cells = cells->data();
        args.n = static_cast<int>(cells->shape(0));
    }
    if (ahead) {
        cache.require_cells(*ahead);
        args.ahead = {args.rows, ahead->data(), static_cast<int>(ahead->shape(0))};
    }
    return args;
}

// Rows padded with zeros.
Guarded<float> padded_rows(const In<float, 2> & rows) {
    const size_t n = rows.shape(0);
    const size_t dim = rows.shape(1);
    const size_t width = static_cast<size_t>(padded(static_cast<int>(dim)));
    Guarded<float> out(n * width);
    std::fill_n(out.data(), n * width, 0.0f);
    for (size_t i = 0; i < n; ++i) {
        std::copy_n(rows.data() + i * dim, dim, out.data() + i * width);
    }
    return out;
}

Out<float, 2> rows_to_f32(const std::string & isa, const Cache & cache, int head, const Cells & cells) {
    const RowsArgs keys = rows_of(cache, head, cells, {});
    const int width = padded(cache.dim());
    Guarded<float> out(static_cast<size_t>(keys.n) * static_cast<size_t>(width));
    kernels_of(isa).rows_to_f32(keys.rows, keys.cells, keys.n, out.data());
    return out.to_numpy(keys.n, width);
}

Out<float, 2> dots(const std::string & isa, const In<float, 2> & query, const Cache & cache, int head, const Cells & cells,
                   const Cells & ahead, int64_t gap) {
    const RowsArgs keys = rows_of(cache, head, cells, ahead);
    const size_t n_query = query.shape(0);
    require(query.shape(1) == static_cast<size_t>(cache.dim()), "dots: query and keys are of different dim");
    require(gap >= 0, "dots: gap is negative");
    Guarded<float> padded_query = padded_rows(query);
    const int64_t out_stride = keys.n + gap;
    Guarded<float> out(n_query * static_cast<size_t>(out_stride));
    kernels_of(isa).dots(padded_query.data(), static_cast<int>(n_query), keys.rows, keys.cells, keys.n, out.data(), out_stride,
                         keys.ahead);
    return out.to_numpy(n_query, out_stride);
}

std::tuple<Out<double, 1>, Out<double, 1>> dots_f64(const std::string & isa, const In<float, 1> & query, const Cache & cache,
                                                    int head, const Cells & cells) {
    const RowsArgs keys = rows_of(cache, head, cells, {});
    require(query.shape(0) == static_cast<size_t>(cache.dim()), "dots_f64: query and keys are of different dim");
    std::vector<double> wide(static_cast<size_t>(padded(cache.dim())));
    std::copy_n(query.data(), query.shape(0), wide.begin());
    Guarded<double> score(static_cast<size_t>(keys.n));
    Guarded<double> magnitude(static_cast<size_t>(keys.n));
    kernels_of(isa).dots_f64(wide.data(), keys.rows, keys.cells, keys.n, score.data(), magnitude.data());
    return {score.to_numpy(keys.n), magnitude.to_numpy(keys.n)};
}

float largest(const std::string & isa, const In<float, 1> & x) {
    require(x.shape(0) > 0, "largest: x is empty");
    return kernels_of(isa).largest(x.data(), static_cast<int>(x.shape(0)));
}

std::tuple<Out<float, 1>, float> exp2_sum(const std::string & isa, const In<float, 1> & x, float scale, float shift) {
    Guarded<float> out(x.data(), x.shape(0));
    const float sum = kernels_of(isa).exp2_sum(out.data(), static_cast<int>(x.shape(0)), scale, shift);
    return {out.to_numpy(x.shape(0)), sum};
}

Out<float, 2> accumulate(const std::string & isa, const In<float, 2> & weight, const In<float, 1> & rescale, const Cache & cache,
                         const In<float, 2> & acc, int head, const Cells & cells, const Cells & ahead) {
    const RowsArgs values = rows_of(cache, head, cells, ahead);
    const size_t n_query = weight.shape(0);
    require(weight.shape(1) >= static_cast<size_t>(values.n), "accumulate: fewer weights than values");
    require(rescale.shape(0) == n_query && acc.shape(0) == n_query,
            "accumulate: weight, rescale and acc are of different n_query");
    require(acc.shape(1) == static_cast<size_t>(cache.dim()), "accumulate: values and acc are of different dim");
    Guarded<float> out = padded_rows(acc);
    kernels_of(isa).accumulate(weight.data(), static_cast<int64_t>(weight.shape(1)), rescale.data(), static_cast<int>(n_query),
                               values.rows, values.cells, values.n, out.data(), values.ahead);
    return out.to_numpy(n_query, padded(cache.dim()));
}

double squared_norm(const std::string & isa, const In<float, 1> & row) {
    const int dim = static_cast<int>(row.shape(0));
    Guarded<float> wide(static_cast<size_t>(padded(dim)));
    std::fill_n(std::copy_n(row.data(), row.shape(0), wide.data()), padded(dim) - dim, 0.0f);
    return kernels_of(isa).squared_norm(wide.data(), dim);
}

std::tuple<Out<float, 1>, Out<float, 1>> range(const std::string & isa, const In<float, 2> & rows) {
    const int dim = static_cast<int>(rows.shape(1));
    const size_t width = static_cast<size_t>(padded(dim));
    Guarded<float> wide = padded_rows(rows);
    Guarded<float> low(wide.data(), width);
    Guarded<float> high(wide.data(), width);
    for (size_t i = 1; i < rows.shape(0); ++i) {
        kernels_of(isa).widen(wide.data() + i * width, dim, low.data(), high.data());
    }
    return {low.to_numpy(width), high.to_numpy(width)};
}

std::tuple<bool, double, int64_t, Out<uint8_t, 1>> encode(const std::string & isa, const In<float, 1> & key,
                                                          const In<uint16_t, 1> & center, const In<uint16_t, 1> & step) {
    const size_t dim = key.shape(0);
    require(center.shape(0) == dim && step.shape(0) == dim, "encode: key, center and step are of different dim");
    const size_t width = static_cast<size_t>(padded(static_cast<int>(dim)));
    std::vector<float> wide(width);
    std::vector<uint16_t> centers(width);
    std::vector<uint16_t> steps(width);
    std::copy_n(key.data(), dim, wide.begin());
    std::copy_n(center.data(), dim, centers.begin());
    std::copy_n(step.data(), dim, steps.begin());
    Guarded<uint8_t> code(width);
    const Encoding e = kernels_of(isa).encode(wide.data(), centers.data(), steps.data(), static_cast<int>(dim), code.data());
    return {e.fits, e.residual_squared, e.code_squared, code.to_numpy(width)};
}

using Scanned = std::tuple<Out<float, 2>, Out<float, 2>, Out<double, 1>, Out<double, 2>>;

Scanned scan(const std::string & isa, const GridIndex & index, const In<uint64_t, 2> & cells, const In<float, 2> & query,
             const In<float, 1> & query_norm, const In<float, 1> & reference, const In<float, 1> & candidate, float to_log2,
             bool certified, int first) {
    constexpr int64_t kGap = 17;
    const size_t n_query = query.shape(0);
    const int n_blocks = static_cast<int>(cells.shape(1));
    require(first >= 0 && n_blocks + first <= index.n_blocks(), "scan: blocks that the index does not have");
    require(query.shape(1) == static_cast<size_t>(index.key_dim()), "scan: query and index are of different key_dim");
    require(cells.shape(0) == 1 || cells.shape(0) == n_query, "scan: cells are neither for all nor for each query");
    require(query_norm.shape(0) == n_query && reference.shape(0) == n_query,
            "scan: query, query_norm, reference of different size");
    require(candidate.shape(0) == kCandidates, "scan: candidate has not 16 elements");
    for (size_t i = 0; i < cells.size(); ++i) {
        const uint64_t indexed = index.indexed(first + static_cast<int>(i) % n_blocks);
        require((cells.data()[i] & ~indexed) == 0, "scan: cells that are not indexed");
    }

    ScanArgs args{};
    args.weight_stride = static_cast<int64_t>(n_blocks) * kBlockCells + kGap;
    args.slack_stride = static_cast<int64_t>(n_blocks) + 1;
    Guarded<float> padded_query = padded_rows(query);
    Guarded<float> weight(n_query * static_cast<size_t>(args.weight_stride));
    Guarded<float> slack(n_query * static_cast<size_t>(args.slack_stride));
    Guarded<double> lower(n_query);
    Guarded<double> below(n_query * kCandidates);
    std::fill_n(lower.data(), n_query, 0.0);
    std::fill_n(below.data(), n_query * kCandidates, 0.0);
    args.cells_stride = cells.shape(0) == 1 ? 0 : n_blocks;
    args.dim = index.key_dim();
    args.n_query = static_cast<int>(n_query);
    args.query = padded_query.data();
    args.query_norm = query_norm.data();
    args.to_log2 = to_log2;
    args.certified = certified;
    args.reference = reference.data();
    args.candidate = candidate.data();
    args.lower = lower.data();
    args.below = below.data();
    for (int b = 0; b < n_blocks; b += kMaxRun) {
        args.n_blocks = std::min(n_blocks - b, kMaxRun);
        args.codes = index.codes(first + b);
        args.next_codes = b + kMaxRun < n_blocks ? index.codes(first + b + kMaxRun) : nullptr;
        args.center = index.center(first + b);
        args.step = index.step(first + b);
        args.bounds = index.bounds(first + b);
        args.cells = cells.data() + b;
        args.weight = weight.data() + static_cast<int64_t>(b) * kBlockCells;
        args.slack = slack.data() + b;
        kernels_of(isa).scan(args);
    }
    return {weight.to_numpy(n_query, args.weight_stride), slack.to_numpy(n_query, args.slack_stride), lower.to_numpy(n_query),
            below.to_numpy(n_query, kCandidates)};
}

Out<double, 1> sums_below(const std::string & isa, const In<float, 1> & weight, const In<float, 1> & candidate,
                          const In<double, 1> & below) {
    require(weight.shape(0) % 64 == 0, "sums_below: n is no multiple of 64");
    require(candidate.shape(0) == kCandidates && below.shape(0) == kCandidates,
            "sums_below: candidate or below has not 16 elements");
    Guarded<double> out(below.data(), kCandidates);
    kernels_of(isa).sums_below(weight.data(), static_cast<int64_t>(weight.shape(0)), candidate.data(), out.data());
    return out.to_numpy(kCandidates);
}

std::tuple<Out<uint64_t, 1>, Out<float, 2>> select(const std::string & isa, const In<float, 2> & weight,
                                                   const In<float, 1> & threshold, const In<uint64_t, 1> & kept,
                                                   const In<uint64_t, 1> & visible) {
    const size_t n_query = weight.shape(0);
    const size_t n_blocks = kept.shape(0);
    require(weight.shape(1) >= n_blocks * kBlockCells, "select: fewer weights than cells");
    require(threshold.shape(0) == n_query, "select: weight and threshold are of different n_query");
    require(visible.shape(0) == n_blocks, "select: kept and visible are of different n_blocks");
    Guarded<uint64_t> kept_after(kept.data(), n_blocks);
    SelectArgs args{};
    args.weight = weight.data();
    args.weight_stride = static_cast<int64_t>(weight.shape(1));
    args.threshold = threshold.data();
    args.n_query = static_cast<int>(n_query);
    args.n_blocks = static_cast<int>(n_blocks);
    args.visible = visible.data();
    args.kept = kept_after.data();
    args.dropped_stride = args.n_blocks + 1;
    Guarded<float> dropped(n_query * static_cast<size_t>(args.dropped_stride));
    args.dropped = dropped.data();
    kernels_of(isa).select(args);
    return {kept_after.to_numpy(n_blocks), dropped.to_numpy(n_query, args.dropped_stride)};
}

std::tuple<Out<uint64_t, 1>, bool> mask_to_bits(const std::string & isa, const In<uint16_t, 1> & mask) {
    const int64_t n = static_cast<int64_t>(mask.shape(0));
    Guarded<uint64_t> bits(static_cast<size_t>(n_blocks_for(n)));
    const bool plain = kernels_of(isa).mask_to_bits(mask.data(), n, bits.data());
    return {bits.to_numpy(n_blocks_for(n)), plain};
}

void require_block(const GridIndex & index, int block) {
    require(block >= 0 && block < index.n_blocks(),
            "block is " + std::to_string(block) + " of " + std::to_string(index.n_blocks()));
}

std::tuple<int, bool> repair(GridIndex & index, int block, uint64_t wanted, const Cache & keys, const Cache * values, int head) {
    require_block(index, block);
    require(keys.dim() == index.key_dim(), "repair: keys and index are of different key_dim");
    require((values == nullptr ? 0 : values->dim()) == index.value_dim(), "repair: values and index are of different value_dim");
    int64_t n_cells = std::min(index.n_cells(), keys.n_cells());
    if (values != nullptr) {
        n_cells = std::min(n_cells, values->n_cells());
    }
    const int64_t n_here = n_cells - static_cast<int64_t>(block) * kBlockCells;
    require(wanted == 0 || static_cast<int64_t>(std::bit_width(wanted)) <= n_here,
            "repair: wanted has cells beyond the last one");
    const GridIndex::Repair result =
        index.repair(block, wanted, keys.rows(head), values == nullptr ? Rows{} : values->rows(head));
    return {result.encoded, result.rebuilt};
}

// A plane's row of a block in bfloat16, as float32.
Out<float, 1> bf16_row(const uint16_t * row, int n) {
    Guarded<float> out(static_cast<size_t>(n));
    const Rows rows{reinterpret_cast<const std::byte *>(row), 0, n, DType::bf16};
    std::vector<float> widened(static_cast<size_t>(padded(n)));
    kernels_of("scalar").rows_to_f32(rows, nullptr, 1, widened.data());
    std::copy_n(widened.data(), n, out.data());
    return out.to_numpy(n);
}

Out<uint8_t, 2> codes(const GridIndex & index, int block) {
    require_block(index, block);
    const size_t dim = static_cast<size_t>(index.key_dim());
    Guarded<uint8_t> out(kBlockCells * dim);
    for (size_t i = 0; i < kBlockCells; ++i) {
        for (size_t c = 0; c < dim; ++c) {
            out.data()[i * dim + c] = index.codes(block)[(c / 4 * kBlockCells + i) * 4 + c % 4];
        }
    }
    return out.to_numpy(kBlockCells, dim);
}

Sums sums_of(const In<double, 1> & below) {
    require(below.shape(0) == kOracleCandidates, "below has not 16 elements");
    Sums sums;
    std::copy_n(below.data(), sums.size(), sums.begin());
    return sums;
}

Out<float, 1> candidates(const Candidates & c) { return Guarded<float>(c.data(), c.size()).to_numpy(c.size()); }

struct Decoded {
    Outcome outcome = Outcome::done;
    Out<float, 3> output;
    std::vector<HeadCertificate> certificates;
    CheckCounts checked;
};

struct FreeAligned {
    void operator()(std::byte * p) const { std::free(p); }
};

Decoded run_decode(const In<float, 3> & query, const Cache & keys, const Cache & values,
                   const std::vector<const GridIndex *> & index, const In<bool, 2> & visible, float scale,
                   const DecodeSettings & settings, const std::vector<bool> & attend_all, int n_threads) {
    const size_t n_token = query.shape(0);
    const size_t n_head = query.shape(1);
    const size_t n_head_kv = static_cast<size_t>(keys.n_head());
    const int64_t n_kv = static_cast<int64_t>(visible.shape(1));
    require(query.shape(2) == static_cast<size_t>(keys.dim()), "decode: query and keys are of different key_dim");
    require(n_token > 0 && visible.shape(0) == n_token, "decode: query and visible are of different n_token");
    require(attend_all.empty() || attend_all.size() == n_head_kv, "decode: attend_all is not one for each KV head");
    require(values.n_head() == keys.n_head(), "decode: keys and values are of different n_head_kv");
    require(n_head > 0 && n_head % n_head_kv == 0, "decode: n_head is no multiple of n_head_kv");
    require(n_kv <= keys.n_cells() && n_kv <= values.n_cells(), "decode: visible is longer than the cache");
    require(scale > 0 && std::isfinite(scale), "decode: scale is not positive");
    require(settings.epsilon >= 0 && settings.epsilon < 1, "decode: epsilon is not in [0, 1)");
    require(settings.sinks >= 0 && settings.recent >= 0, "decode: sinks or recent is negative");
    require(n_threads >= 1 && n_threads <= 16, "decode: n_threads is not in 1 to 16");
    require(settings.epsilon == 0 || index.size() == n_head_kv, "decode: not one index for each KV head");
    for (const GridIndex * one : index) {
        require(one != nullptr && one->n_blocks() >= n_blocks_for(n_kv) && one->key_dim() == keys.dim() &&
                    one->value_dim() == values.dim(),
                "decode: an index that does not fit the cache");
    }

    std::vector<Rows> key_rows;
    std::vector<Rows> value_rows;
    for (int h = 0; h < keys.n_head(); ++h) {
        key_rows.push_back(keys.rows(h));
        value_rows.push_back(values.rows(h));
    }
    const size_t n_blocks = static_cast<size_t>(n_blocks_for(n_kv));
    std::vector<uint64_t> bits(n_token * n_blocks);
    for (size_t t = 0; t < n_token; ++t) {
        for (size_t i = 0; i < visible.shape(1); ++i) {
            const bool seen = visible.data()[t * visible.shape(1) + i];
            bits[t * n_blocks + i / kBlockCells] |= static_cast<uint64_t>(seen) << (i % kBlockCells);
        }
    }
    const std::vector<uint8_t> all(attend_all.begin(), attend_all.end());
    const size_t value_dim = static_cast<size_t>(values.dim());
    const size_t output_stride = value_dim + 7;
    const size_t n_rows = n_token * n_head;
    Guarded<float> output(n_rows * output_stride);
    std::vector<HeadCertificate> certificates(n_rows);
    std::vector<CheckCounts> checked(static_cast<size_t>(n_threads));

    DecodeTask task;
    task.n_token = static_cast<int>(n_token);
    task.n_head = static_cast<int>(n_head);
    task.n_head_kv = keys.n_head();
    task.n_kv = n_kv;
    task.scale = scale;
    task.query = reinterpret_cast<const std::byte *>(query.data());
    task.query_token_stride = static_cast<int64_t>(n_head * query.shape(2) * sizeof(float));
    task.query_stride = static_cast<int64_t>(query.shape(2) * sizeof(float));
    task.keys = key_rows.data();
    task.values = value_rows.data();
    task.index = index.data();
    task.attend_all = all.empty() ? nullptr : all.data();
    task.visible = bits.data();
    task.output = reinterpret_cast<std::byte *>(output.data());
    task.output_token_stride = static_cast<int64_t>(n_head * output_stride * sizeof(float));
    task.output_stride = static_cast<int64_t>(output_stride * sizeof(float));
    task.certificates = certificates.data();
    task.checked = checked.data();
    task.settings = settings;

    // Scratch comes with whatever an earlier op left: huge floats here (3.4e38), and a guard behind.
    constexpr size_t kGuard = 256;
    const size_t needed =
        decode_scratch_bytes(task.n_token, task.n_head, task.n_head_kv, n_kv, keys.dim(), values.dim(), n_threads);
    const size_t size = (needed + kGuard + 63) / 64 * 64;
    const std::unique_ptr<std::byte, FreeAligned> scratch(static_cast<std::byte *>(std::aligned_alloc(64, size)));
    std::memset(scratch.get(), 0x7f, size);

    std::vector<Outcome> outcomes(static_cast<size_t>(n_threads));
    {
        const nb::gil_scoped_release released;
        std::barrier<> barrier(n_threads);
        const auto work = [&](int rank) {
            Team team;
            team.rank = rank;
            team.size = n_threads;
            team.wait = [](void * context) { static_cast<std::barrier<> *>(context)->arrive_and_wait(); };
            team.context = &barrier;
            outcomes[static_cast<size_t>(rank)] = decode(task, team, scratch.get());
        };
        std::vector<std::jthread> threads;
        for (int rank = 1; rank < n_threads; ++rank) {
            threads.emplace_back(work, rank);
        }
        work(0);
    }

    const auto check = [](bool holds, const char * message) {
        if (!holds) {
            throw std::runtime_error(message);
        }
    };
    check(std::all_of(scratch.get() + needed, scratch.get() + size, [](std::byte b) { return b == std::byte{0x7f}; }),
          "decode wrote beyond its scratch");
    check(std::all_of(outcomes.begin(), outcomes.end(), [&](Outcome o) { return o == outcomes[0]; }),
          "threads differ in the outcome");
    Guarded<float> dense(n_rows * value_dim);
    for (size_t h = 0; h < n_rows; ++h) {
        check(output.untouched(h * output_stride + value_dim, (h + 1) * output_stride), "decode wrote between the output's rows");
        std::copy_n(output.data() + h * output_stride, value_dim, dense.data() + h * value_dim);
    }
    output.to_numpy(n_rows * output_stride);  // looks at the guards
    Decoded result{outcomes[0], dense.to_numpy(n_token, n_head, value_dim), certificates, {}};
    for (const CheckCounts & one : checked) {
        result.checked += one;
    }
    return result;
}

void bind_kernels(nb::module_ & m) {
    m.attr("WEIGHT_ERROR") = kWeightError;
    m.attr("MIN_LOG2") = kMinLog2;
    m.attr("TINY_SCALED_QUERY") = kTinyScaledQuery;
    m.attr("MAX_QUERY_NORM") = kMaxQueryNorm;
    m.attr("NORM_INFLATION") = kNormInflation;
    m.attr("CHORD_EXCESS") = kChordExcess;
    m.attr("CANDIDATES") = kCandidates;
    m.attr("MAX_RUN") = kMaxRun;
    m.attr("SAMPLE_STEP") = kSampleStep;
    m.attr("CHUNK_BLOCKS") = kChunkBlocks;
    m.def("sampled_cell", &sampled_cell, "block"_a, "The first of the cells that are sampled of a run's block.");
    m.def("lower_factor", &lower_factor, "slack"_a, "At most 2^(-2 slack) / CHORD_EXCESS.");
    m.def("rows_to_f32", &rows_to_f32, "isa"_a, "cache"_a, "head"_a = 0, "cells"_a = nb::none(),
          "Rows of one head, (n, padded dim) float32: those of `cells` (n,) int32, or all.");
    m.def("dots", &dots, "isa"_a, "query"_a, "keys"_a, "head"_a = 0, "cells"_a = nb::none(), "ahead"_a = nb::none(), "gap"_a = 0,
          "(n_query, n + gap) float32, NaN from column n on. query (n_query, dim) float32; `cells` (n,) int32, or all; `ahead` "
          "(any,) int32: rows to prefetch.");
    m.def("dots_f64", &dots_f64, "isa"_a, "query"_a, "keys"_a, "head"_a = 0, "cells"_a = nb::none(),
          "(n,) float64 query . key and the sums of the terms' magnitudes; query (dim,) float32; `cells` (n,) int32, or all.");
    m.def("squared_norm", &squared_norm, "isa"_a, "row"_a, "Of (dim,) float32.");
    m.def("range", &range, "isa"_a, "rows"_a, "The least and the largest of each column of (n, dim) float32, n >= 1, padded.");
    m.def("encode", &encode, "isa"_a, "key"_a, "center"_a, "step"_a,
          "(fits, residual_squared, code_squared, code); key (dim,) float32, center and step (dim,) uint16 bfloat16.");
    m.def("largest", &largest, "isa"_a, "x"_a, "The largest of x, (n,) float32, n >= 1; NaN if one is.");
    m.def("exp2_sum", &exp2_sum, "isa"_a, "x"_a, "scale"_a, "shift"_a, "2^(x * scale - shift) of x, (n,) float32, and the sum.");
    m.def(
        "accumulate", &accumulate, "isa"_a, "weight"_a, "rescale"_a, "values"_a, "acc"_a, "head"_a = 0, "cells"_a = nb::none(),
        "ahead"_a = nb::none(),
        "acc * rescale + weight @ values, (n_query, padded dim) float32. weight (n_query, stride >= n), rescale (n_query,), acc "
        "(n_query, dim), all float32; `cells` and `ahead` as of dots.");
    m.def(
        "scan", &scan, "isa"_a, "index"_a, "cells"_a, "query"_a, "query_norm"_a, "reference"_a, "candidate"_a, "to_log2"_a,
        "certified"_a = true, "first"_a = 0,
        "Weights (n_query, n_blocks * 64 + 17), slacks (n_query, n_blocks + 1) float32, NaN beyond the blocks; lower (n_query,), "
        "below (n_query, 16) float64. Blocks `first` on, in runs of MAX_RUN; cells (1 or n_query, n_blocks) uint64 bits; query "
        "(n_query, key_dim), query_norm and reference (n_query,), candidate (16,) float32.");
    m.def("sums_below", &sums_below, "isa"_a, "weight"_a, "candidate"_a, "below"_a,
          "below (16,) float64 plus the sums of weight (n,) float32 under each candidate (16,) float32; n % 64 == 0.");
    m.def(
        "select", &select, "isa"_a, "weight"_a, "threshold"_a, "kept"_a, "visible"_a,
        "kept (n_blocks,) uint64 with the cells whose weight (n_query, stride) float32 reaches threshold (n_query,) float32, of "
        "those in visible (n_blocks,) uint64; and (n_query, n_blocks + 1) float32, NaN beyond the blocks: the sums of the "
        "weights "
        "not kept.");
    m.def("mask_to_bits", &mask_to_bits, "isa"_a, "mask"_a,
          "Bits (ceil(n / 64),) uint64 of a float16 mask given as (n,) uint16, and whether all entries are 0 or -inf.");
}

void bind_index(nb::module_ & m) {
    nb::class_<Cache>(m, "Cache", "K or V of a layer: a row per cell, all heads side by side. Keeps the array, copies nothing.")
        .def(nb::init<Cache::Data, const std::string &, int>(), "data"_a.noconvert(), "dtype"_a, "dim"_a,
             "data: (n_cells, n_head * bytes of a head's row) uint8, rows any distance apart. dtype: f32, f16, bf16, q8_0 or "
             "q4_0.")
        .def_prop_ro("n_cells", &Cache::n_cells)
        .def_prop_ro("n_head", &Cache::n_head)
        .def_prop_ro("dim", &Cache::dim);

    nb::class_<BlockBounds>(m, "BlockBounds", "Norms over the indexed cells of a block, each rounded up.")
        .def_ro("residual_norm", &BlockBounds::residual_norm)
        .def_ro("code_norm", &BlockBounds::code_norm)
        .def_ro("center_norm", &BlockBounds::center_norm)
        .def_ro("key_norm", &BlockBounds::key_norm)
        .def_ro("value_norm", &BlockBounds::value_norm);

    nb::class_<GridIndex>(m, "GridIndex", "The grid index of one KV head (louver/grid_index.h).")
        .def(nb::init<int, int, int64_t>(), "key_dim"_a, "value_dim"_a, "n_cells"_a)
        .def_prop_ro("key_dim", &GridIndex::key_dim)
        .def_prop_ro("value_dim", &GridIndex::value_dim)
        .def_prop_ro("n_cells", &GridIndex::n_cells)
        .def_prop_ro("n_blocks", &GridIndex::n_blocks)
        .def_prop_ro("block_bytes", &GridIndex::block_bytes)
        .def_prop_ro("bytes", &GridIndex::bytes)
        .def_prop_ro("built_blocks", &GridIndex::built_blocks)
        .def_prop_ro("indexed_cells", &GridIndex::indexed_cells)
        .def("repair", &repair, "block"_a, "wanted"_a, "keys"_a, "values"_a = nb::none(), "head"_a = 0,
             "Index the cells of the bits `wanted`: (cells encoded, whether with a new grid).")
        .def("invalidate", &GridIndex::invalidate, "first"_a, "count"_a, "Cells first to first + count were rewritten.")
        .def(
            "indexed",
            [](const GridIndex & self, int block) {
                require_block(self, block);
                return self.indexed(block);
            },
            "block"_a, "Bits of the cells whose codes are valid.")
        .def("codes", &codes, "block"_a, "(64, key_dim) uint8; rows of cells that were never indexed are meaningless.")
        .def(
            "center",
            [](const GridIndex & self, int block) {
                require_block(self, block);
                return bf16_row(self.center(block), self.key_dim());
            },
            "block"_a, "(key_dim,) float32.")
        .def(
            "step",
            [](const GridIndex & self, int block) {
                require_block(self, block);
                return bf16_row(self.step(block), self.key_dim());
            },
            "block"_a, "(key_dim,) float32.")
        .def(
            "value_mean",
            [](const GridIndex & self, int block) {
                require_block(self, block);
                return bf16_row(reinterpret_cast<const uint16_t *>(self.value_means().row(block)), self.value_dim());
            },
            "block"_a, "(value_dim,) float32.")
        .def(
            "bounds",
            [](const GridIndex & self, int block) {
                require_block(self, block);
                return *self.bounds(block);
            },
            "block"_a, "A copy of the block's norms.");
}

void bind_oracle(nb::module_ & m) {
    nb::class_<MassOracle>(m, "MassOracle", "The mass oracle (louver/mass_oracle.h). Sums: (16,) float64.")
        .def(
            "__init__",
            [](MassOracle * self, double epsilon, int64_t n_scanned) {
                require(epsilon > 0 && epsilon < 1, "MassOracle: epsilon is not in (0, 1)");
                new (self) MassOracle(epsilon, n_scanned);
            },
            "epsilon"_a, "n_scanned"_a)
        .def_prop_ro(
            "coarse", [](const MassOracle & self) { return candidates(self.coarse()); }, nb::rv_policy::automatic,
            "(16,) float32, rising.")
        .def(
            "guess",
            [](const MassOracle & self, const In<double, 1> & below, double lower) { return self.guess(sums_of(below), lower); },
            "below"_a, "lower"_a, "below: the sums of the weights under each coarse threshold.")
        .def("satisfies", &MassOracle::satisfies, "dropped"_a, "lower"_a)
        .def("is_open", &MassOracle::is_open, "guess"_a)
        .def(
            "fine",
            [](const MassOracle & self, float guess, bool too_much, double lower) {
                return candidates(self.fine(guess, too_much, lower));
            },
            "guess"_a, "too_much"_a, "lower"_a, "(16,) float32, rising.")
        .def(
            "refined",
            [](const MassOracle & self, const In<float, 1> & fine, const In<double, 1> & below, double lower) {
                require(fine.shape(0) == kOracleCandidates, "fine has not 16 elements");
                Candidates c;
                std::copy_n(fine.data(), c.size(), c.begin());
                return self.refined(c, sums_of(below), lower);
            },
            "fine"_a, "below"_a, "lower"_a, "below: the sums of the weights under each fine threshold.");
    m.def("dropped_share", &dropped_share, "dropped"_a, "kept"_a, "Upper bound on the dropped share of the mass.");
}

void bind_decode(nb::module_ & m) {
    nb::class_<HeadCertificate>(m, "HeadCertificate", "What is proven of one query head (louver/decode.h).")
        .def_ro("tau", &HeadCertificate::tau)
        .def_ro("n_visible", &HeadCertificate::n_visible)
        .def_ro("n_scanned", &HeadCertificate::n_scanned)
        .def_ro("n_attended", &HeadCertificate::n_attended)
        .def_ro("delta", &HeadCertificate::delta)
        .def_ro("error_bound", &HeadCertificate::error_bound);
    nb::class_<CheckCounts>(m, "CheckCounts", "Brute force beside the index, all threads together.")
        .def_ro("pairs", &CheckCounts::pairs)
        .def_ro("misses", &CheckCounts::misses)
        .def_ro("bound_violations", &CheckCounts::bound_violations)
        .def_ro("mass_violations", &CheckCounts::mass_violations);
    nb::class_<Decoded>(m, "Decoded", "What decode() found.")
        .def_prop_ro(
            "outcome", [](const Decoded & d) { return d.outcome == Outcome::done ? "done" : "not_finite"; },
            nb::sig("def outcome(self) -> str"), "done or not_finite.")
        .def_prop_ro(
            "output", [](const Decoded & d) { return d.output; }, nb::rv_policy::automatic,
            "(n_token, n_head, value_dim) float32; NaN where not written.")
        .def_ro("certificates", &Decoded::certificates, "One for each head of the first token, then of the next.")
        .def_ro("checked", &Decoded::checked);
    m.def(
        "decode",
        [](const In<float, 3> & query, const Cache & keys, const Cache & values, const std::vector<const GridIndex *> & index,
           const In<bool, 2> & visible, float scale, double epsilon, bool certified, bool compensate, int sinks, int recent,
           bool check, const std::vector<bool> & attend_all, int n_threads) {
            DecodeSettings settings;
            settings.epsilon = epsilon;
            settings.certified = certified;
            settings.compensate = compensate;
            settings.sinks = sinks;
            settings.recent = recent;
            settings.check = check;
            return run_decode(query, keys, values, index, visible, scale, settings, attend_all, n_threads);
        },
        "query"_a, "keys"_a, "values"_a, "index"_a, "visible"_a, "scale"_a, nb::kw_only(), "epsilon"_a = 0.05,
        "certified"_a = true, "compensate"_a = true, "sinks"_a = 4, "recent"_a = 64, "check"_a = false,
        "attend_all"_a = std::vector<bool>(), "n_threads"_a = 1,
        "One decode step by a team of threads, on the active instruction set. query: (n_token, n_head, key_dim) float32. index: "
        "one for each KV head; may be empty where epsilon is 0. visible: (n_token, n_kv) bool. attend_all: for each KV head "
        "whether it is not scanned; may be empty.");
}

}  // namespace

void bind_testing(nb::module_ & m) {
    nb::module_ testing =
        m.def_submodule("testing", "The core without llama.cpp, for the tests. Shapes that do not fit: ValueError.");
    // Its name in the package; the stub generator, which knows this module as _core, then leaves it out of the one-file stub.
    testing.attr("__name__") = "louver_llama._core.testing";
    bind_kernels(testing);
    bind_index(testing);
    bind_oracle(testing);
    bind_decode(testing);
    bind_benchmark(testing);
}

}  // namespace louver
