// The ops as Python calls them.
#include "entry.h"

#include <memory>
#include <vector>

#include "cuda/kernels.h"
#include "memory.h"

namespace {
std::vector<std::unique_ptr<lcore::emulator::Registered>> registered;
}

extern "C" {

void lcore_emulator_register(const void* memory, size_t bytes, const char* name) {
  registered.push_back(std::make_unique<lcore::emulator::Registered>(memory, bytes, name));
}

void lcore_emulator_forget() { registered.clear(); }

const char* lcore_emulated_merge_states(const lcore::MergeParams* params) {
  return lcore::emulator::guarded([=] { lcore::cuda::merge_states(*params, nullptr); });
}

}  // extern "C"
