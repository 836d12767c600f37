// What is known of each byte of a block's shared memory: who wrote it and who read it since. Two accesses of different
// warps, one of them a write, must be ordered by a barrier (vector clocks of warps, one epoch a release). The copy
// engine and the tensor cores count as two more, which nobody is ordered with but who waits for them.
#pragma once

#include <sys/mman.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace lcore::emulator {

constexpr int kWarps = 32;           // of a block, at most
constexpr int kEngine = kWarps;      // the copy engine's place in clocks: it writes
constexpr int kTensor = kWarps + 1;  // that of wgmma, which reads
using Clock = std::array<uint32_t, kWarps + 2>;

// What a warp knows of the others: how far each had come, and up to where it had fenced what it wrote, so that
// asynchronous operations see it.
struct Order {
  Clock seen{}, fenced{};
};

inline void join(Clock& into, const Clock& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = into[i] > other[i] ? into[i] : other[i];
}
inline void join(Order& into, const Order& other) {
  join(into.seen, other.seen);
  join(into.fenced, other.fenced);
}

enum class Verdict : uint8_t { kFine, kUnwritten, kInFlight, kHeld, kUnfenced, kRace };

class Shadow {
 public:
  explicit Shadow(size_t bytes);
  ~Shadow();
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  // Epochs only grow, so that a new block needs no clearing: what is older than `first` was another block's.
  void start_block(uint32_t first) { first_ = first; }
  // `other` receives the warp of the earlier access of a race.
  Verdict read(size_t offset, int warp, const Clock& seen, int& other);
  // A read, already found fine, at the reader's own epoch.
  void note_read(size_t offset, int reader, uint32_t epoch, const Clock& seen);
  // By a warp, or by the engine at its own epoch for a warp that has `seen`.
  Verdict write(size_t offset, int writer, uint32_t epoch, const Clock& seen, int& other);
  // An access that the hardware orders among its like: it must only come after the plain write that made the object.
  Verdict atomic(size_t offset, const Clock& seen, int& other) const;
  // Whether an asynchronous operation that a warp of this order asks for would read what the warp has seen.
  Verdict async_read(size_t offset, const Order& order, int& other) const;
  // Whether one that it asks for would write over what is not fenced.
  Verdict async_write(size_t offset, const Order& order, int& other) const;
  // From hold to let_go an asynchronous operation may read the byte at any moment, and nobody may write it.
  void hold(size_t offset) { ++cells_[offset].holders; }
  void let_go(size_t offset) { --cells_[offset].holders; }
  void set_in_flight(size_t offset, bool value) { cells_[offset].in_flight = value; }

 private:
  static constexpr uint8_t kMany = 255;
  struct Cell {
    uint32_t write_epoch;
    uint32_t read_epoch;  // the latest, where many warps read
    uint16_t holders;
    uint8_t writer;
    uint8_t read_warp;  // kMany: see readers_
    bool in_flight;
  };
  size_t bytes_;
  Cell* cells_;
  Clock* readers_;  // touched only where warps read the same byte between two barriers
  uint32_t first_ = 1;
};

}  // namespace lcore::emulator
