// Chooses the kernel table from CPUID, once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace lcore::cpu {

namespace baseline {
extern const KernelTable kTable;
}
#ifdef LCORE_X86
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const KernelTable kTable;
}
#endif
#ifdef LCORE_EMULATED_ISA
namespace emulated_bf16 {
extern const KernelTable kTable;
}
#endif

namespace {

struct Candidate {
  const KernelTable* table;
  bool supported;
};

const KernelTable& choose() {
#ifdef LCORE_X86
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool bf16 = v4 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  const Candidate candidates[] = {
      {&avx512_bf16::kTable, bf16}, {&avx512::kTable, v4}, {&avx2::kTable, v3}, {&baseline::kTable, true},
#ifdef LCORE_EMULATED_ISA
      {&emulated_bf16::kTable, v3},  // after one that always runs: only by name
#endif
  };
#else
  const Candidate candidates[] = {{&baseline::kTable, true}};
#endif
  const char* wanted = std::getenv("LCORE_CPU_ISA");
  for (const Candidate& candidate : candidates) {
    if (wanted == nullptr || *wanted == '\0') {
      if (candidate.supported) return *candidate.table;
    } else if (std::string(wanted) == candidate.table->isa) {
      if (candidate.supported) return *candidate.table;
      throw std::invalid_argument(std::string("LCORE_CPU_ISA=") + wanted + " is not supported by this machine");
    }
  }
  throw std::invalid_argument(std::string("LCORE_CPU_ISA must be one of ") + built_isas() + ", got " + wanted);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

const char* built_isas() { return LCORE_CPU_ISAS; }

}  // namespace lcore::cpu
