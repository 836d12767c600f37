// Memory that a kernel works in: one allocation for all workers, cut into vector-aligned pieces.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

template <class T>
constexpr int round_up_lanes(int n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
constexpr int64_t bytes_of(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T));
}

// One allocation for all workers, cut into equal 64-byte aligned parts.
class Scratch {
 public:
  Scratch(int64_t bytes_a_worker, int workers)
      : stride_((bytes_a_worker + 63) / 64 * 64),
        bytes_(static_cast<char*>(std::aligned_alloc(64, stride_ > 0 ? stride_ * workers : 64))) {
    if (bytes_ == nullptr) throw std::bad_alloc();
  }
  template <class T = char>
  T* of(int64_t worker) const {
    return reinterpret_cast<T*>(bytes_.get() + worker * stride_);
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t stride_;
  std::unique_ptr<char, Free> bytes_;
};

// Hands out consecutive pieces of one worker's scratch; every piece starts on a cache line, which no vector outgrows.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t elements) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (bytes_of<T>(elements) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace lcore::cpu::LCORE_ISA
