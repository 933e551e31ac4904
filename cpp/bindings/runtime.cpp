#include "louver/runtime.h"

#include <nanobind/stl/string.h>

#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace louver {
namespace {

const char * path_name(Path path) {
    switch (path) {
        case Path::louver: return "louver";
        case Path::dense: return "dense";
        case Path::stock: return "stock";
    }
    return "";
}

// Sets the fields that keyword arguments name; the arguments' ranges are LouverConfig's business (config.py).
void apply(RuntimeConfig & config, const nb::kwargs & arguments) {
    for (const auto & [key, value] : arguments) {
        const std::string name = nb::cast<std::string>(key);
        if (name == "epsilon") {
            config.decode.epsilon = nb::cast<double>(value);
        } else if (name == "certified") {
            config.decode.certified = nb::cast<bool>(value);
        } else if (name == "compensate") {
            config.decode.compensate = nb::cast<bool>(value);
        } else if (name == "sinks") {
            config.decode.sinks = nb::cast<int>(value);
        } else if (name == "recent") {
            config.decode.recent = nb::cast<int>(value);
        } else if (name == "check") {
            config.decode.check = nb::cast<bool>(value);
        } else if (name == "min_context") {
            config.min_context = nb::cast<int64_t>(value);
        } else if (name == "min_context_gpu") {
            config.min_context_gpu = nb::cast<int64_t>(value);
        } else if (name == "enabled") {
            config.enabled = nb::cast<bool>(value);
        } else if (name == "n_ctx") {
            config.n_ctx = nb::cast<int64_t>(value);
        } else {
            throw nb::type_error(("Runtime has no setting \"" + name + "\"").c_str());
        }
    }
}

nb::dict config_dict(const RuntimeConfig & config) {
    nb::dict d;
    d["epsilon"] = config.decode.epsilon;
    d["min_context"] = config.min_context;
    d["min_context_gpu"] = config.min_context_gpu;
    d["sinks"] = config.decode.sinks;
    d["recent"] = config.decode.recent;
    d["certified"] = config.decode.certified;
    d["compensate"] = config.decode.compensate;
    d["enabled"] = config.enabled;
    d["check"] = config.decode.check;
    d["n_ctx"] = config.n_ctx;
    return d;
}

nb::dict head_dict(int head, const HeadCertificate & c) {
    nb::dict d;
    d["head"] = head;
    d["tau"] = c.tau;
    d["n_visible"] = c.n_visible;
    d["n_scanned"] = c.n_scanned;
    d["n_attended"] = c.n_attended;
    d["delta"] = c.delta;
    d["error_bound"] = c.error_bound;
    return d;
}

nb::dict stats_dict(const Stats & s) {
    nb::dict attention;
    nb::dict reasons;
    for (Path path : {Path::louver, Path::dense, Path::stock}) {
        const size_t p = static_cast<size_t>(path);
        attention[path_name(path)] = s.attention[p];
        if (path == Path::louver) {
            continue;
        }
        nb::dict counts;
        for (size_t r = 0; r < s.reasons[p].size(); ++r) {
            if (s.reasons[p][r] != 0) {
                counts[reason_name(static_cast<Reason>(r))] = s.reasons[p][r];
            }
        }
        reasons[path_name(path)] = counts;
    }
    nb::dict check;
    check["pairs"] = s.checked.pairs;
    check["misses"] = s.checked.misses;
    check["bound_violations"] = s.checked.bound_violations;
    check["mass_violations"] = s.checked.mass_violations;

    const double cells = s.index_cells > 0 ? static_cast<double>(s.index_cells) : 1.0;
    nb::dict index;
    index["bytes"] = s.index_bytes;
    index["cells"] = s.index_cells;
    index["bytes_per_cell"] = static_cast<double>(s.index_bytes) / cells;
    index["cache_bytes_per_cell"] = static_cast<double>(s.cache_bytes) / cells;
    index["share"] = s.cache_bytes > 0 ? static_cast<double>(s.index_bytes) / static_cast<double>(s.cache_bytes) : 0.0;
    index["blocks_built"] = s.blocks_built;
    index["cells_encoded"] = s.cells_encoded;

    nb::list last_step;
    for (const LayerCertificates & layer : s.last_step) {
        nb::list heads;
        for (size_t h = 0; h < layer.heads.size(); ++h) {
            heads.append(head_dict(static_cast<int>(h), layer.heads[h]));
        }
        nb::dict d;
        d["layer"] = layer.layer;
        d["stream"] = layer.stream;
        d["token"] = layer.token;
        d["path"] = path_name(layer.path);
        d["heads"] = heads;
        last_step.append(d);
    }

    nb::dict d;
    d["attention"] = attention;
    d["reasons"] = reasons;
    d["n_queries"] = s.n_queries;
    d["heads_uniform"] = s.heads_uniform;
    d["heads_in_full"] = s.heads_in_full;
    d["keys_visible"] = s.keys_visible;
    d["keys_scanned"] = s.keys_scanned;
    d["keys_attended"] = s.keys_attended;
    d["bytes_read"] = s.bytes_read;
    d["bytes_dense"] = s.bytes_dense;
    d["delta_mean"] = s.n_queries > 0 ? s.delta_sum / static_cast<double>(s.n_queries) : 0.0;
    d["delta_max"] = s.delta_max;
    d["error_bound_max"] = s.error_bound_max;
    d["check"] = check;
    d["index"] = index;
    d["last_step"] = last_step;
    return d;
}

}  // namespace

