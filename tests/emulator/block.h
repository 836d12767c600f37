// A block of a grid while it runs: its threads are fibers of one core, its warps and barriers are plain counters.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "bulk.h"
#include "fiber.h"
#include "products.h"
#include "shadow.h"

namespace lcore::emulator {

constexpr int kLanes = 32;
constexpr size_t kSharedLimit = 227 << 10;  // of a block on sm_90, dynamic
constexpr int kNamedBarriers = 16;
constexpr uint64_t kTurn = uint64_t{1} << 12;      // accesses after which other threads get their turn: a loop may spin
constexpr uint64_t kPatience = uint64_t{1} << 24;  // accesses of a block since a thread last waited or returned

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  const void* params;
  void (*invoke)(const void* kernel, const void* params);
};

struct Copy {  // a cp.async on its way
  void* to;
  const void* from;
  int bytes, filled;  // the rest of `bytes` becomes zero
};

struct Wait {  // words of printf and their numbers, put together only for a report
  const char* format = "";
  int numbers[3] = {};
};

enum class State : uint8_t { kReady, kWaiting, kDone };

struct Thread {
  uint3 index;
  int id;
  State state;
  void* stack;
  uintptr_t stack_low;
  Wait waits_for;
  int vote;                               // what its last barrier counted
  alignas(16) std::byte in[64], out[64];  // of a warp collective
  std::vector<Copy> copies;               // uncommitted ones last
  std::vector<size_t> groups;             // copies in each committed group, oldest first
  BulkStores stores;
};

struct Meeting {  // lanes of a warp on their way into one collective
  const char* what = nullptr;
  uint32_t mask = 0, arrived = 0;
};

struct Barrier {
  int expected = 0, arrived = 0, votes = 0;
  Order order;
  std::vector<Thread*> waiting;
};

struct Mbarrier {  // what does not fit into its 64 bits
  Order arriving, ended;
  std::vector<Thread*> waiting;
};

// One a core, for one launch; runs block after block.
class Block {
 public:
  explicit Block(const Launch& launch);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  // False when a thread failed: `error` tells how.
  bool run(uint3 index);

  Thread& running() { return *running_; }
  Thread& lane(int i) { return threads_[running_->id / kLanes * kLanes + i]; }
  int warp() const { return running_->id / kLanes; }
  // Stops the running thread until somebody makes it ready.
  void wait(const Wait& what);
  // Shared memory as descriptors see it, 256 KB: dynamic memory at 0, __shared__ variables behind it.
  uint32_t window(const void* memory);
  std::byte* shared_at(uint32_t address);
  // Counts an access, and lets the others run now and then.
  void step();
  // Returns when `expected` threads have arrived; with how many of them voted.
  int synchronize(int barrier, int expected, bool vote);
  void arrive(int barrier, int expected);
  // A point of order: what the running warp did before is seen by whoever joins `into` later.
  void release(Order& into);
  void acquire(const Order& from) { join(orders[warp()], from); }
  [[noreturn]] void fail(const std::string& what);
  std::string who(const Thread& thread) const;

  const Launch& launch;
  uint3 index{};
  std::string error;
  Meeting meetings[kWarps][kLanes];
  std::map<uintptr_t, Mbarrier> mbarriers;  // by address
  std::vector<BulkLoad> loads;              // on their way, oldest first
  uint32_t engine_epoch = 0;                // of its latest load
  uint32_t tensor_epoch = 0;                // of the latest product
  Products products[kWarps];
  Warpgroup warpgroups[kWarps / kWarpgroup];
  int registers[kWarps] = {};  // asked for; 0: as launched
  Order orders[kWarps];
  Shadow dynamic_shadow, static_shadow;
  std::byte* dynamic;        // shared_bytes of it belong to the block
  uintptr_t static_low = 0;  // __shared__ variables of this core
  size_t static_bytes = 0;

 private:
  static void enter();
  Barrier& arrived(int barrier, int expected);
  void complete(Barrier& barrier);
  std::string stuck() const;
  // Where __shared__ variables begin in the window: swizzles need the same lower bits as in memory.
  size_t static_window() const { return (launch.shared_bytes + 2047) / 1024 * 1024 + static_low % 1024; }

  Stacks stacks_;
  std::vector<Thread> threads_;
  Barrier barriers_[kNamedBarriers];
  Thread* running_ = nullptr;
  uint64_t steps_ = 0;
  bool turned_ = false;  // a thread that does not wait has let others run
  void* scheduler_ = nullptr;
};

// The block of this core, or null in host code.
Block* current();

}  // namespace lcore::emulator
