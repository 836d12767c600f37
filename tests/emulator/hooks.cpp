// What g++ calls in code built with -fsanitize=thread,alignment,bounds: the checks are ours, no sanitizer is linked.
#include "block.h"
#include "intrinsics.h"
#include "memory.h"
#include "source.h"

using lcore::emulator::access;
using lcore::emulator::Access;

#define LCORE_HOOKS(n)                                                                                    \
  void __tsan_read##n(void* p) { access(p, n, Access::kRead, n, __builtin_return_address(0)); }           \
  void __tsan_write##n(void* p) { access(p, n, Access::kWrite, n, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##n(void* p) { access(p, n, Access::kRead, 1, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { access(p, n, Access::kWrite, 1, __builtin_return_address(0)); }

extern "C" {

LCORE_HOOKS(1)
LCORE_HOOKS(2)
LCORE_HOOKS(4)
LCORE_HOOKS(8)
LCORE_HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, Access::kRead, 1, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, Access::kWrite, 1, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}  // of host objects: kernels have no virtual functions
void __tsan_vptr_read(void*) {}

// The layout of the compiler's static records is its own; of them only where the code lies is used.
struct SourceLocation {
  const char* file;
  unsigned line, column;
};

static void refuse(const SourceLocation& at, const char* what) {
  const std::string place = std::string(at.file).substr(std::string(at.file).rfind('/') + 1);
  if (auto* block = lcore::emulator::current())
    block->fail(what + (" (" + place) + ":" + std::to_string(at.line) + ")");
}

void __ubsan_handle_type_mismatch_v1(const SourceLocation* at, uintptr_t pointer) {
  if (pointer != 0) refuse(*at, "uses a pointer that is not aligned for its type");
}
void __ubsan_handle_out_of_bounds(const SourceLocation* at, uintptr_t) {
  refuse(*at, "indexes past the end of an array");
}

}  // extern "C"

void lcore::emulator::check_atomic(void* memory, size_t bytes) {
  access(memory, bytes, Access::kAtomic, bytes, __builtin_return_address(0));
}