void bind_runtime(nb::module_ & m) {
    nb::class_<Runtime> runtime(m, "Runtime",
                                "Louver's settings, indexes and counts for one llama.cpp context. Must outlive the context.");
    runtime
        .def(
            "__init__",
            [](Runtime * self, const nb::kwargs & settings) {
                RuntimeConfig config;
                apply(config, settings);
                new (self) Runtime(config);
            },
            nb::sig("def __init__(self, *, epsilon: float = 0.05, min_context: int = 1024, min_context_gpu: int = 16384, "
                    "sinks: int = 4, recent: int = 64, certified: bool = True, compensate: bool = True, enabled: bool = True, "
                    "check: bool = False, n_ctx: int = 0) -> None"),
            "n_ctx: cells per stream of the context's full cache, by which sliding-window caches are told apart; 0 if unknown.")
        .def(
            "configure",
            [](Runtime & self, const nb::kwargs & settings) {
                RuntimeConfig config = self.config();
                apply(config, settings);
                self.configure(config);
            },
            nb::sig("def configure(self, *, epsilon: float = ..., min_context: int = ..., min_context_gpu: int = ..., "
                    "sinks: int = ..., recent: int = ..., certified: bool = ..., compensate: bool = ..., enabled: bool = ..., "
                    "check: bool = ..., n_ctx: int = ...) -> None"),
            "Change settings between decodes; those not named keep their value.")
        .def(
            "config", [](const Runtime & self) { return config_dict(self.config()); },
            nb::sig("def config(self) -> dict[str, object]"), "The settings in force.")
        .def("enter", &Runtime::enter,
             "Caches that this thread's graphs show first between enter() and exit() belong to this runtime.")
        .def("exit", &Runtime::exit, "Ends what enter() began, on the same thread.")
        .def(
            "stats", [](Runtime & self) { return stats_dict(self.stats()); }, nb::sig("def stats(self) -> dict[str, object]"),
            "Counts since the last reset, the index's memory, and the certificates of the last step.")
        .def("reset_stats", &Runtime::reset_stats, "Start all counts anew.")
        .def("set_stale", &Runtime::set_stale, "stale"_a,
             "Negative control of the check, for tests: while stale, writes to the cache do not reach the index.");
    bind_capture(runtime);
}

}  // namespace louver
