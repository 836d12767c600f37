// Registers move from the warps that load to the warps that multiply. sm_90a.
#pragma once

namespace lcore::cuda {

// Called by every warp of a warpgroup at the same place, in a kernel whose __launch_bounds__ fix the registers at
// entry. Waits until so many are free: all warps together never hold more than 65536 / 32.
template <int kRegisters>
__device__ inline void registers_raise() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void registers_lower() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace lcore::cuda
