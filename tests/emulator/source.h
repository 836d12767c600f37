// Where in the program an address lies.
#pragma once

#include <cstdint>
#include <string>

namespace lcore::emulator {

// " (file:line)" of the instruction before a return address, or nothing; asks addr2line, so only for errors.
std::string source(const void* code);
// Whether the address is one of the program's own: constant tables, strings.
bool is_constant(uintptr_t at);

}  // namespace lcore::emulator
