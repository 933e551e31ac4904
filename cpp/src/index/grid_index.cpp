#include "louver/grid_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "index/pages.h"
#include "kernels/kernels.h"
#include "kernels/numeric.h"

namespace louver {
namespace {

// More keys than this outside a block's grid, and the block gets a new one.
constexpr int kMaxMisfits = 4;

// A float at least as large as a non-negative double.
float rounded_up(double value) { return static_cast<float>(value * (1.0 + 0x1p-20)) + std::numeric_limits<float>::min(); }

// |x| of a padded row, rounded up.
float norm_up(const float * row, int dim) { return rounded_up(std::sqrt(kernels().squared_norm(row, dim))); }

struct Tiles {
    std::vector<float> keys;
    std::vector<float> values;
};

// The block's rows as float32; only rows of `cells` are read, the others keep whatever was there.
void load_tile(const Rows & rows, int block, uint64_t cells, std::vector<float> & tile) {
    const size_t width = static_cast<size_t>(padded(rows.dim));
    if (width == 0) {
        return;  // an index without values
    }
    tile.resize(width * kBlockCells);
    for (uint64_t left = cells; left != 0; left &= left - 1) {
        const int cell = std::countr_zero(left);
        const int32_t index = block * kBlockCells + cell;
        kernels().rows_to_f32(rows, &index, 1, tile.data() + width * static_cast<size_t>(cell));
    }
}

}  // namespace

void GridIndex::Unmap::operator()(std::byte * memory) const { unmap_pages(memory, bytes); }

GridIndex::GridIndex(int key_dim, int value_dim, int64_t n_cells)
    : key_dim_(key_dim), value_dim_(value_dim), n_cells_(n_cells), n_blocks_(n_blocks_for(n_cells)) {
    if (key_dim < 1 || key_dim > kMaxDim || value_dim < 0 || value_dim > kMaxDim) {
        throw std::invalid_argument("GridIndex: head dimension is " + std::to_string(key_dim) + " (values " +
                                    std::to_string(value_dim) + "), accepted are 1 to 1024");
    }
    if (n_cells < 0 || n_cells > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("GridIndex: " + std::to_string(n_cells) + " cells, accepted are 0 to 2^31 - 1");
    }
    const size_t blocks = static_cast<size_t>(n_blocks_);
    const auto in_lines = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    const size_t codes_bytes = in_lines(blocks * codes_per_block());
    const size_t grid_bytes = in_lines(2 * blocks * key_padded() * sizeof(uint16_t));
    const size_t means_bytes = in_lines(blocks * value_padded() * sizeof(uint16_t));
    const size_t bytes = codes_bytes + grid_bytes + means_bytes + blocks * sizeof(BlockBounds);
    memory_ = std::unique_ptr<std::byte, Unmap>(map_pages(bytes), Unmap{bytes});
    std::byte * next = memory_.get();
    codes_ = reinterpret_cast<uint8_t *>(next);
    grid_ = reinterpret_cast<uint16_t *>(next += codes_bytes);
    means_ = reinterpret_cast<uint16_t *>(next += grid_bytes);
    bounds_ = reinterpret_cast<BlockBounds *>(next + means_bytes);
    indexed_.assign(blocks, 0);
    not_finite_.assign(blocks, 0);
    built_.assign(blocks, 0);
}

void GridIndex::grow(int64_t n_cells) {
    GridIndex larger(key_dim_, value_dim_, std::max(n_cells, n_cells_));
    const size_t blocks = static_cast<size_t>(n_blocks_);
    std::copy_n(codes_, blocks * codes_per_block(), larger.codes_);
    std::copy_n(center_of(0), blocks * key_padded(), larger.center_of(0));
    std::copy_n(step_of(0), blocks * key_padded(), larger.step_of(0));
    std::copy_n(means_, blocks * value_padded(), larger.means_);
    std::copy_n(bounds_, blocks, larger.bounds_);
    std::copy(indexed_.begin(), indexed_.end(), larger.indexed_.begin());
    std::copy(not_finite_.begin(), not_finite_.end(), larger.not_finite_.begin());
    std::copy(built_.begin(), built_.end(), larger.built_.begin());
    *this = std::move(larger);
}

void GridIndex::invalidate(int64_t first, int64_t count) {
    const int64_t end = std::min(first + count, n_cells_);
    for (int64_t cell = std::max<int64_t>(first, 0); cell < end;) {
        const size_t block = static_cast<size_t>(cell / kBlockCells);
        const int low = static_cast<int>(cell % kBlockCells);
        const int high = static_cast<int>(std::min<int64_t>(kBlockCells, low + end - cell));
        const uint64_t bits = (high - low == kBlockCells ? ~uint64_t{0} : ((uint64_t{1} << (high - low)) - 1)) << low;
        indexed_[block] &= ~bits;
        not_finite_[block] &= ~bits;
        cell += high - low;
    }
}

GridIndex::Repair GridIndex::repair(int block, uint64_t wanted, const Rows & keys, const Rows & values) {
    const size_t b = static_cast<size_t>(block);
    const uint64_t pending = wanted & ~indexed_[b] & ~not_finite_[b];
    Repair result;
    if (pending == 0) {
        return result;
    }
    thread_local Tiles tiles;
    load_tile(keys, block, pending, tiles.keys);
    load_tile(values, block, pending, tiles.values);

    uint64_t usable = 0;
    for (uint64_t left = pending; left != 0; left &= left - 1) {
        const int cell = std::countr_zero(left);
        const uint64_t bit = uint64_t{1} << cell;
        const bool ok =
            std::isfinite(kernels().squared_norm(tiles.keys.data() + key_padded() * static_cast<size_t>(cell), key_dim_)) &&
            (value_dim_ == 0 ||
             std::isfinite(kernels().squared_norm(tiles.values.data() + value_padded() * static_cast<size_t>(cell), value_dim_)));
        (ok ? usable : not_finite_[b]) |= bit;
    }

    uint64_t misfits = 0;
    if (indexed_[b] != 0) {
        for (uint64_t left = usable; left != 0; left &= left - 1) {
            const int cell = std::countr_zero(left);
            if (encode(block, cell, tiles.keys.data() + key_padded() * static_cast<size_t>(cell))) {
                ++result.encoded;
                const float length = norm_up(tiles.values.data() + value_padded() * static_cast<size_t>(cell), value_dim_);
                bounds_[b].value_norm = std::max(bounds_[b].value_norm, length);
            } else {
                misfits |= uint64_t{1} << cell;
            }
        }
        indexed_[b] |= usable & ~misfits;
        if (std::popcount(misfits) <= kMaxMisfits) {
            return result;
        }
    }

    const uint64_t others = indexed_[b];
    const uint64_t cells = usable | others;
    if (cells == 0) {
        return result;
    }
    load_tile(keys, block, others, tiles.keys);
    load_tile(values, block, others, tiles.values);
    set_grid(block, cells, tiles.keys.data());
    indexed_[b] = 0;
    for (uint64_t left = cells; left != 0; left &= left - 1) {
        const int cell = std::countr_zero(left);
        if (encode(block, cell, tiles.keys.data() + key_padded() * static_cast<size_t>(cell))) {
            indexed_[b] |= uint64_t{1} << cell;
            ++result.encoded;
        }
    }
    summarize_values(block, indexed_[b], tiles.values.data());
    built_[b] = 1;
    result.rebuilt = true;
    return result;
}

// Centre and step of each channel from the range of the cells' keys. Both are rounded to bfloat16 first and the codes are
// taken relative to the rounded values, so that rounding them costs coverage (made up for by the step), never correctness.
void GridIndex::set_grid(int block, uint64_t cells, const float * keys) {
    uint16_t * center = center_of(block);
    uint16_t * step = step_of(block);
    float low[kMaxDim];
    float high[kMaxDim];
    std::fill_n(low, key_padded(), std::numeric_limits<float>::infinity());
    std::fill_n(high, key_padded(), -std::numeric_limits<float>::infinity());
    for (uint64_t left = cells; left != 0; left &= left - 1) {
        kernels().widen(keys + key_padded() * static_cast<size_t>(std::countr_zero(left)), key_dim_, low, high);
    }
    double center_squared = 0;
    for (size_t c = 0; c < key_padded(); ++c) {
        center[c] = 0;
        step[c] = 0;
        if (c >= static_cast<size_t>(key_dim_)) {
            continue;
        }
        center[c] = bf16_nearest(0.5f * low[c] + 0.5f * high[c]);
        const float middle = bf16_to_f32(center[c]);
        const float reach = std::max(high[c] - middle, middle - low[c]);
        step[c] = bf16_up(std::max(reach, 0.0f) / 127.0f);
        center_squared += static_cast<double>(middle) * middle;
    }
    BlockBounds & bounds = bounds_[static_cast<size_t>(block)];
    bounds = BlockBounds{};
    bounds.center_norm = rounded_up(std::sqrt(center_squared));
}

// False, with nothing changed, if the key does not fit the block's grid.
bool GridIndex::encode(int block, int cell, const float * key) {
    uint8_t code[kMaxDim];
    const Encoding encoding = kernels().encode(key, center_of(block), step_of(block), key_dim_, code);
    const float residual = rounded_up(std::sqrt(encoding.residual_squared));
    if (!encoding.fits || !std::isfinite(residual)) {  // the grid of keys near the largest float overflows
        return false;
    }
    BlockBounds & bounds = bounds_[static_cast<size_t>(block)];
    bounds.residual_norm = std::max(bounds.residual_norm, residual);
    bounds.code_norm = std::max(bounds.code_norm, rounded_up(std::sqrt(static_cast<double>(encoding.code_squared))));
    bounds.key_norm = std::max(bounds.key_norm, norm_up(key, key_dim_));

    uint8_t * codes = codes_ + static_cast<size_t>(block) * codes_per_block();
    for (int g = 0; g < (key_dim_ + 3) / 4; ++g) {
        std::copy(code + 4 * g, code + 4 * g + 4, codes + (g * kBlockCells + cell) * 4);
    }
    return true;
}

void GridIndex::summarize_values(int block, uint64_t cells, const float * values) {
    BlockBounds & bounds = bounds_[static_cast<size_t>(block)];
    uint16_t * mean = means_ + static_cast<size_t>(block) * value_padded();
    const float count = static_cast<float>(std::popcount(cells));
    std::fill(mean, mean + value_padded(), uint16_t{0});
    for (int c = 0; c < value_dim_; ++c) {
        float sum = 0;
        for (uint64_t left = cells; left != 0; left &= left - 1) {
            sum += values[value_padded() * static_cast<size_t>(std::countr_zero(left)) + static_cast<size_t>(c)];
        }
        mean[c] = std::isfinite(sum) ? bf16_nearest(sum / count) : uint16_t{0};
    }
    float longest = 0;
    for (uint64_t left = cells; left != 0; left &= left - 1) {
        longest = std::max(longest, norm_up(values + value_padded() * static_cast<size_t>(std::countr_zero(left)), value_dim_));
    }
    double mean_squared = 0;
    for (int c = 0; c < value_dim_; ++c) {
        const double m = bf16_to_f32(mean[c]);
        mean_squared += m * m;
    }
    bounds.value_norm = std::max(longest, rounded_up(std::sqrt(mean_squared)));
}

size_t GridIndex::block_bytes() const {
    return codes_per_block() + 2 * key_padded() * sizeof(uint16_t) + value_padded() * sizeof(uint16_t) + sizeof(BlockBounds) +
           2 * sizeof(uint64_t) + 1;
}

int GridIndex::built_blocks() const { return static_cast<int>(std::count(built_.begin(), built_.end(), uint8_t{1})); }

int64_t GridIndex::indexed_cells() const {
    int64_t count = 0;
    for (uint64_t bits : indexed_) {
        count += std::popcount(bits);
    }
    return count;
}

Rows GridIndex::value_means() const {
    return {reinterpret_cast<const std::byte *>(means_), static_cast<int64_t>(value_padded() * sizeof(uint16_t)), value_dim_,
            DType::bf16};
}

}  // namespace louver
