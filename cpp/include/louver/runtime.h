// Louver inside llama.cpp: attaching to ggml-cpu, settings and counts of one llama.cpp context. No ggml types here.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "louver/capture.h"
#include "louver/decode.h"
#include "louver/export.h"

namespace louver {

// The llama.cpp this library was built for, and the one that is loaded.
struct Libraries {
    std::string pin_package_version;  // of llama-cpp-python, whose source package carries the pin
    std::string pin_ggml_version;
    std::string pin_commit;
    std::string ggml_version;
    std::string commit;
    std::string ggml_cpu_path;
    std::string louver_path;
};
LOUVER_API Libraries libraries();

class LibraryMismatch : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// A GPU that llama.cpp can use.
struct DeviceInfo {
    int id = 0;
    std::string name;
    std::string capability;  // "9.0"
    std::string refusal;     // why there are no kernels for it; empty: there are
};
// Whether this library was built with CUDA kernels (LOUVER_CUDA), and the devices they could run on.
LOUVER_API bool has_cuda();
LOUVER_API std::vector<DeviceInfo> devices();

// Registers our attention with ggml-cpu, and with ggml-cuda where it is built in, in the place of any other extension. Once is
// enough. Throws LibraryMismatch if the libraries found at run time are not the pin's, std::invalid_argument for a bad
// LOUVER_ISA. Not to be called while a graph is being computed.
LOUVER_API void attach();

struct RuntimeConfig {
    DecodeSettings decode;
    int64_t min_context = 1024;       // with fewer visible cells, our own dense attention runs
    int64_t min_context_gpu = 32768;  // with fewer cells in use, stock runs on a GPU
    bool enabled = true;
    int64_t n_ctx = 0;  // cells per stream of the context's full cache; smaller caches are sliding windows. 0: unknown
};

enum class Path { louver, dense, stock };

// Why a path other than Louver's ran.
enum class Reason {
    none,
    prefill,
    disabled,
    below_min_context,
    sliding_window,
    alibi,
    soft_cap,
    sinks,
    mla,
    n_kv_max,
    mask_values,
    cache_type,
    layout,
    work_buffer,
    not_finite,
    epsilon_zero,
    head_dim,       // no CUDA kernels for it
    device,         // its compute capability is below 8.0, or it has not the shared memory for an op of this size
    device_memory,  // the index does not fit
    host_cache,     // the cache is in host memory, and ggml copies what the GPU attends to
    count,
};
LOUVER_API const char * reason_name(Reason reason);

// Certificates of one query token in one layer.
struct LayerCertificates {
    int layer = 0;
    int stream = 0;
    int token = 0;
    Path path = Path::louver;
    std::vector<HeadCertificate> heads;
};

struct Stats {
    std::array<int64_t, 3> attention{};  // by Path: attention computed, one per (layer, query token)
    std::array<std::array<int64_t, static_cast<size_t>(Reason::count)>, 3> reasons{};  // by Path
    int64_t n_queries = 0;      // (layer, token, query head) on the louver and dense paths; the next are sums over those
    int64_t heads_uniform = 0;  // of the louver path: attended to all keys without a scan, because that is cheaper
    int64_t heads_in_full = 0;  // of the louver path on a GPU: attended in full, because a number was not finite or too large
    int64_t keys_visible = 0;
    int64_t keys_scanned = 0;
    int64_t keys_attended = 0;
    int64_t bytes_read = 0;   // of K, V and index
    int64_t bytes_dense = 0;  // that dense attention would have read
    double delta_sum = 0;
    double delta_max = 0;
    double error_bound_max = 0;
    CheckCounts checked;
    int64_t blocks_built = 0;   // one KV head's block each
    int64_t cells_encoded = 0;  // one KV head's cell each, as the next two
    int64_t index_cells = 0;
    int64_t index_bytes = 0;
    int64_t cache_bytes = 0;  // of K and V of the indexed cells
    std::vector<LayerCertificates> last_step;
};

struct Cache;

// One llama.cpp context's. Between enter() and exit() the caches that this thread's graphs show for the first time become this
// runtime's; llama_decode belongs between them. A runtime must outlive its context.
class LOUVER_API Runtime {
  public:
    explicit Runtime(const RuntimeConfig & config);
    ~Runtime();
    Runtime(const Runtime &) = delete;
    Runtime & operator=(const Runtime &) = delete;

    RuntimeConfig config() const;
    void configure(const RuntimeConfig & config);  // not during a decode of its context

    void enter();
    void exit();
    static Runtime * current();

    Stats stats();
    void reset_stats();

    // For the negative control of the check: while stale, writes to the cache do not reach the index.
    void set_stale(bool stale);
    bool stale() const { return stale_; }

    Capture & capture() { return capture_; }

    // For the adapter.
    void count(Path path, Reason reason, int64_t n);
    void add(const Stats & part);

  private:
    mutable std::mutex mutex_;
    RuntimeConfig config_;
    Stats stats_;
    bool stale_ = false;
    Capture capture_;
};

}  // namespace louver
