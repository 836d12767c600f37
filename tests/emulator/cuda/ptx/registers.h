// csrc/cuda/ptx/registers.h for the emulator.
#pragma once

namespace lcore::emulator {
void set_registers(int count);
}

namespace lcore::cuda {

template <int kRegisters>
void registers_raise() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::set_registers(kRegisters);
}

template <int kRegisters>
void registers_lower() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::set_registers(kRegisters);
}

}  // namespace lcore::cuda
