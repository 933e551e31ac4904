// The index as a library over keys in a device's memory: search and attention for queries that come and go, where the engine has
// a cache that grows (cuda/attention.h). The scan and the kernels of attention are the engine's.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "cuda/attention.h"
#include "cuda/device.h"
#include "louver/index.h"

namespace louver::cuda {

// What a search found: compressed rows as in louver::Matches, ids and scores in the device's memory.
struct DeviceMatches {
    std::vector<int64_t> offsets;  // [n_query + 1]
    Memory ids;                    // int64 [offsets.back()], rising within a query
    Memory scores;                 // float64 [offsets.back()]
    SearchStats stats;
};

struct DeviceAttention {
    Memory output;                              // float32 [n_query][value_dim], in the device's memory
    std::vector<HeadCertificate> certificates;  // [n_query]
    std::vector<uint8_t> dense;                 // [n_query] not 0: all was attended because of a number that is not finite
};

// The elements in device memory, [n_head_kv][n][dim] without gaps. From and to the device's memory.
Memory packed(int device, const StridedKeys & from);

// Its device works on the legacy default stream, and what a call returns has been waited for. May be used from several threads;
// their calls take turns. Throws std::invalid_argument for what is not accepted, Error for what the device refuses.
class DeviceIndex {
  public:
    // keys: in the memory of the device, rows as unsupported() wants them. They stay as they are while the index lives, and
    // whatever the owner holds stays with them.
    DeviceIndex(int device, const StridedKeys & keys, std::shared_ptr<const void> owner);
    ~DeviceIndex();

    int device() const { return device_; }
    const StridedKeys & keys() const { return keys_; }
    size_t index_bytes() const { return cache_->bytes(); }
    size_t other_bytes() const;
    // Read by a scan, of one key of one head.
    size_t index_bytes_per_key() const { return cache_->bytes_per_cell(); }

    // As louver::Index::search: every key with q.k >= tau, decided in exact arithmetic, every key that is not finite, and no
    // other. queries: [n_query][dim], finite, dealt to the KV heads in order; tau: [n_query]. Both in host memory.
    DeviceMatches search(std::span<const float> queries, std::span<const double> tau);

    // Attention by the mass oracle. queries as above. values: in the memory of the device, a row to each key, of the keys' type,
    // laid out as unsupported() wants them.
    DeviceAttention attend(std::span<const float> queries, const StridedKeys & values, double epsilon, double scale,
                           bool compensate);

    // For tests: fills what no call may rely on with 0xff.
    void poison();

  private:
    struct Op;
    Op lay_out(int n_gqa, const Plane & values);
    int64_t require_queries(std::span<const float> queries) const;
    // The queries [first, first + n_gqa) of every KV head, [n_head_kv][n_gqa][dim].
    std::vector<float> batch_of(std::span<const float> queries, int64_t first, int n_gqa) const;
    int most_gqa() const;
    // The planes, with kernels for values of the widest dimension.
    void build(int widest);
    int n_blocks() const { return n_blocks_for(keys_.n); }

    const int device_;
    const StridedKeys keys_;
    const std::shared_ptr<const void> owner_;
    std::unique_ptr<CacheIndex> cache_;
    int n_processors_ = 0;
    size_t most_shared_ = 0;
    double key_norm_ = 0;       // the longest of the keys that are indexed
    Memory everywhere_;         // [n_blocks] the positions that are indexed in every head, as bits
    int64_t n_everywhere_ = 0;  // their number
    Memory scratch_;
    mutable std::mutex mutex_;
};

// The kernels that the engine has no use for (cuda/search.cu).

// A search over what a scan has found.
struct SearchOp {
    const double * tau;             // [n_group][n_shared]
    uint64_t * hits;                // [n_head][n_blocks] the matching cells as bits
    int64_t * counts;               // [n_head * n_blocks + 1] how many they are; the last one is 0
    int64_t * places;               // [n_head * n_blocks + 1] and how many there are before
    unsigned long long * n_scored;  // added to
    unsigned long long * n_exact;   // added to
};

// Scores every cell that the scan did not exclude, and decides.
void launch_decide(const Problem & p, const SearchOp & op, cudaStream_t stream);
// Places from counts. Grows the scratch memory that it needs.
void launch_count(const SearchOp & op, int64_t n, Memory & scratch, cudaStream_t stream);
// The ids and scores of the hits.
void launch_write(const Problem & p, const SearchOp & op, int64_t * ids, double * scores, cudaStream_t stream);

// The values of each block: their mean into p.planes.means, and of_keys with the longest one into p.planes.bounds. Heads with a
// value that is not finite are attended in full.
void launch_summarize(const Problem & p, const BlockBounds * of_keys, cudaStream_t stream);

void launch_pack(const StridedKeys & from, std::byte * to, cudaStream_t stream);

}  // namespace louver::cuda
