// Collectives of a warp: each lane leaves its operands, the last to arrive computes for all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lcore::emulator {

// The lanes of `mask` as the last of them sees them.
struct Lanes {
  uint32_t mask;
  std::byte* in[32];
  std::byte* out[32];

  template <class T>
  T get(int lane, int i = 0) const {
    T value;
    std::memcpy(&value, in[lane] + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void set(int lane, T value, int i = 0) const {
    std::memcpy(out[lane] + i * sizeof(T), &value, sizeof(T));
  }
};

using Combine = void (*)(const Lanes&);

// in and out: at most 64 bytes. `what` is a string literal and tells collectives apart.
void meet(const char* what, uint32_t mask, const void* in, size_t in_bytes, void* out, size_t out_bytes,
          Combine combine);

template <class Out, class In>
Out meet(const char* what, uint32_t mask, const In& in, Combine combine) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64 && std::is_trivially_copyable_v<In>);
  Out out;
  meet(what, mask, &in, sizeof in, &out, sizeof out, combine);
  return out;
}

}  // namespace lcore::emulator
