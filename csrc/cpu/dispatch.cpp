// Chooses the kernel table from CPUID, once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace lcore::cpu {

namespace baseline {
extern const KernelTable kTable;
}
#ifdef LCORE_HAS_avx2
namespace avx2 {
extern const KernelTable kTable;
}
#endif
#ifdef LCORE_HAS_avx512
namespace avx512 {
extern const KernelTable kTable;
}
#endif
#ifdef LCORE_HAS_avx512_bf16
namespace avx512_bf16 {
extern const KernelTable kTable;
}
#endif
#ifdef LCORE_HAS_emulated_bf16
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
#ifdef __x86_64__
  __builtin_cpu_init();
#endif
#ifdef LCORE_HAS_avx2
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c");
#endif
#ifdef LCORE_HAS_avx512
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
#endif
  const Candidate candidates[] = {
#ifdef LCORE_HAS_avx512_bf16
      {&avx512_bf16::kTable, v4 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
#endif
#ifdef LCORE_HAS_avx512
      {&avx512::kTable, v4},
#endif
#ifdef LCORE_HAS_avx2
      {&avx2::kTable, v3},
#endif
      {&baseline::kTable, true},
#ifdef LCORE_HAS_emulated_bf16
      {&emulated_bf16::kTable, v3},  // after one that always runs: only by name
#endif
  };
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
