// What is known of each byte of a block's shared memory: who wrote it and who read it since. Two accesses of different
// warps, one of them a write, must be ordered by a barrier (vector clocks of warps, one epoch a release).
#pragma once

#include <sys/mman.h>

#include <array>
#include <cstdint>

namespace lcore::emulator {

constexpr int kWarps = 32;  // of a block, at most
using Clock = std::array<uint32_t, kWarps>;

inline void join(Clock& into, const Clock& other) {
  for (int i = 0; i < kWarps; ++i) into[i] = into[i] > other[i] ? into[i] : other[i];
}

enum class Verdict : uint8_t { kFine, kUnwritten, kInFlight, kRace };

class Shadow {
 public:
  explicit Shadow(size_t bytes);
  ~Shadow();
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  // Epochs only grow, so that a new block needs no clearing: what is older than `first` was another block's.
  void start_block(uint32_t first) { first_ = first; }
  // `other` receives the warp of the earlier access of a race.
  Verdict read(size_t offset, int warp, const Clock& clock, int& other);
  Verdict write(size_t offset, int warp, const Clock& clock, int& other);
  // An access that the hardware orders among its like: it must only come after the plain write that made the object.
  Verdict atomic(size_t offset, const Clock& clock, int& other) const;
  void set_in_flight(size_t offset, bool value) { cells_[offset].in_flight = value; }

 private:
  static constexpr uint8_t kMany = 255;
  struct Cell {
    uint32_t write_epoch;
    uint32_t read_epoch;  // the latest, where many warps read
    uint8_t write_warp;
    uint8_t read_warp;  // kMany: see readers_
    bool in_flight;
  };
  size_t bytes_;
  Cell* cells_;
  Clock* readers_;  // touched only where warps read the same byte between two barriers
  uint32_t first_ = 1;
};

}  // namespace lcore::emulator
