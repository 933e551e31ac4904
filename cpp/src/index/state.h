// What an Index is made of, for the files that implement it.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <utility>
#include <vector>

#include "index/head_index.h"
#include "index/key_store.h"
#include "index/scorer.h"
#include "louver/index.h"
#include "oracle/reservoir.h"

namespace louver {

struct Index::State {
    State(const IndexOptions & options, DType type, int n_head_kv, int dim);

    int n_blocks() const { return n_blocks_for(store.size()); }
    int n_threads() const;

    IndexOptions options;
    KeyStore store;
    std::vector<std::unique_ptr<HeadIndex>> heads;  // [n_head_kv]
    std::vector<uint64_t> live;                     // [n_blocks]
    int64_t n_live = 0;

    // Samples for the oracles, by size and seed, made when they are first asked for.
    std::map<std::pair<int, uint64_t>, Reservoir> reservoirs;

    mutable std::shared_mutex mutex;
};

// The queries of one call, as the kernels want them, and the batches that they are bounded in.
class QuerySet {
  public:
    // Throws std::invalid_argument where queries do not fit the index or are not finite.
    QuerySet(const Index::State & state, std::span<const float> queries);

    int n() const { return n_; }
    int head_of(int i) const { return i / per_head_; }
    const float * f32(int i) const { return f32_.data() + static_cast<size_t>(i) * width_; }
    const double * f64(int i) const { return f64_.data() + static_cast<size_t>(i) * width_; }

    struct Batch {
        int first;  // query
        int n;
        int head;
        std::unique_ptr<HeadQuery> query;
    };
    const std::vector<Batch> & batches() const { return batches_; }

  private:
    size_t width_;
    int n_;
    int per_head_;
    std::vector<float> f32_;   // [n][width]
    std::vector<double> f64_;  // [n][width]
    std::vector<float> norm_;  // [n]
    std::vector<Batch> batches_;
};

// A selection, and what compensation needs of the rest. A key's weight is 2^(score * to_log2 - reference).
struct Selected {
    std::vector<Scored> keys;                        // [n_query]
    std::vector<SelectionCertificate> certificates;  // [n_query]
    double to_log2;
    std::vector<float> reference;  // [n_query]
    std::vector<double> dropped;   // [n_query] upper bound on the weights that were not selected
    std::vector<double> kept;      // [n_query] lower bound on those that were
    std::vector<float> estimate;   // [n_query][n_blocks] about what was not selected weighs
};

// The caller holds the lock.
Matches search_keys(const Index::State & state, const QuerySet & queries, std::span<const double> tau,
                    const SearchOptions & options);
// The matches of each query, with what their scores may be off.
std::vector<Scored> score_matches(const Index::State & state, const QuerySet & queries, std::span<const double> tau);
// sample: positions for an oracle that wants some.
Selected select_keys(const Index::State & state, const QuerySet & queries, const Oracle & oracle, std::span<const int64_t> sample,
                     double scale);

Attention attend_keys(const Index::State & state, const QuerySet & queries, const StridedKeys & values, const Oracle & oracle,
                      std::span<const int64_t> sample, double scale, bool compensate);

}  // namespace louver
