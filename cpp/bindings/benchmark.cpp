// Attention alone, timed by phases, on keys and values laid out as llama.cpp lays them out: for tools/attention_bench.py.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <numeric>

#include "arrays.h"
#include "attention/lap.h"
#include "bindings.h"
#include "louver/decode.h"
#include "louver/grid_index.h"
#include "memory.h"
#include "team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace louver {
namespace {

using Clock = std::chrono::steady_clock;

int64_t nanoseconds(Clock::duration duration) { return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count(); }

void require_threads(int n_threads) {
    require(n_threads >= 1 && n_threads <= 512, "n_threads is " + std::to_string(n_threads) + ", accepted are 1 to 512");
}

// K or V of a layer: a row per cell, in it all heads side by side.
class Plane {
  public:
    Plane(const In<uint8_t, 2> & rows, const std::string & dtype, int dim, int n_head)
        : row_bytes_(rows.shape(1)), head_bytes_(row_bytes(dtype_named(dtype), dim)), dim_(dim), type_(dtype_named(dtype)) {
        require(dim >= 1 && dim <= 1024, "the head dimension is " + std::to_string(dim) + ", accepted are 1 to 1024");
        require((type_ != DType::q8_0 && type_ != DType::q4_0) || dim % 32 == 0,
                dtype + " needs a head dimension that is a multiple of 32");
        require(row_bytes_ == head_bytes_ * static_cast<size_t>(n_head), "rows do not hold n_head_kv heads");
        data_ = allocate(rows.size());
        std::memcpy(data_.get(), rows.data(), rows.size());
    }

    Rows rows(int head) const {
        return {data_.get() + head_bytes_ * static_cast<size_t>(head), static_cast<int64_t>(row_bytes_), dim_, type_};
    }
    int dim() const { return dim_; }
    int64_t head_bytes() const { return static_cast<int64_t>(head_bytes_); }

  private:
    size_t row_bytes_;
    size_t head_bytes_;
    int dim_;
    DType type_;
    Memory data_;
};

struct Layer {
    Plane k;
    Plane v;
    int n_head;
    int n_head_kv;
    int64_t n_kv;
    float scale;
    std::vector<uint64_t> visible = {};
    std::vector<Rows> keys = {};
    std::vector<Rows> values = {};
    std::vector<std::unique_ptr<GridIndex>> index = {};
    std::vector<const GridIndex *> index_views = {};

    bool is_complete(int block) const { return visible[static_cast<size_t>(block)] == ~uint64_t{0}; }
    int64_t n_visible() const {
        return std::accumulate(visible.begin(), visible.end(), int64_t{0},
                               [](int64_t n, uint64_t word) { return n + std::popcount(word); });
    }
    std::unique_ptr<GridIndex> empty_index() const { return std::make_unique<GridIndex>(k.dim(), v.dim(), n_kv); }
    // Of K and V, for one cell and KV head.
    int64_t cell_bytes() const { return k.head_bytes() + v.head_bytes(); }
    // What a scan reads of the index, for one block and KV head.
    int64_t scan_bytes() const {
        const GridIndex & one = *index.front();
        const auto grid = 2 * static_cast<int64_t>(sizeof(uint16_t)) * (one.center(1) - one.center(0));  // centres and steps
        return one.codes(1) - one.codes(0) + grid + static_cast<int64_t>(sizeof(BlockBounds));
    }
};

// Layers that take turns, as in a decode step of a model, so that each finds the processor's caches as the others left them.
class AttentionBench {
  public:
    void add_layer(const In<uint8_t, 2> & k, const In<uint8_t, 2> & v, const In<bool, 1> & visible, const std::string & type_k,
                   const std::string & type_v, int key_dim, int value_dim, int n_head, int n_head_kv, float scale) {
        require(n_head_kv >= 1 && n_head >= n_head_kv && n_head % n_head_kv == 0, "n_head is no multiple of n_head_kv");
        require(k.shape(0) >= 1 && k.shape(0) == v.shape(0) && k.shape(0) == visible.shape(0),
                "k, v and visible are not of the same cells");
        require(scale > 0, "scale is not positive");
        Layer layer{Plane(k, type_k, key_dim, n_head_kv),
                    Plane(v, type_v, value_dim, n_head_kv),
                    n_head,
                    n_head_kv,
                    static_cast<int64_t>(k.shape(0)),
                    scale};
        layer.visible.resize(static_cast<size_t>(n_blocks_for(layer.n_kv)));
        for (size_t i = 0; i < visible.shape(0); ++i) {
            layer.visible[i / kBlockCells] |= static_cast<uint64_t>(visible.data()[i]) << (i % kBlockCells);
        }
        for (int g = 0; g < n_head_kv; ++g) {
            layer.keys.push_back(layer.k.rows(g));
            layer.values.push_back(layer.v.rows(g));
            layer.index.push_back(layer.empty_index());
            layer.index_views.push_back(layer.index.back().get());
        }
        const nb::gil_scoped_release released;
        build(layer, layer.index);
        layers_.push_back(std::move(layer));
    }

