// What Index needs of a kind of index: bounds on the scores of one KV head's keys.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "louver/index.h"
#include "louver/types.h"

namespace louver {

// The most queries that are bounded together.
inline constexpr int kMaxBatch = 8;

// Queries of one KV head.
struct QueryBatch {
    int n = 0;                      // kMaxBatch at most
    const float * query = nullptr;  // [n][padded(dim)]
    const float * norm = nullptr;   // [n] |q|, rounded up
};

// Upper bounds on weights 2^(q.k * to_log2 - reference).
struct WeightArgs {
    double to_log2;
    const float * reference;  // [n]
    float * weight;  // out [n][stride]: for each cell of the blocks; 0 for cells not asked for, infinity where it overflows
    int64_t stride;
    float * estimate;  // out [n][estimate_stride]: per block, about which share of the upper bounds the weights are
    int64_t estimate_stride;
    double * lower;  // in/out [n] += lower bound on the sum of the weights
};

// Some queries against a HeadIndex that does not change meanwhile. Threads may call it at the same time.
class HeadQuery {
  public:
    virtual ~HeadQuery() = default;

    // cells [n][count]: in, indexed cells of blocks first..first + count; out, those of them with a score that may reach tau[i].
    // count is at most kMaxRun.
    virtual void candidates(int first, int count, const double * tau, uint64_t * cells) const = 0;

    // cells as above, all of them wanted.
    virtual void weights(int first, int count, const uint64_t * cells, const WeightArgs & args) const = 0;

    // For the other methods than sum: of query i the cells of all blocks that may match. Returns how many rows were read.
    virtual int64_t preselect(SearchMethod method, int i, double tau, const double * subspace_tau,
                              std::span<uint64_t> cells) const = 0;
};

class HeadIndex {
  public:
    virtual ~HeadIndex() = default;

    // Bit i: cell i of the block is bounded. The others have to be scored.
    virtual uint64_t indexed(int block) const = 0;

    // Room for n keys.
    virtual void reserve(int64_t n) = 0;

    // There are keys.n now; those from `first` on are new. live: [n_blocks].
    virtual void append(const Rows & keys, int64_t first, int64_t n, const uint64_t * live) = 0;

    // The keys at these positions were rewritten.
    virtual void update(const Rows & keys, int64_t n, const uint64_t * live, std::span<const int64_t> positions) = 0;

    virtual void remove(std::span<const int64_t> positions) = 0;

    // All bounds anew.
    virtual void rebuild(const Rows & keys, int64_t n, const uint64_t * live) = 0;

    virtual std::unique_ptr<HeadQuery> query(const QueryBatch & batch) const = 0;

    // Bytes of bounds that a query reads of a block.
    virtual int64_t block_bytes() const = 0;
    virtual size_t bytes() const = 0;
};

std::unique_ptr<HeadIndex> make_grid_head(int dim, int n_threads);

}  // namespace louver
