// louver_llama._core: what Python needs of the engine. One file per area.
#include "bindings.h"

NB_MODULE(_core, m) {
    m.doc() = "Louver's engine: kernels, runtimes, the adapter to llama.cpp.";
    louver::bind_libraries(m);
    louver::bind_runtime(m);
    louver::bind_testing(m);
}
