// louver_llama._index: the index as a library, by itself: it needs no llama.cpp. Python's Index checks what it was given.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "index/strided.h"
#include "louver/index.h"
#include "louver/index_file.h"
#include "louver/isa.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace louver {
namespace {

const char * const kKinds[] = {"grid", "ball"};
const char * const kGroupings[] = {"tree", "kmeans"};
const char * const kEnclosures[] = {"ball", "box"};
const char * const kMethods[] = {"sum", "sweep", "filter"};
const char * const kOracles[] = {"fixed",      "sample_max", "sample_mean_max", "sample_top_k",
                                 "sample_gap", "budget",     "top_k",           "mass"};
const char * const kTypes[] = {"f32", "f16", "bf16"};

template <class E, size_t kN> E named(const std::string & name, const char * const (&names)[kN], const char * what) {
    std::string accepted;
    for (size_t i = 0; i < kN; ++i) {
        if (name == names[i]) {
            return static_cast<E>(i);
        }
        accepted += (i > 0 ? ", " : "") + std::string(names[i]);
    }
    throw std::invalid_argument(std::string(what) + " is \"" + name + "\", accepted are " + accepted);
}

using Ids = Out<int64_t, 1>;
using PyMatches = std::tuple<Ids, Ids, Out<double, 1>, std::tuple<int64_t, int64_t, int64_t>>;

PyMatches to_python(Matches matches) {
    const size_t n = matches.ids.size();
    const size_t n_offsets = matches.offsets.size();
    return {to_numpy(std::move(matches.offsets), n_offsets),
            to_numpy(std::move(matches.ids), n),
            to_numpy(std::move(matches.scores), n),
            {matches.stats.n_bounded, matches.stats.n_scored, matches.stats.n_exact}};
}

std::span<const float> numbers(const In<float, 2> & queries) { return {queries.data(), queries.size()}; }

void require_width(const Index & index, const In<float, 2> & queries) {
    require(queries.shape(1) == static_cast<size_t>(index.dim()), "queries have head_dim " + std::to_string(queries.shape(1)) +
                                                                      ", accepted is the index's " + std::to_string(index.dim()));
}

Index build(const nb::object & keys, const std::string & dtype, const IndexOptions & options, bool copy) {
    auto strided = std::make_unique<Strided>(keys, dtype, "keys");
    const StridedKeys view = strided->keys();
    if (copy) {
        const nb::gil_scoped_release released;
        Index index(options, view.type, view.n_head_kv, view.dim);
        index.append(view);
        return index;
    }
    // Whoever lets go of it last may be any thread.
    const std::shared_ptr<const void> owner(strided.release(), [](Strided * held) {
        const nb::gil_scoped_acquire gil;
        delete held;
    });
    const nb::gil_scoped_release released;
    return Index::borrow(options, view, owner);
}

PyMatches search(const Index & index, const In<float, 2> & queries, const In<double, 1> & tau, const std::string & method,
                 const std::optional<In<double, 2>> & subspace_tau) {
    require_width(index, queries);
    SearchOptions options;
    options.method = named<SearchMethod>(method, kMethods, "method");
    if (subspace_tau) {
        options.subspace_tau = {subspace_tau->data(), subspace_tau->size()};
    }
    Matches matches;
    {
        const nb::gil_scoped_release released;
        matches = index.search(numbers(queries), {tau.data(), tau.size()}, options);
    }
    return to_python(std::move(matches));
}

std::tuple<PyMatches, std::vector<SelectionCertificate>> select(const Index & index, const In<float, 2> & queries,
                                                                const Oracle & oracle, double scale) {
    require_width(index, queries);
    Selection selection;
    {
        const nb::gil_scoped_release released;
        selection = index.select(numbers(queries), oracle, scale);
    }
    return {to_python(std::move(selection.matches)), std::move(selection.certificates)};
}

using PyAttention = std::tuple<Out<float, 2>, Out<double, 1>, Out<uint8_t, 1>, std::vector<SelectionCertificate>>;

PyAttention attend(const Index & index, const In<float, 2> & queries, const nb::object & values, const std::string & dtype,
                   const Oracle & oracle, double scale, bool compensate) {
    require_width(index, queries);
    const Strided strided(values, dtype, "values");
    const StridedKeys view = strided.keys();
    Attention attention;
    {
        const nb::gil_scoped_release released;
        attention = index.attend(numbers(queries), view, oracle, scale, compensate);
    }
    const size_t n = queries.shape(0);
    return {to_numpy(std::move(attention.output), n, view.dim), to_numpy(std::move(attention.error_bound), n),
            to_numpy(std::move(attention.dense), n), std::move(attention.certificates)};
}

std::tuple<size_t, size_t, size_t> memory_usage(const Index & index) {
    MemoryUsage usage;
    {
        const nb::gil_scoped_release released;
        usage = index.memory_usage();
    }
    return {usage.keys, usage.index, usage.other};
}

// A bfloat16 array that speaks DLPack, where it lies, as the numpy array of its bits.
nb::object bfloat16_bits(const nb::ndarray<nb::ro, nb::device::cpu> & array) {
    if (array.dtype() != nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}) {
        throw nb::type_error("not an array of bfloat16");
    }
    std::vector<size_t> shape;
    std::vector<int64_t> strides;
    for (size_t i = 0; i < array.ndim(); ++i) {
        shape.push_back(array.shape(i));
        strides.push_back(array.stride(i));
    }
    return nb::cast(
        nb::ndarray<nb::numpy, const uint16_t>(array.data(), array.ndim(), shape.data(), nb::find(array), strides.data()));
}

