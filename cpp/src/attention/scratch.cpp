#include "attention/scratch.h"

#include <algorithm>

namespace louver {
namespace {

// With fewer chunks for each thread, smaller ones are dealt.
constexpr int kChunksPerThread = 4;

class Arena {
  public:
    explicit Arena(std::byte * base) : base_(reinterpret_cast<uintptr_t>(base)) {}

    template <class T> T * take(size_t count) {
        T * array = reinterpret_cast<T *>(base_ + used_);
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return array;
    }
    // One array for each thread, on cache lines of its own; returns that of `rank`.
    template <class T> T * take_private(size_t count, int rank, int team_size) {
        const size_t stride = (count * sizeof(T) + 63) / 64 * 64;
        T * mine = reinterpret_cast<T *>(base_ + used_ + stride * static_cast<size_t>(rank));
        used_ += stride * static_cast<size_t>(team_size);
        return mine;
    }
    size_t used() const { return used_; }

  private:
    uintptr_t base_;
    size_t used_ = 0;
};

}  // namespace

void Partial::add(const Partial & part, double factor) {
    kept += part.kept * factor;
    dropped += part.dropped;
    compensation += part.compensation;
    value_norm = std::max(value_norm, part.value_norm);
    key_norm = std::max(key_norm, part.key_norm);
    attended += part.attended;
    scanned += part.scanned;
    checked_kept += part.checked_kept;
    checked_dropped += part.checked_dropped;
}

Scratch::Scratch(std::byte * base, const Shape & shape, int rank, int team_size) {
    const size_t queries = static_cast<size_t>(shape.n_token) * static_cast<size_t>(shape.n_head);
    const size_t kv_heads = static_cast<size_t>(shape.n_head_kv);
    const size_t group = queries / kv_heads;
    const size_t team = static_cast<size_t>(team_size);
    const size_t key_width = static_cast<size_t>(padded(shape.key_dim));
    const size_t value_width = static_cast<size_t>(padded(shape.value_dim));
    n_blocks = n_blocks_for(shape.n_kv);
    weight_stride = static_cast<int64_t>(n_blocks) * kBlockCells + 16;
    chunk_blocks = std::clamp(n_blocks / (kChunksPerThread * team_size), 1, kChunkBlocks);
    const int n_chunks = (n_blocks + chunk_blocks - 1) / chunk_blocks;
    n_own = (n_chunks + team_size - 1) / team_size * chunk_blocks;
    const size_t own_blocks = static_cast<size_t>(n_own);

    Arena arena(base);
    not_finite = arena.take<int32_t>(team);
    query = arena.take<float>(queries * key_width);
    query_norm = arena.take<float>(queries);
    reference = arena.take<float>(queries);
    weight = arena.take<float>(queries * static_cast<size_t>(weight_stride));
    lower = arena.take<double>(team * queries);
    upper = arena.take<double>(team * queries);
    below = arena.take<Sums>(team * queries);
    shared_guess = arena.take<Guess>(queries);
    partial = arena.take<Partial>(team * queries);
    output = arena.take<float>(team * queries * value_width);

    slack = arena.take_private<float>(queries * own_blocks, rank, team_size);
    dropped = arena.take_private<float>(queries * own_blocks, rank, team_size);
    kept = arena.take_private<uint64_t>(kv_heads * own_blocks, rank, team_size);
    sight = arena.take_private<Sight>(static_cast<size_t>(shape.n_token), rank, team_size);
    guess = arena.take_private<Guess>(queries, rank, team_size);
    threshold = arena.take_private<float>(queries, rank, team_size);
    refines = arena.take_private<uint8_t>(queries, rank, team_size);
    keys = arena.take_private<float>(kBlockCells * key_width, rank, team_size);
    scores = arena.take_private<float>(group * kBlockCells, rank, team_size);
    rescale = arena.take_private<float>(group, rank, team_size);
    block_sums = arena.take_private<float>(group * kChunkBlocks, rank, team_size);
    scanning = arena.take_private<uint64_t>(group * kChunkBlocks, rank, team_size);
    n_cells = arena.take_private<int32_t>(2 * kv_heads, rank, team_size);
    cells = arena.take_private<int32_t>(2 * kv_heads * kChunkCells, rank, team_size);
    bytes = arena.used();
}

}  // namespace louver
