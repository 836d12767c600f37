// Runs a grid: its blocks are shared out over the machine's cores.
#pragma once

#include "block.h"

namespace lcore::emulator {

// Returns when the grid is done; throws std::runtime_error with the first error that a thread made.
void run(const Launch& launch);

}  // namespace lcore::emulator
