#include "attention/scratch.h"

namespace louver {
namespace {

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

Scratch::Scratch(std::byte * base, int n_head, int n_head_kv, int64_t n_kv, int key_dim, int value_dim, int rank, int team_size) {
    const size_t heads = static_cast<size_t>(n_head);
    const size_t kv_heads = static_cast<size_t>(n_head_kv);
    const size_t gqa = static_cast<size_t>(n_head / n_head_kv);
    const size_t team = static_cast<size_t>(team_size);
    const size_t key_width = static_cast<size_t>(padded(key_dim));
    const size_t value_width = static_cast<size_t>(padded(value_dim));
    n_blocks = n_blocks_for(n_kv);
    weight_stride = static_cast<int64_t>(n_blocks) * kBlockCells + 16;

    Arena arena(base);
    not_finite = arena.take<int32_t>(team);
    query = arena.take<float>(heads * key_width);
    query_norm = arena.take<float>(heads);
    reference = arena.take<float>(heads);
    weight = arena.take<float>(heads * static_cast<size_t>(weight_stride));
    slack = arena.take<float>(heads * static_cast<size_t>(n_blocks));
    lower = arena.take<double>(team * heads);
    coarse = arena.take<Sums>(team * heads);
    fine = arena.take<Sums>(team * heads);
    partial = arena.take<Partial>(team * heads);
    output = arena.take<float>(team * heads * value_width);

    bracket = arena.take_private<MassOracle::Bracket>(heads, rank, team_size);
    total = arena.take_private<double>(heads, rank, team_size);
    threshold = arena.take_private<float>(heads, rank, team_size);
    keys = arena.take_private<float>(kBlockCells * key_width, rank, team_size);
    values = arena.take_private<float>(kBlockCells * value_width, rank, team_size);
    scores = arena.take_private<float>(gqa * kBlockCells, rank, team_size);
    rescale = arena.take_private<float>(gqa, rank, team_size);
    block_sums = arena.take_private<float>(gqa * kChunkBlocks, rank, team_size);
    kept = arena.take_private<uint64_t>(kv_heads * kChunkBlocks, rank, team_size);
    n_cells = arena.take_private<int32_t>(kv_heads, rank, team_size);
    cells = arena.take_private<int32_t>(kv_heads * kChunkCells, rank, team_size);
    bytes = arena.used();
}

}  // namespace louver
