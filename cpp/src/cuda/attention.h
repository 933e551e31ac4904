// One cache's index on a device, and attention over it. No CUDA types: the adapter to ggml is plain C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/problem.h"
#include "louver/decode.h"

namespace louver::cuda {

// A device that the kernels run on.
struct Device {
    int id = 0;
    std::string name;
    int major = 0;  // compute capability
    int minor = 0;
    int n_processors = 0;
    bool supported() const { return major >= 8; }  // integer matrix products of 8 bits by 32 channels
};
// Empty where there is no driver or no device.
std::vector<Device> devices();

// The planes of a cache, zero at first: nothing is indexed. Throws Error if the memory cannot be had.
class CacheIndex {
  public:
    // keys and values describe rows [n_stream][kv_size]; types and dims as in serves(). widest: for values of that dimension
    // later.
    CacheIndex(int device, const Plane & keys, const Plane & values, int n_stream, int n_head_kv, int64_t kv_size, int n_gqa,
               int widest = 0);
    ~CacheIndex();
    CacheIndex(const CacheIndex &) = delete;
    CacheIndex & operator=(const CacheIndex &) = delete;

    int device() const { return device_; }
    int n_stream() const { return n_stream_; }
    int n_head_kv() const { return planes_.n_head_kv; }
    int64_t kv_size() const { return kv_size_; }
    const Plane & keys() const { return keys_; }
    const Plane & values() const { return values_; }
    const Planes & planes() const { return planes_; }
    size_t bytes() const;           // of all planes
    size_t bytes_per_cell() const;  // of one KV head

    // Encodes cells [0, n_cells) of a stream that are not indexed. Asynchronous on the stream.
    void build(int stream_of_cache, int64_t n_cells, void * stream);
    // Rows [first, first + count) of all streams were or will be rewritten by the host, which waits.
    void invalidate(int64_t first, int64_t count);
    // What write_rows() wants of a cache.
    struct Target {
        const CacheIndex * index;
        int64_t first_row;
    };

    // All of these wait for the device.
    Totals totals() const;
    void reset_totals();
    std::vector<HeadCertificate> certificates(int64_t n) const;
    int64_t indexed_cells() const;  // of all KV heads

  private:
    friend class Workspace;
    friend void write_rows(const std::vector<Target> & targets, const void * rows, bool wide, int n_rows, void * stream);

    struct Storage;
    int device_;
    Plane keys_;
    Plane values_;
    int n_stream_;
    int64_t kv_size_;
    Planes planes_;
    std::unique_ptr<Storage> storage_;
};

// Rows [first, first + count) of all streams are about to be written by what is launched on the stream.
void write_range(const CacheIndex & index, int64_t first, int64_t count, void * stream);

// Rows [n_rows] of int64 (wide) or int32 in device memory are about to be written in each of the caches.
void write_rows(const std::vector<CacheIndex::Target> & targets, const void * rows, bool wide, int n_rows, void * stream);

// One op. Strides in bytes; query and output are float32.
struct AttentionOp {
    int n_token = 1;
    int n_stream = 1;
    int first_stream = 0;
    int n_head = 0;
    int n_kv = 0;
    float scale = 1;
    const std::byte * query = nullptr;
    int64_t query_token_stride = 0;
    int64_t query_head_stride = 0;
    int64_t query_stream_stride = 0;
    std::byte * output = nullptr;
    int64_t output_token_stride = 0;
    int64_t output_head_stride = 0;
    int64_t output_stream_stride = 0;
    Mask mask;
    DecodeSettings settings;
};

// Most (stream, token) pairs of one op.
inline constexpr int kMaxRows = 64;

// Whether there are kernels for such a cache: null, or what is in the way.
const char * unsupported(const Plane & keys, const Plane & values);

// The scratch memory of one stream of a device. Its addresses stay while it does not grow, so that captured graphs stay valid.
class Workspace {
  public:
    explicit Workspace(int device);
    ~Workspace();

    // How often its memory moved.
    int64_t generation() const { return generation_; }

    // Makes room. After it, ops on such a cache move nothing. Throws Error if the memory cannot be had.
    void reserve(const CacheIndex & index, int n_head, int n_row);

    // The mask of the next ops; to be called again when its content has changed.
    void see(const CacheIndex & index, const AttentionOp & op, void * stream);

    // Attention by the mask last seen. Everything is asynchronous on the stream, and nothing of the host is needed after.
    void attend(const CacheIndex & index, const AttentionOp & op, void * stream);
    // Encodes what is complete by the mask last seen.
    void repair(const CacheIndex & index, const AttentionOp & op, void * stream);

    // The scan alone, to be timed; of a float16 cache.
    void scan(const CacheIndex & index, const AttentionOp & op, void * stream);

    // Whether the device has the shared memory that the op's kernels want. Room has been made for the op.
    bool fits(const CacheIndex & index, const AttentionOp & op);

    // Bytes of a thread block's shared memory that an op wants at least; with more, less goes through global memory.
    size_t least_shared(const CacheIndex & index, const AttentionOp & op);

    // For tests: as on a device where a thread block has no more shared memory than this.
    void limit_shared(size_t bytes) { most_shared_ = std::min(most_shared_, bytes); }

    // For tests: fills what no op may rely on with 0xff. see() comes next.
    void poison();

    // The survivors of the last op as bits, for tests: [n_group][n_blocks].
    std::vector<uint64_t> kept(const CacheIndex & index, const AttentionOp & op) const;

  private:
    Problem problem(const CacheIndex & index, const AttentionOp & op);

    struct Storage;
    int device_;
    int n_processors_;
    size_t most_shared_;
    int64_t generation_ = 0;
    std::unique_ptr<Storage> storage_;
};

}  // namespace louver::cuda
