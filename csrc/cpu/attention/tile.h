// Tile sizes of CPU attention and the scratch they need.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

// Keys between absolute multiples of this are one span: spans are reduced on their own and merged in order, so that one
// token against a long cache can use every core and still gives the bits of a prefill.
inline constexpr int64_t kSpan = 4096;

struct TileSize {
  int rows;  // query rows: positions times the query heads that share a kv head
  int keys;
};

// Q, the scores, the output twice, K and V of a tile stand in L2 (1 MB) together; the sizes are of float. Measured: 384
// rows instead of 192 are worth 5 %, since widening a block of keys costs what 40 rows of products do.
constexpr TileSize forward_tile(int head_dim) {
  if (head_dim <= 64) return {384, 128};   // 96 + 192 + 2*96 + 32 + 32 = 544 KB
  if (head_dim <= 128) return {384, 128};  // 192 + 192 + 2*192 + 64 + 64 = 896 KB
  if (head_dim <= 256) return {96, 64};    // 96 + 24 + 2*96 + 64 + 64 = 440 KB
  return {48, 64};                         // d 512: 96 + 12 + 2*96 + 128 + 128 = 556 KB
}

// Two score tiles, Q and dO, K and V in both orientations, one or two gradients.
constexpr TileSize backward_tile(int head_dim) {
  if (head_dim <= 128) return {144, 128};  // 2*72 + 2*72 + 4*64 + 72 + 64 = 680 KB
  return {48, 64};                         // d 256: 2*12 + 2*48 + 4*64 + 2*64 = 504 KB
}

template <class T>
constexpr int round_up_lanes(int n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// One allocation for all workers, cut into equal 64-byte aligned parts.
template <class T>
class Scratch {
 public:
  Scratch(int64_t elements_a_worker, int workers)
      : stride_((elements_a_worker * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64),
        bytes_(static_cast<char*>(std::aligned_alloc(64, stride_ > 0 ? stride_ * workers : 64))) {
    if (bytes_ == nullptr) throw std::bad_alloc();
  }
  T* of(int64_t worker) const { return reinterpret_cast<T*>(bytes_.get() + worker * stride_); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t stride_;
  std::unique_ptr<char, Free> bytes_;
};

// Hands out consecutive pieces of one worker's scratch; every piece starts on a vector boundary.
template <class T>
class Arena {
 public:
  explicit Arena(T* base) : base_(base) {}
  T* take(int64_t elements) {
    T* piece = base_ + used_;
    used_ += (elements + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  T* base_;
  int64_t used_ = 0;
};

}  // namespace lcore::cpu::LCORE_ISA
