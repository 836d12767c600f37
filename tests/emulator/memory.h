// The memory a kernel may touch: registered global allocations, its block's shared memory, and its own stack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lcore::emulator {

class Block;

struct Allocation {
  uintptr_t low;
  size_t bytes;
  std::string name;
};

// Global memory for as long as the object lives.
class Registered {
 public:
  Registered(const void* memory, size_t bytes, std::string name);
  ~Registered();
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;

 private:
  uintptr_t low_;
};

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Ends the running thread's block with an error if the access is wrong. `alignment` is what the instruction asks for;
// `code` the address of the instruction, or null. Does nothing in host code.
void access(const volatile void* memory, size_t bytes, Access kind, size_t alignment, const void* code);

// Shared memory that an asynchronous copy will fill: nobody may touch it until it has arrived.
void set_in_flight(void* shared, size_t bytes, bool value);

// For operations that have no thread of their own; the running one asks, and `what` names the instruction in errors.
// claim: the copy engine will write; set_arrived: it has. hold: the memory may be read at any moment until let_go.
void claim(const char* what, void* shared, size_t bytes, uint32_t engine_epoch);
void set_arrived(Block& block, void* shared, size_t bytes);
void hold(const char* what, const void* shared, size_t bytes);
void let_go(const void* shared, size_t bytes);
// The end of a product's hold, which counts as a read by the tensor cores.
void let_go_of_product(const void* shared, size_t bytes, uint32_t tensor_epoch);
// What warps wrote here must be visible to asynchronous operations.
void require_fenced(const char* what, const void* shared, size_t bytes);
// Whether [memory, memory + 1) lies in the running block's shared memory.
bool is_shared(const void* memory);

}  // namespace lcore::emulator