    nb::dict step(const std::vector<In<float, 2>> & queries, const DecodeSettings & settings, int n_threads) {
        require_threads(n_threads);
        require(queries.size() == layers_.size(), "there is not one array of queries for each layer");
        std::vector<std::vector<float>> outputs;
        std::vector<std::vector<HeadCertificate>> certificates;
        std::vector<DecodeTask> tasks;
        size_t scratch_bytes = 0;
        for (size_t i = 0; i < layers_.size(); ++i) {
            const Layer & layer = layers_[i];
            require(queries[i].shape(0) == static_cast<size_t>(layer.n_head) &&
                        queries[i].shape(1) == static_cast<size_t>(layer.k.dim()),
                    "queries do not fit layer " + std::to_string(i));
            outputs.emplace_back(static_cast<size_t>(layer.n_head) * static_cast<size_t>(layer.v.dim()));
            certificates.emplace_back(static_cast<size_t>(layer.n_head));
            tasks.push_back(task_of(layer, queries[i].data(), outputs.back().data(), certificates.back().data(), settings));
            scratch_bytes = std::max(scratch_bytes, decode_scratch_bytes(1, layer.n_head, layer.n_head_kv, layer.n_kv,
                                                                         layer.k.dim(), layer.v.dim(), n_threads));
        }
        reserve_scratch(scratch_bytes);
        std::vector<PhaseTimes> times(static_cast<size_t>(n_threads));
        int64_t step_ns = 0;
        std::atomic<bool> finite{true};
        {
            const nb::gil_scoped_release released;
            run_team(n_threads, [&](const Team & team) {
                team.barrier();
                const Clock::time_point start = Clock::now();
                for (DecodeTask task : tasks) {
                    task.times = times.data();
                    if (decode(task, team, scratch_.get()) != Outcome::done) {
                        finite = false;
                    }
                    Lap lap(&times[static_cast<size_t>(team.rank)]);
                    team.barrier();
                    lap.mark(&PhaseTimes::wait);
                }
                if (team.rank == 0) {
                    step_ns = nanoseconds(Clock::now() - start);
                }
            });
        }
        require(finite, "queries, keys or values are not finite, or too large");
        return describe(step_ns, times, certificates, outputs);
    }

    // Nanoseconds of indexing each complete block of each KV head of a layer, into a fresh index.
    Out<int64_t, 1> append_ns(size_t layer) const {
        require(layer < layers_.size(), "there is no layer " + std::to_string(layer));
        std::vector<std::unique_ptr<GridIndex>> fresh;
        for (int g = 0; g < layers_[layer].n_head_kv; ++g) {
            fresh.push_back(layers_[layer].empty_index());
        }
        std::vector<int64_t> ns = build(layers_[layer], fresh);
        const size_t n = ns.size();
        return to_numpy(std::move(ns), n);
    }

