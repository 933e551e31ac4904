// One layer's K and V in llama.cpp's cache, and what keeps an index over them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "louver/grid_index.h"
#include "louver/runtime.h"
#include "louver/types.h"

struct ggml_tensor;

namespace louver {

// A cache tensor: n_stream x kv_size rows, the heads of a row side by side.
struct CachePlane {
    std::byte * data = nullptr;
    size_t row_size = 0;   // bytes
    int64_t n_rows = 0;    // of all streams
    size_t head_size = 0;  // bytes
    int dim = 0;
    DType type = DType::f32;

    size_t size() const { return row_size * static_cast<size_t>(n_rows); }
    bool operator==(const CachePlane &) const = default;
};

struct Cache {
    Cache(Runtime * owner, int layer_id, const CachePlane & k, const CachePlane & v, int64_t cells_per_stream, int kv_heads);
    virtual ~Cache() = default;
    Cache(const Cache &) = delete;
    Cache & operator=(const Cache &) = delete;

    // Whether ops of ggml-cpu may write to it.
    virtual bool on_host() const = 0;
    // Rows [first, first + count), counted over all streams, were written.
    virtual void invalidate(int64_t first, int64_t count) = 0;
    // Folds what was counted since into the owner's totals. No step may be under way on the host.
    virtual void collect() = 0;
    virtual void describe(Stats & stats) const = 0;

    Runtime * owner;
    int layer;
    CachePlane k;
    CachePlane v;
    int64_t kv_size;
    int64_t n_stream;
    int n_head_kv;
};

// In host memory, with a GridIndex for each stream's KV head.
struct HostCache final : Cache {
    HostCache(Runtime * owner, int layer_id, const CachePlane & k, const CachePlane & v, int64_t cells_per_stream, int kv_heads);

    bool on_host() const override { return true; }
    void invalidate(int64_t first, int64_t count) override;
    void collect() override;
    void describe(Stats & stats) const override;

    const Rows * keys(int64_t stream) const { return key_rows.data() + stream * n_head_kv; }
    const Rows * values(int64_t stream) const { return value_rows.data() + stream * n_head_kv; }
    const GridIndex * const * index(int64_t stream) const { return index_views.data() + stream * n_head_kv; }
    GridIndex & index_of(int64_t stream, int head) { return *indexes[static_cast<size_t>(stream * n_head_kv + head)]; }

    // The settings of the next steps: with others, or with a check, every head is scanned.
    void expect(const DecodeSettings & settings);
    // [n_head_kv] not 0: the head attended to so much lately that it is not worth a scan (DecodeTask::attend_all).
    const uint8_t * uniform(int64_t stream) const { return steps_without_scan.data() + stream * n_head_kv; }

    // Brings the index of one stream's block up to date for the cells of `wanted`; blocks may be repaired at the same time.
    void repair(int64_t stream, int block, uint64_t wanted, int64_t & blocks_built, int64_t & cells_encoded);

    std::vector<std::unique_ptr<GridIndex>> indexes;  // [n_stream][n_head_kv], as the next three
    std::vector<const GridIndex *> index_views;
    std::vector<Rows> key_rows;
    std::vector<Rows> value_rows;
    double uniform_at = -1;                   // the epsilon that the next is for
    std::vector<uint8_t> steps_without_scan;  // [n_stream][n_head_kv] that are left to a uniform head

    // The last step, filled by the threads of the attention op and collected after it.
    struct Step {
        struct Query {
            int stream;
            int token;
            Path path;
            Reason reason;
        };
        bool pending = false;
        int n_head = 0;
        std::vector<Query> queries;
        std::vector<HeadCertificate> certificates;  // [queries][n_head]
        std::vector<CheckCounts> checked;           // [threads], as the next two
        std::vector<int64_t> blocks_built;
        std::vector<int64_t> cells_encoded;
        std::vector<int64_t> attended;  // [n_stream][n_head_kv] by all tokens, as the next; for the cost model
        std::vector<int64_t> visible;
    };
    Step step;
};

}  // namespace louver
