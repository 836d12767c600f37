// The out-of-line half of device.h, not instrumented.
#include <algorithm>

#include "block.h"
#include "warp.h"

namespace lcore::emulator {

enum class Reduction : int { kAdd, kMin, kMax, kAnd, kOr, kXor };

uint3 thread_index() { return current()->running().index; }
uint3 block_index() { return current()->index; }
uint3 block_dim() {
  const dim3 d = current()->launch.block;
  return {d.x, d.y, d.z};
}
uint3 grid_dim() {
  const dim3 d = current()->launch.grid;
  return {d.x, d.y, d.z};
}
int lane() { return current()->running().id % kLanes; }

// Lanes run one after the other: as on hardware, a lane may be alone.
uint32_t active_mask() { return 1u << lane(); }

int synchronize(int barrier, int threads, bool vote) {
  Block& b = *current();
  const dim3 d = b.launch.block;
  return b.synchronize(barrier, threads != 0 ? threads : static_cast<int>(d.x * d.y * d.z), vote);
}

void arrive(int barrier, int threads) { current()->arrive(barrier, threads); }

std::byte* dynamic_shared() { return current()->dynamic; }

uint32_t shared_window(const void* memory) { return current()->window(memory); }

struct Shuffled {
  uint64_t bits;
  int64_t source;
};

uint64_t shuffle(uint32_t mask, uint64_t bits, int source_lane) {
  if (source_lane < 0 || source_lane >= kLanes || !(mask >> source_lane & 1)) {
    current()->fail("__shfl_sync: lane " + std::to_string(source_lane) + " is not in the mask");
  }
  return meet<uint64_t>("__shfl_sync", mask, Shuffled{bits, source_lane}, [](const Lanes& lanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(lanes.mask >> i & 1)) continue;
      const auto source = static_cast<int>(lanes.get<Shuffled>(i).source);
      lanes.set(i, lanes.get<Shuffled>(source).bits);
    }
  });
}

uint32_t ballot(uint32_t mask, bool vote) {
  return meet<uint32_t>("a vote of its warp", mask, vote, [](const Lanes& lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < kLanes; ++i) votes |= lanes.mask >> i & 1 && lanes.get<bool>(i) ? 1u << i : 0u;
    for (int i = 0; i < kLanes; ++i) {
      if (lanes.mask >> i & 1) lanes.set(i, votes);
    }
  });
}

uint32_t match(uint32_t mask, uint64_t bits) {
  return meet<uint32_t>("__match_any_sync", mask, bits, [](const Lanes& lanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(lanes.mask >> i & 1)) continue;
      uint32_t same = 0;
      for (int j = 0; j < kLanes; ++j) {
        if (lanes.mask >> j & 1 && lanes.get<uint64_t>(i) == lanes.get<uint64_t>(j)) same |= 1u << j;
      }
      lanes.set(i, same);
    }
  });
}

struct Reduced {
  int64_t value;
  Reduction how;
};

int64_t reduce(uint32_t mask, int64_t value, Reduction how) {
  return meet<int64_t>("__reduce_sync", mask, Reduced{value, how}, [](const Lanes& lanes) {
    int64_t total = 0;
    bool first = true;
    for (int i = 0; i < kLanes; ++i) {
      if (!(lanes.mask >> i & 1)) continue;
      const auto [x, how] = lanes.get<Reduced>(i);
      if (first) total = x;
      if (!first) {
        switch (how) {
          case Reduction::kAdd:
            total += x;
            break;
          case Reduction::kMin:
            total = std::min(total, x);
            break;
          case Reduction::kMax:
            total = std::max(total, x);
            break;
          case Reduction::kAnd:
            total &= x;
            break;
          case Reduction::kOr:
            total |= x;
            break;
          case Reduction::kXor:
            total ^= x;
        }
      }
      first = false;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (lanes.mask >> i & 1) lanes.set(i, total);
    }
  });
}

}  // namespace lcore::emulator
