#include "source.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>

namespace lcore::emulator {

std::string source(const void* code) {
  Dl_info info{};
  if (!code || !dladdr(code, &info) || !info.dli_fname) return {};
  const auto offset = reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  std::array<char, 512> line{};
  std::snprintf(line.data(), line.size(), "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(offset));
  std::FILE* pipe = popen(line.data(), "r");
  if (!pipe) return {};
  const bool got = std::fgets(line.data(), line.size(), pipe) != nullptr;
  pclose(pipe);
  std::string found = got ? line.data() : "";
  found = found.substr(0, found.find_first_of("\n ("));
  return found.empty() || found[0] == '?' ? "" : " (" + found + ")";
}

bool is_constant(uintptr_t at) {
  Dl_info info{};
  return dladdr(reinterpret_cast<const void*>(at), &info) != 0;
}

}  // namespace lcore::emulator