// Seconds that appending every key by itself takes from C++, without Python's share.
double time_appends(Index & index, const nb::object & keys, const std::string & dtype) {
    const Strided strided(keys, dtype, "keys");
    StridedKeys one = strided.keys();
    const int64_t n = one.n;
    one.n = 1;
    const nb::gil_scoped_release released;
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < n; ++i) {
        index.append(one);
        one.base += one.row_stride;
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void raise_file_error(const std::exception_ptr & thrown, void *) {
    try {
        std::rethrow_exception(thrown);
    } catch (const IndexFileError & error) {
        const char * const names[] = {"IndexSystemError", "NotAnIndexError", "IndexVersionError", "TruncatedIndexError",
                                      "CorruptIndexError"};
        const nb::object type = nb::module_::import_("louver_llama.errors").attr(names[static_cast<size_t>(error.reason())]);
        PyErr_SetString(type.ptr(), error.what());
    }
}

void bind(nb::module_ & m) {
    nb::register_exception_translator(raise_file_error);

    m.def("available_isas", &available_isas, "Instruction sets the kernels can use here, best first.");
    m.def(
        "active_isa", [] { return active_isa(); }, "The one in use.");
    m.def("time_appends", &time_appends, "index"_a, "keys"_a, "dtype"_a);
    m.def("bfloat16_bits", &bfloat16_bits, "array"_a, nb::sig("def bfloat16_bits(array: object) -> typing.Any"));

    nb::class_<IndexOptions>(m, "IndexOptions")
        .def(
            "__init__",
            [](IndexOptions * self, const std::string & kind, int n_threads, int n_subspaces, int group_size,
               const std::string & grouping, const std::string & enclosure, int merge_at, uint64_t seed) {
                new (self) IndexOptions{named<IndexKind>(kind, kKinds, "kind"),
                                        {n_subspaces, group_size, named<Grouping>(grouping, kGroupings, "grouping"),
                                         named<Enclosure>(enclosure, kEnclosures, "enclosure"), merge_at, seed},
                                        n_threads};
            },
            "kind"_a, "n_threads"_a, "n_subspaces"_a, "group_size"_a, "grouping"_a, "enclosure"_a, "merge_at"_a, "seed"_a)
        .def_prop_ro("kind", [](const IndexOptions & o) { return kKinds[static_cast<size_t>(o.kind)]; })
        .def_ro("n_threads", &IndexOptions::n_threads)
        .def_prop_ro("n_subspaces", [](const IndexOptions & o) { return o.ball.n_subspaces; })
        .def_prop_ro("group_size", [](const IndexOptions & o) { return o.ball.group_size; })
        .def_prop_ro("grouping", [](const IndexOptions & o) { return kGroupings[static_cast<size_t>(o.ball.grouping)]; })
        .def_prop_ro("enclosure", [](const IndexOptions & o) { return kEnclosures[static_cast<size_t>(o.ball.enclosure)]; })
        .def_prop_ro("merge_at", [](const IndexOptions & o) { return o.ball.merge_at; })
        .def_prop_ro("seed", [](const IndexOptions & o) { return o.ball.seed; });

    nb::class_<Oracle>(m, "Oracle")
        .def(
            "__init__",
            [](Oracle * self, const std::string & kind, double tau, double epsilon, double fraction, int64_t k, int n_samples,
               uint64_t seed) {
                new (self) Oracle{named<OracleKind>(kind, kOracles, "oracle"), tau, epsilon, fraction, k, n_samples, seed};
            },
            "kind"_a, nb::kw_only(), "tau"_a = 0.0, "epsilon"_a = 0.05, "fraction"_a = 0.1, "k"_a = 16, "n_samples"_a = 256,
            "seed"_a = 0);

    nb::class_<SelectionCertificate>(m, "SelectionCertificate")
        .def_ro("tau", &SelectionCertificate::tau)
        .def_ro("n_keys", &SelectionCertificate::n_keys)
        .def_ro("n_bounded", &SelectionCertificate::n_bounded)
        .def_ro("n_scored", &SelectionCertificate::n_scored)
        .def_ro("n_selected", &SelectionCertificate::n_selected)
        .def_ro("bytes_read", &SelectionCertificate::bytes_read)
        .def_ro("delta", &SelectionCertificate::delta);

    nb::class_<Index>(m, "Index")
        .def_static("build", &build, "keys"_a, "dtype"_a, "options"_a, "copy"_a)
        .def_static(
            "load",
            [](const nb::bytes & path, int n_threads) {
                const std::string name(path.c_str(), path.size());
                const nb::gil_scoped_release released;
                return Index::load(name, n_threads);
            },
            "path"_a, "n_threads"_a)
        .def(
            "save",
            [](const Index & index, const nb::bytes & path) {
                const std::string name(path.c_str(), path.size());
                const nb::gil_scoped_release released;
                index.save(name);
            },
            "path"_a)
        .def(
            "append",
            [](Index & index, const nb::object & keys, const std::string & dtype) {
                const Strided strided(keys, dtype, "keys");
                const nb::gil_scoped_release released;
                return index.append(strided.keys());
            },
            "keys"_a, "dtype"_a)
        .def(
            "update",
            [](Index & index, const In<int64_t, 1> & positions, const nb::object & keys, const std::string & dtype) {
                const Strided strided(keys, dtype, "keys");
                const nb::gil_scoped_release released;
                index.update({positions.data(), positions.size()}, strided.keys());
            },
            "positions"_a, "keys"_a, "dtype"_a)
        .def(
            "remove",
            [](Index & index, const In<int64_t, 1> & positions) {
                const nb::gil_scoped_release released;
                index.remove({positions.data(), positions.size()});
            },
            "positions"_a)
        .def("rebuild", &Index::rebuild, nb::call_guard<nb::gil_scoped_release>())
        .def("search", &search, "queries"_a, "tau"_a, "method"_a, "subspace_tau"_a)
        .def("select", &select, "queries"_a, "oracle"_a, "scale"_a)
        .def("attend", &attend, "queries"_a, "values"_a, "dtype"_a, "oracle"_a, "scale"_a, "compensate"_a)
        .def(
            "key",
            [](const Index & index, int64_t position) {
                std::vector<float> key;
                {
                    const nb::gil_scoped_release released;
                    key = index.key(position);
                }
                return to_numpy(std::move(key), index.n_head_kv(), index.dim());
            },
            "position"_a)
        .def("is_live", &Index::is_live, "position"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("memory_usage", &memory_usage)
        .def_prop_ro("options", &Index::options, nb::rv_policy::copy)
        .def_prop_ro("dtype", [](const Index & index) { return kTypes[static_cast<size_t>(index.type())]; })
        .def_prop_ro("n_head_kv", &Index::n_head_kv)
        .def_prop_ro("dim", &Index::dim)
        .def_prop_ro("n_positions", &Index::n_positions, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("n_live", &Index::n_live, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("is_borrowed", &Index::is_borrowed, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace
}  // namespace louver

NB_MODULE(_index, m) {
    m.doc() = "Louver's index: builder, search, selection, attention.";
    louver::bind(m);
}
