#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "louver/isa.h"
#include "louver/runtime.h"

namespace nb = nanobind;

namespace louver {

void bind_libraries(nb::module_ & m) {
    nb::exception<LibraryMismatch>(m, "LibraryMismatch", PyExc_RuntimeError);

    const Libraries l = libraries();
    nb::dict pin;
    pin["llama_cpp_python"] = l.pin_package_version;
    pin["ggml"] = l.pin_ggml_version;
    pin["commit"] = l.pin_commit;
    m.attr("PIN") = pin;

    m.def(
        "loaded_libraries",
        [] {
            const Libraries found = libraries();
            nb::dict d;
            d["ggml"] = found.ggml_version;
            d["commit"] = found.commit;
            d["ggml_cpu_path"] = found.ggml_cpu_path;
            d["louver_path"] = found.louver_path;
            return d;
        },
        nb::sig("def loaded_libraries() -> dict[str, str]"), "Versions and paths of the libraries in this process.");
    m.def(
        "attach", &attach,
        "Register our attention with ggml-cpu, and with ggml-cuda where that is built in, once per process.\n\n"
        "Raises LibraryMismatch if the llama.cpp in this process is not the one we were built with, and ValueError if LOUVER_ISA "
        "names an instruction set this machine lacks.");
    m.def("has_cuda", &has_cuda, "Whether this build has CUDA kernels (-DLOUVER_CUDA=ON).");
    m.def(
        "devices",
        [] {
            nb::list all;
            for (const DeviceInfo & device : devices()) {
                nb::dict d;
                d["id"] = device.id;
                d["name"] = device.name;
                d["capability"] = device.capability;
                d["in_the_way"] = device.refusal.empty() ? nb::object(nb::none()) : nb::object(nb::cast(device.refusal));
                all.append(d);
            }
            return all;
        },
        nb::sig("def devices() -> list[dict[str, object]]"),
        "The CUDA devices; empty in a build without CUDA. Each has its \"id\" (int), \"name\", \"capability\" (\"9.0\"), and in "
        "\"in_the_way\" why our kernels cannot run there, None where they can.");
    m.def("available_isas", &available_isas, "Instruction sets the kernels can use here, best first.");
    m.def("isa", &active_isa, "The instruction set the kernels use. Raises ValueError for a bad LOUVER_ISA.");
}

}  // namespace louver
