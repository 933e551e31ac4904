// Chooses the kernels once per process: the best instruction set the machine has, or the one LOUVER_ISA names.
#ifdef LOUVER_X86
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/tables.h"
#include "louver/isa.h"

namespace louver {
namespace {

#ifdef LOUVER_X86
// __builtin_cpu_supports("f16c") is unknown to clang 14.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

struct Candidate {
    const Kernels * table;
    bool (*usable)();
};

// Best first.
const Candidate kAll[] = {
#ifdef LOUVER_X86
    {&kAvx512Kernels,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
     }},
    {&kAvx2Kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }},
#endif
    {&kScalarKernels, [] { return true; }},
};

const Kernels * choose() {
    const char * forced = std::getenv("LOUVER_ISA");
    if (forced == nullptr || *forced == '\0') {
        return kernels_named(available_isas().front().c_str());
    }
    if (const Kernels * table = kernels_named(forced)) {
        return table;
    }
    std::string has;
    for (const std::string & name : available_isas()) {
        has += (has.empty() ? "" : ", ") + name;
    }
    throw std::invalid_argument("LOUVER_ISA is \"" + std::string(forced) + "\", but this machine has: " + has);
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Candidate & candidate : kAll) {
        if (candidate.usable()) {
            names.emplace_back(candidate.table->name);
        }
    }
    return names;
}

const Kernels * kernels_named(const char * name) {
    for (const Candidate & candidate : kAll) {
        if (candidate.usable() && std::string(candidate.table->name) == name) {
            return candidate.table;
        }
    }
    return nullptr;
}

const Kernels & kernels() {
    static const Kernels * table = choose();
    return *table;
}

const std::string & active_isa() {
    static const std::string name = kernels().name;
    return name;
}

}  // namespace louver
