// What Python tells the emulator about memory, for kernels that are not ops.
#include <memory>
#include <vector>

#include "memory.h"

namespace {
std::vector<std::unique_ptr<lcore::emulator::Registered>> registered;
}

extern "C" {

void lcore_emulator_register(const void* memory, size_t bytes, const char* name) {
  registered.push_back(std::make_unique<lcore::emulator::Registered>(memory, bytes, name));
}

void lcore_emulator_forget() { registered.clear(); }

}  // extern "C"
