// Stacks for the threads of a block, and the switch between them: no system call, a dozen instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lcore::emulator {

// Saves the callee-saved registers and the stack pointer in *from, and goes on where `to` was saved.
extern "C" void lcore_emulator_switch(void** from, void* to);

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4 << 10;  // an inaccessible page below each stack: overflow is a fault, not a surprise

class Stacks {
 public:
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // The lowest usable address of a stack.
  uintptr_t low(int i) const;
  // A saved stack pointer from which the switch enters `entry`, which must not return.
  void* prepare(int i, void (*entry)()) const;

 private:
  size_t bytes_;
  uintptr_t base_;
};

}  // namespace lcore::emulator