  private:
    static std::vector<int64_t> build(const Layer & layer, std::vector<std::unique_ptr<GridIndex>> & index) {
        std::vector<int64_t> ns;
        for (int b = 0; b < static_cast<int>(layer.visible.size()); ++b) {
            for (size_t g = 0; layer.is_complete(b) && g < index.size(); ++g) {
                const Clock::time_point start = Clock::now();
                index[g]->repair(b, ~uint64_t{0}, layer.keys[g], layer.values[g]);
                ns.push_back(nanoseconds(Clock::now() - start));
            }
        }
        return ns;
    }

    static DecodeTask task_of(const Layer & layer, const float * query, float * output, HeadCertificate * certificates,
                              const DecodeSettings & settings) {
        DecodeTask task;
        task.n_head = layer.n_head;
        task.n_head_kv = layer.n_head_kv;
        task.n_kv = layer.n_kv;
        task.scale = layer.scale;
        task.query = reinterpret_cast<const std::byte *>(query);
        task.query_stride = static_cast<int64_t>(sizeof(float)) * layer.k.dim();
        task.keys = layer.keys.data();
        task.values = layer.values.data();
        task.index = layer.index_views.data();
        task.visible = layer.visible.data();
        task.output = reinterpret_cast<std::byte *>(output);
        task.output_stride = static_cast<int64_t>(sizeof(float)) * layer.v.dim();
        task.certificates = certificates;
        task.settings = settings;
        return task;
    }

    // Touched before the clock runs.
    void reserve_scratch(size_t bytes) {
        if (bytes > scratch_bytes_) {
            scratch_ = allocate(bytes);
            scratch_bytes_ = bytes;
            std::memset(scratch_.get(), 0, bytes);
        }
    }

    nb::dict describe(int64_t step_ns, const std::vector<PhaseTimes> & times,
                      const std::vector<std::vector<HeadCertificate>> & certificates,
                      std::vector<std::vector<float>> & outputs) const {
        int64_t scan_bytes = 0;
        int64_t attend_bytes = 0;
        int64_t dense_bytes = 0;
        int64_t visible = 0;
        int64_t attended = 0;
        std::vector<float> delta;
        nb::list output;
        for (size_t i = 0; i < layers_.size(); ++i) {
            const Layer & layer = layers_[i];
            const int n_gqa = layer.n_head / layer.n_head_kv;
            for (int h = 0; h < layer.n_head; ++h) {
                const HeadCertificate & c = certificates[i][static_cast<size_t>(h)];
                delta.push_back(c.delta);
                visible += c.n_visible;
                attended += c.n_attended;
                if (h % n_gqa == 0) {  // the heads of a group read together
                    scan_bytes += c.n_scanned * layer.scan_bytes() / kBlockCells;
                    attend_bytes += c.n_attended * layer.cell_bytes();
                    dense_bytes += c.n_visible * layer.cell_bytes();
                }
            }
            output.append(to_numpy(std::move(outputs[i]), layer.n_head, layer.v.dim()));
        }
        nb::dict phases;
        const auto add = [&](const char * name, int64_t PhaseTimes::*field) {
            std::vector<int64_t> ns;
            for (const PhaseTimes & one : times) {
                ns.push_back(one.*field);
            }
            phases[name] = to_numpy(std::move(ns), times.size());
        };
        add("begin", &PhaseTimes::begin);
        add("scan", &PhaseTimes::scan);
        add("select", &PhaseTimes::select);
        add("attend", &PhaseTimes::attend);
        add("combine", &PhaseTimes::combine);
        add("wait", &PhaseTimes::wait);
        const size_t n_heads = delta.size();
        nb::dict d;
        d["step_ns"] = step_ns;
        d["phases_ns"] = phases;
        d["scan_bytes"] = scan_bytes;
        d["attend_bytes"] = attend_bytes;
        d["dense_bytes"] = dense_bytes;
        d["attended"] = attended;
        d["visible"] = visible;
        d["delta"] = to_numpy(std::move(delta), n_heads);
        d["output"] = output;
        return d;
    }

