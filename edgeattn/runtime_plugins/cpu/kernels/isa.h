// Instruction sets of the kernels: what was compiled, what this machine runs, what the user asked for.
#pragma once

#include <string>
#include <vector>

namespace edgeattn {

enum class Isa { kScalar, kAvx2, kAvx512, kNeon };

const char* isa_name(Isa isa);

// Compiled into this library, slowest first.
std::vector<Isa> compiled_isas();
bool runs_here(Isa isa);
Isa best_isa();

// Throws std::invalid_argument for a name that is unknown, not compiled, or not supported by this machine.
Isa isa_from_name(const std::string& name);

// The best one, or that of the environment variable EDGEATTN_CPU_ISA.
Isa active_isa();

}  // namespace edgeattn
