// Which instruction sets this machine and this build offer, and which one the kernels use.
#pragma once

#include <string>
#include <vector>

namespace louver {

// Names of the instruction sets that can be used here, best first; the last one is always "scalar".
std::vector<std::string> available_isas();

// The name in use: the one LOUVER_ISA asks for, else the best. Chosen once per process.
// Throws std::invalid_argument, naming what the machine has, if LOUVER_ISA asks for anything else.
const std::string & active_isa();

}  // namespace louver
