#pragma once

#include <vector>

#include "index/ball_index.h"
#include "index/head_index.h"

namespace louver {

class BallHead final : public HeadIndex {
  public:
    BallHead(int dim, const BallOptions & options);

    uint64_t indexed(int block) const override { return index_.indexed(block); }
    void reserve(int64_t) override {}
    void append(const Rows & keys, int64_t first, int64_t n, const uint64_t * live) override;
    void update(const Rows & keys, int64_t n, const uint64_t * live, std::span<const int64_t> positions) override;
    void remove(std::span<const int64_t> positions) override;
    void rebuild(const Rows & keys, int64_t n, const uint64_t * live) override;
    std::unique_ptr<HeadQuery> query(const QueryBatch & batch) const override;
    // A group number in every subspace.
    int64_t block_bytes() const override { return int64_t{kBlockCells} * index_.n_subspaces() * 4; }
    size_t bytes() const override { return index_.bytes(); }

    // What a file keeps.
    std::vector<uint32_t> groups(int64_t n) const { return index_.groups(n); }
    void restore(const Rows & keys, int64_t n, const std::vector<uint32_t> & groups);

  private:
    void merge(const Rows & keys, int64_t n, const uint64_t * live, bool at_once);

    int dim_;
    BallOptions options_;
    BallIndex index_;
    int64_t n_waiting_ = 0;  // keys outside of the groups since the last merge
};

}  // namespace louver
