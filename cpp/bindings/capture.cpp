// Runtime's capture in Python, as numpy arrays.
#include "louver/capture.h"

#include <algorithm>
#include <string>

#include "arrays.h"
#include "bindings.h"
#include "louver/runtime.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace louver {
namespace {

nb::object text(const std::string & s) { return nb::str(s.c_str()); }

nb::dict layer_dict(CapturedLayer && layer) {
    const size_t n_query = layer.visible.size();
    size_t width = 0;
    for (const auto & row : layer.visible) {
        width = std::max(width, row.size());
    }
    std::vector<uint8_t> visible(n_query * width);
    for (size_t q = 0; q < n_query; ++q) {
        std::copy(layer.visible[q].begin(), layer.visible[q].end(), visible.begin() + static_cast<std::ptrdiff_t>(q * width));
    }
    const size_t rows = std::max<size_t>(static_cast<size_t>(layer.n_cell * layer.n_head_kv), 1);
    const size_t k_bytes = layer.k.size() / rows;
    const size_t v_bytes = layer.v.size() / rows;
    nb::dict d;
    d["layer"] = layer.layer;
    d["scale"] = layer.scale;
    d["reason"] = text(layer.reason);
    d["type_k"] = text(layer.type_k);
    d["type_v"] = text(layer.type_v);
    d["value_dim"] = layer.value_dim;
    d["queries"] = to_numpy(std::move(layer.query), n_query, layer.n_head, layer.key_dim);
    d["visible"] = to_numpy(std::move(visible), n_query, width);
    d["k"] = to_numpy(std::move(layer.k), layer.n_cell, layer.n_head_kv, k_bytes);
    d["v"] = to_numpy(std::move(layer.v), layer.n_cell, layer.n_head_kv, v_bytes);
    return d;
}

}  // namespace

void bind_capture(nb::class_<Runtime> & runtime) {
    runtime
        .def(
            "capture", [](Runtime & self, bool queries, bool cache) { self.capture().set(queries, cache); }, nb::kw_only(),
            "queries"_a, "cache"_a = false,
            "What captured() will have of the next decode steps: their queries, and the cache as the last one sees it. Not "
            "during a decode.")
        .def(
            "captured",
            [](Runtime & self) {
                nb::list layers;
                for (CapturedLayer & layer : self.capture().take()) {
                    layers.append(layer_dict(std::move(layer)));
                }
                return layers;
            },
            nb::sig("def captured(self) -> list[dict[str, object]]"),
            "What was captured since the last call, a dict for each layer: layer, scale, type_k, type_v and value_dim; reason, "
            "why "
            "Louver does not serve it, or none; queries (n_query, n_head, key_dim) float32, after RoPE; visible (n_query, cells) "
            "uint8, 0 or 1; k and v (n_cell, n_head_kv, bytes of a head's row) uint8, as stored, n_cell 0 without cache.");
}

}  // namespace louver
