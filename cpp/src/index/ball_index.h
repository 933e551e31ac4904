// The paper's index (arXiv 2605.06763) over the keys of one KV head: in each subspace, a slice of the channels, every key belongs
// to a group, and each group is enclosed in a ball or a box. A key's score is at most the sum of its groups' bounds.
#pragma once

#include <cstdint>
#include <vector>

#include "louver/index.h"
#include "louver/types.h"

namespace louver {

class BallIndex {
  public:
    static constexpr uint32_t kNoGroup = ~uint32_t{0};

    BallIndex(int dim, const BallOptions & options);

    // Bit i: the key of cell i of the block is in a group of every subspace. 0 for blocks it never saw.
    uint64_t indexed(int block) const;

    // Groups keys 0..n that are live, all anew; live: [n_blocks_for(n)]. Keys with a NaN or an infinity stay out of groups.
    void rebuild(const Rows & keys, int64_t n, const uint64_t * live);

    // Groups the live keys that are in no group, among themselves; the other groups stay, unless most of them are empty by now.
    void merge(const Rows & keys, int64_t n, const uint64_t * live);

    // The key was rewritten or removed: it is in no group until the next merge or rebuild. Its groups only enclose too much.
    void invalidate(int64_t position);

    // [n_subspaces][n] the group of each key, below n, or kNoGroup; what a file keeps. restore() encloses given groups anew, and
    // throws std::invalid_argument where they cannot be.
    std::vector<uint32_t> groups(int64_t n) const;
    void restore(const Rows & keys, int64_t n, const std::vector<uint32_t> & groups);

    int n_subspaces() const { return static_cast<int>(subspaces_.size()); }
    size_t bytes() const;

  private:
    friend class BallQuery;

    struct Subspace {
        int begin;  // channels
        int width;
        int64_t n_groups = 0;
        std::vector<float> first;    // [n_groups][width] centres, or the least of each channel
        std::vector<float> second;   // box: [n_groups][width] the largest
        std::vector<double> radius;  // ball: [n_groups] no member is farther from the centre
    };

    bool is_ball() const { return options_.enclosure == Enclosure::ball; }
    uint32_t & group_of(int64_t position, size_t subspace) {
        return group_of_[static_cast<size_t>(position) * subspaces_.size() + subspace];
    }
    void add(const Rows & keys, const std::vector<int32_t> & positions);
    void enclose(Subspace & subspace, const std::vector<float> & points, const std::vector<uint32_t> & group);
    void mark(const std::vector<int32_t> & positions);
    void clear();

    BallOptions options_;
    std::vector<Subspace> subspaces_;
    std::vector<uint32_t> group_of_;  // [n][n_subspaces]
    std::vector<uint64_t> indexed_;   // [n_blocks]
    int64_t n_members_ = 0;           // of the groups now,
    int64_t n_added_ = 0;             // and since they were last built anew
};

// One query against a BallIndex that does not change meanwhile. docs/guarantee.md, "The ball index".
class BallQuery {
  public:
    // query: [padded(dim)] float32.
    BallQuery(const BallIndex & index, const float * query);

    // For the cells of blocks first..first + count: q.k is in [lower, upper]; (-infinity, infinity) for those not indexed.
    void bounds(int first, int count, double * lower, double * upper) const;

    // cells: out, a bit for each cell of [n_blocks]. Every indexed key with q.k >= tau is among them. The threshold algorithm:
    // the groups of each subspace in falling order of their bounds, row by row, until the row's bounds add up to less than tau.
    // Returns the rows read.
    int64_t sweep(double tau, int n_blocks, uint64_t * cells) const;

    // The same for keys with q_s . k_s >= tau[s] in every subspace s.
    void filter(const double * tau, int n_blocks, uint64_t * cells) const;

  private:
    struct Bounds {
        std::vector<double> lower;  // [n_groups]
        std::vector<double> upper;
    };

    Bounds bound(const BallIndex::Subspace & subspace, const float * query) const;
    // Calls f(cell, groups) for the indexed cells of a block; groups: [n_subspaces].
    template <class F> void for_cells(int block, F && f) const;

    const BallIndex & index_;
    std::vector<Bounds> bounds_;  // [n_subspaces]
};

}  // namespace louver
