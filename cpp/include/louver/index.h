// The index as a library: keys of one or more KV heads, searched for every key with q.k >= tau. No key is ever missed,
// whatever the rounding: docs/guarantee.md. Threads may search at the same time; a change waits for them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "louver/oracle.h"
#include "louver/types.h"

namespace louver {

// The most KV heads of one index.
inline constexpr int kMaxHeads = 1024;

// grid: louver/grid_index.h, what the engine runs. ball: the paper's index, arXiv 2605.06763.
enum class IndexKind : uint8_t { grid, ball };

// How keys get into groups: a balanced tree that splits at the median of the widest channel, or Lloyd's k-means.
enum class Grouping : uint8_t { tree, kmeans };

// What encloses a group: a centre and a radius, or a range of each channel.
enum class Enclosure : uint8_t { ball, box };

struct BallOptions {
    int n_subspaces = 16;  // contiguous slices of the channels, at most dim of them
    int group_size = 4;    // keys of a group: exactly with tree (but for the last ones), on average with kmeans
    Grouping grouping = Grouping::tree;
    Enclosure enclosure = Enclosure::ball;
    int merge_at = 1024;  // so many live keys outside of all groups are grouped among themselves
    uint64_t seed = 0;    // of kmeans
};

struct IndexOptions {
    IndexKind kind = IndexKind::grid;
    BallOptions ball;
    int n_threads = 0;  // 0: as many as the machine has cores
};

// Keys as the caller stores them: element c of row i of head h lies at base + h * head_stride + i * row_stride + c *
// element_stride, all in bytes and of any sign. type: f32, f16 or bf16.
struct StridedKeys {
    const std::byte * base = nullptr;
    DType type = DType::f32;
    int n_head_kv = 1;
    int64_t n = 0;
    int dim = 0;
    int64_t head_stride = 0;
    int64_t row_stride = 0;
    int64_t element_stride = 0;
};

// How an index of kind ball finds its candidates: the sum of the subspaces' bounds of each key; the threshold algorithm over
// the groups in falling order of their bounds; or the groups that reach a threshold in every subspace.
enum class SearchMethod : uint8_t { sum, sweep, filter };

struct SearchOptions {
    SearchMethod method = SearchMethod::sum;
    // filter: [n_query][n_subspaces]. A match also has q_s . k_s >= subspace_tau[s] in every subspace s.
    std::span<const double> subspace_tau;
};

struct SearchStats {
    int64_t n_bounded = 0;  // (query, key) pairs bounded through the index
    int64_t n_scored = 0;   // pairs scored from the keys
    int64_t n_exact = 0;    // of these, decided by exact arithmetic: too close to tau for float64
};

// Of each query the matching keys, in order of position.
struct Matches {
    std::vector<int64_t> offsets;  // [n_query + 1]: query i has ids[offsets[i]..offsets[i + 1])
    std::vector<int64_t> ids;
    std::vector<double> scores;  // q.k, within dim * 2^-53 of the sum of its terms' magnitudes, and on its side of tau
    SearchStats stats;
};

// What is proven of a selection for one query.
struct SelectionCertificate {
    double tau = 0;         // every live key with q.k >= tau was selected
    int64_t n_keys = 0;     // live
    int64_t n_bounded = 0;  // bounded through the index
    int64_t n_scored = 0;   // scored from the keys
    int64_t n_selected = 0;
    int64_t bytes_read = 0;  // of the index and of the keys
    double delta = 0;        // the share of the softmax mass that was not selected is at most this
};

struct Selection {
    Matches matches;
    std::vector<SelectionCertificate> certificates;  // [n_query]
};

// Softmax attention over what was selected.
struct Attention {
    std::vector<float> output;        // [n_query][value_dim]
    std::vector<double> error_bound;  // [n_query] |output - dense output| is at most this
    std::vector<uint8_t> dense;  // [n_query] not 0: a NaN or an infinity was met, all live keys were attended in plain arithmetic
    std::vector<SelectionCertificate> certificates;  // [n_query]
};

struct MemoryUsage {
    size_t keys = 0;   // 0 while they are borrowed
    size_t index = 0;  // what is built over them
    size_t other = 0;
};

class Index {
  public:
    // No keys yet. Throws std::invalid_argument, as everything here, with what was given and what is accepted.
    Index(const IndexOptions & options, DType type, int n_head_kv, int dim);
    ~Index();
    Index(Index &&) noexcept;
    Index & operator=(Index &&) noexcept;

    // An index over the caller's own memory, which has to live, unchanged, as long as `owner`; it is copied at the first change.
    // element_stride must be the size of an element.
    static Index borrow(const IndexOptions & options, const StridedKeys & keys, std::shared_ptr<const void> owner);

    const IndexOptions & options() const;
    DType type() const;
    int n_head_kv() const;
    int dim() const;
    int64_t n_positions() const;  // live or removed
    int64_t n_live() const;
    bool is_live(int64_t position) const;
    bool is_borrowed() const;

    // New keys at the end; returns the first one's position. All of a call happens or, if it throws, nothing.
    int64_t append(const StridedKeys & keys);

    // Other keys at positions, each named once; a removed one is live again.
    void update(std::span<const int64_t> positions, const StridedKeys & keys);

    // The positions, live and each named once, are in no result from now on; other positions stay what they are.
    void remove(std::span<const int64_t> positions);

    // Builds all bounds anew.
    void rebuild();

    // The keys with q.k >= tau, exactly: decided as if in real arithmetic on the stored numbers. A key with a NaN or an infinity
    // is in every result. queries: [n_query][dim], finite; query i is of KV head i / (n_query / n_head_kv), n_query is a multiple
    // of n_head_kv. tau: [n_query], not NaN.
    Matches search(std::span<const float> queries, std::span<const double> tau, const SearchOptions & options = {}) const;

    // The keys that the oracle's threshold keeps. scale: what softmax multiplies q.k by, > 0.
    Selection select(std::span<const float> queries, const Oracle & oracle, double scale) const;

    // Attention over the live keys and their values: softmax of q.k * scale over what the oracle keeps, and, with compensate, the
    // rest as its approximate weight times the mean value of its block. values: n_head_kv heads of n_positions rows of any dim,
    // those of removed positions are not read. Reads all live values once. Throws where no key is live.
    Attention attend(std::span<const float> queries, const StridedKeys & values, const Oracle & oracle, double scale,
                     bool compensate) const;

    // Key `position` of each head as float32: [n_head_kv][dim].
    std::vector<float> key(int64_t position) const;

    MemoryUsage memory_usage() const;

    // docs/format.md. Written beside the file and moved over it. Throws IndexFileError.
    void save(const std::string & path) const;
    static Index load(const std::string & path, int n_threads = 0);

    struct State;

  private:
    std::vector<int64_t> sample(const Oracle & oracle) const;
    std::unique_ptr<State> state_;
};

}  // namespace louver
