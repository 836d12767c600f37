// Bulk copies on their way. A load ends when a thread waits for its mbarrier and nobody else can run, the latest moment
// that hardware may choose; a store reads shared memory and writes global memory when its thread waits for that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace lcore::emulator {

class Block;

struct BulkLoad {
  void* to;
  size_t bytes;
  uint64_t* barrier;
  uint32_t epoch;  // of the engine
  std::function<void()> move;
};

struct BulkStore {
  const std::byte* from;
  size_t bytes;
  std::function<void(const std::byte* content)> write;
  std::vector<std::byte> content;  // once it has been read
};

struct BulkStores {  // of a thread
  std::vector<BulkStore> open;
  std::vector<std::vector<BulkStore>> groups;  // oldest first
};

// By the running thread. `what` names the instruction in errors.
void issue(const char* what, BulkLoad load);
void issue(const char* what, BulkStore store);
void fence_proxy_async();

// What the engine does to an mbarrier at the end of a load.
void complete_bytes(Block& block, uint64_t* barrier, int bytes, uint32_t engine_epoch);
// Ends the oldest load that a thread of the block waits for; false when there is none.
bool end_one_load(Block& block);
// What remains of the running thread's stores when it returns.
void end_stores();
// What is wrong at the end of a block, or nothing.
std::string unended_loads(const Block& block);

}  // namespace lcore::emulator