    std::vector<Layer> layers_;
    Memory scratch_;
    size_t scratch_bytes_ = 0;
};

// A buffer that is read from end to end, for the bandwidth that memory has.
class MemoryReader {
  public:
    explicit MemoryReader(size_t bytes) : bytes_(bytes), data_(allocate(bytes)) {
        require(bytes >= 64, "bytes is " + std::to_string(bytes) + ", at least 64 are needed");
        std::memset(data_.get(), 1, bytes);
    }

    // Bytes a nanosecond, which is GB/s, of one pass; each thread reads its part from front to back.
    double read(int n_threads) const {
        require_threads(n_threads);
        const nb::gil_scoped_release released;
        const size_t n = bytes_ / sizeof(uint64_t);
        int64_t ns = 0;
        std::atomic<uint64_t> total{0};
        run_team(n_threads, [&](const Team & team) {
            const size_t rank = static_cast<size_t>(team.rank);
            const size_t size = static_cast<size_t>(team.size);
            const auto * words = reinterpret_cast<const uint64_t *>(data_.get());
            team.barrier();
            const Clock::time_point start = Clock::now();
            total += std::accumulate(words + n * rank / size, words + n * (rank + 1) / size, uint64_t{0});
            team.barrier();
            if (team.rank == 0) {
                ns = nanoseconds(Clock::now() - start);
            }
        });
        require(total == n * kWord, "the buffer does not hold what was written");  // so that nothing of it can be left out
        return static_cast<double>(n * sizeof(uint64_t)) / static_cast<double>(ns);
    }

  private:
    static constexpr uint64_t kWord = 0x0101010101010101;
    size_t bytes_;
    Memory data_;
};

}  // namespace

void bind_benchmark(nb::module_ & testing) {
    nb::class_<AttentionBench>(testing, "AttentionBench",
                               "Layers whose attention is timed by phases; each has an index of its complete blocks.")
        .def(nb::init<>())
        .def("add_layer", &AttentionBench::add_layer, "k"_a, "v"_a, "visible"_a, nb::kw_only(), "type_k"_a, "type_v"_a,
             "key_dim"_a, "value_dim"_a, "n_head"_a, "n_head_kv"_a, "scale"_a,
             "k, v: (n_cells, n_head_kv * bytes of a head's row) uint8, copied. visible: (n_cells,) bool.")
        .def(
            "step",
            [](AttentionBench & self, const std::vector<In<float, 2>> & queries, double epsilon, bool certified, bool compensate,
               int sinks, int recent, int n_threads) {
                DecodeSettings settings;
                settings.epsilon = epsilon;
                settings.certified = certified;
                settings.compensate = compensate;
                settings.sinks = sinks;
                settings.recent = recent;
                return self.step(queries, settings, n_threads);
            },
            "queries"_a, nb::kw_only(), "epsilon"_a = 0.05, "certified"_a = true, "compensate"_a = true, "sinks"_a = 4,
            "recent"_a = 64, "n_threads"_a = 1,
            "One decode step: every layer in turn. queries: (n_head, key_dim) float32 for each layer. A dict: step_ns, the time "
            "of "
            "the whole; phases_ns, by name (n_threads,) int64, sums over the layers; scan_bytes, attend_bytes, and dense_bytes, "
            "which dense attention would read; attended and visible, sums over query heads; delta, (n heads of all layers,); "
            "output, (n_head, value_dim) for each layer.")
        .def("append_ns", &AttentionBench::append_ns, "layer"_a,
             "(complete blocks * n_head_kv,) int64: nanoseconds of indexing each block of a KV head, once more.");

    nb::class_<MemoryReader>(testing, "MemoryReader", "A buffer to measure the bandwidth of memory with.")
        .def(nb::init<size_t>(), "bytes"_a)
        .def("read", &MemoryReader::read, "n_threads"_a, "GB/s of reading all of it once, from front to back in each thread.");
}

}  // namespace louver
