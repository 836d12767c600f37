#include "fiber.h"

#include <sys/mman.h>

#include <new>

asm(R"(
.text
.globl lcore_emulator_switch
.type lcore_emulator_switch, @function
lcore_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lcore_emulator_switch, .-lcore_emulator_switch
)");

namespace lcore::emulator {

constexpr size_t kStride = kStackBytes + kGuardBytes;

Stacks::Stacks(int count) : bytes_(count * kStride) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = reinterpret_cast<uintptr_t>(memory);
  for (int i = 0; i < count; ++i) mprotect(reinterpret_cast<void*>(base_ + i * kStride), kGuardBytes, PROT_NONE);
}

Stacks::~Stacks() { munmap(reinterpret_cast<void*>(base_), bytes_); }

uintptr_t Stacks::low(int i) const { return base_ + i * kStride + kGuardBytes; }

void* Stacks::prepare(int i, void (*entry)()) const {
  auto* top = reinterpret_cast<uintptr_t*>(low(i) + kStackBytes);
  top[-1] = 0;  // where a return address would lie, so that the stack is aligned as after a call
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  for (int k = 3; k <= 8; ++k) top[-k] = 0;  // the six saved registers
  return top - 8;
}

}  // namespace lcore::emulator
