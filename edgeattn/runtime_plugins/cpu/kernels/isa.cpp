#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace edgeattn {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kNeon:
      return "neon";
    default:
      return "scalar";
  }
}

std::vector<Isa> compiled_isas() {
  return {
      Isa::kScalar,
#ifdef EDGEATTN_WITH_X86
      Isa::kAvx2,
      Isa::kAvx512,
#endif
#ifdef EDGEATTN_WITH_NEON
      Isa::kNeon,
#endif
  };
}

bool runs_here(Isa isa) {
#ifdef EDGEATTN_WITH_X86
  // The builtins also ask the operating system whether it saves the wide registers.
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
#ifdef EDGEATTN_WITH_NEON
  if (isa == Isa::kNeon) return true;
#endif
  return isa == Isa::kScalar;
}

Isa best_isa() {
  Isa best = Isa::kScalar;
  for (Isa isa : compiled_isas()) {
    if (runs_here(isa)) best = isa;
  }
  return best;
}

Isa isa_from_name(const std::string& name) {
  std::string known;
  for (Isa isa : compiled_isas()) {
    if (name == isa_name(isa)) {
      if (runs_here(isa)) return isa;
      throw std::invalid_argument("instruction set \"" + name + "\" is not supported by this machine; its best is \"" +
                                  isa_name(best_isa()) + "\"");
    }
    known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("unknown instruction set \"" + name + "\"; this library has: " + known);
}

Isa active_isa() {
  const char* wanted = std::getenv("EDGEATTN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  try {
    return isa_from_name(wanted);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("EDGEATTN_CPU_ISA: ") + error.what());
  }
}

}  // namespace edgeattn
