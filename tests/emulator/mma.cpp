// mma.sync: the last lane gathers both matrices from the fragments, multiplies, and deals the products out. Products
// are exact and added one after the other in float32; hardware adds them in groups with truncation.
#include "cuda/ptx/mma.h"

#include "block.h"
#include "numbers.h"
#include "warp.h"

namespace lcore::emulator {
namespace {

template <class Sum>
struct Fragments {
  uint32_t a[4], b[2];
  Sum d[4];
};

template <class Type, class Sum>
void multiply(const Lanes& lanes) {
  constexpr int kE = Type::kElements, kDepth = 8 * kE;
  Sum a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto fragments = lanes.get<Fragments<Sum>>(lane);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kE; ++e) {
      const int shift = 32 / kE * e;
      for (int r = 0; r < 4; ++r)
        a[g + 8 * (r % 2)][kE * t + e + 4 * kE * (r / 2)] = Type::value(fragments.a[r] >> shift);
      for (int r = 0; r < 2; ++r) b[kE * t + e + 4 * kE * r][g] = Type::value(fragments.b[r] >> shift);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto fragments = lanes.get<Fragments<Sum>>(lane);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      Sum sum = fragments.d[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      lanes.set(lane, sum, i);
    }
  }
}

template <class Type, class Sum>
void mma(const char* name, Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Sums {
    Sum d[4];
  };
  const Fragments<Sum> mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const auto sums = meet<Sums>(name, 0xffffffff, mine, multiply<Type, Sum>);
  for (int i = 0; i < 4; ++i) d[i] = sums.d[i];
}

}  // namespace
}  // namespace lcore::emulator

namespace lcore::cuda {

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<emulator::Bf16>("mma.sync bf16", d, a, b);
}
void mma_m16n8k16_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<emulator::Fp16>("mma.sync fp16", d, a, b);
}
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<emulator::Tf32>("mma.sync tf32", d, a, b);
}
void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<emulator::S8>("mma.sync s8", d, a, b);
}
void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma<emulator::E4m3>("mma.sync e4m3", d, a, b);
}

}  // namespace lcore::cuda
