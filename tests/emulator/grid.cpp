#include "grid.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace lcore::emulator {

void run(const Launch& launch) {
  const auto& [kernel, grid, block, shared_bytes, params, invoke] = launch;
  const auto refuse = [](const std::string& what) { throw std::runtime_error("emulator: " + what); };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64)
    refuse("a block has 1 to 1024 threads, got " + std::to_string(threads));
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid is at most (2147483647, 65535, 65535), got (" + std::to_string(grid.x) + ", " +
           std::to_string(grid.y) + ", " + std::to_string(grid.z) + ")");
  }
  if (shared_bytes > kSharedLimit) {
    refuse("a block has at most 227 KB (232448 bytes) of shared memory, got " + std::to_string(shared_bytes));
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    Block mine(launch);
    for (uint64_t i = next++; i < blocks; i = next++) {
      const uint3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                        static_cast<unsigned>(i / grid.x / grid.y)};
      if (mine.run(index)) continue;
      next = blocks;
      const std::lock_guard lock(mutex);
      if (error.empty()) error = mine.error;
    }
  };
  const uint64_t cores = std::min<uint64_t>(blocks, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < cores; ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
  if (!error.empty()) refuse(error);
}

}  // namespace lcore::emulator
