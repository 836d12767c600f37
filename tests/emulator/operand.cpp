// Operands of wgmma in shared memory, and the arithmetic: products are exact and added one after the other in float32.
#include <cstring>
#include <memory>
#include <string>

#include "block.h"
#include "numbers.h"
#include "products.h"

namespace lcore::emulator {

using cuda::row_bytes;
using cuda::swizzled;

constexpr int kRows = 16;  // of m that a warp keeps
constexpr int kMaxN = 256;
constexpr int kChunk = 16;  // bytes
constexpr int kGroup = 8;   // rows of a swizzle's pattern, and elements of a 16-bit chunk

Operand decode(uint64_t descriptor, std::string& wrong) {
  const auto bytes = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const auto layout = static_cast<int>(descriptor >> 62);
  const Operand operand{bytes(0), bytes(16), bytes(32), static_cast<cuda::Swizzle>((4 - layout) % 4)};
  constexpr uint64_t kUsed = 0xc0003fff3fff3fff;
  if ((descriptor & ~kUsed) != 0) wrong = "the descriptor has bits outside its fields: the address has run over";
  if ((operand.start >> 7 & (static_cast<uint32_t>(row_bytes(operand.swizzle)) / kChunk - 1)) != 0) {
    wrong = "the operand does not begin in the first row of the swizzle's pattern";
  }
  return operand;
}

uint32_t Operand::k_major(int mn, int chunk) const {
  const uint32_t chunk_step = swizzle == cuda::Swizzle::kNone ? leading : kChunk;
  const auto row = static_cast<uint32_t>(mn % kGroup * row_bytes(swizzle)), group = static_cast<uint32_t>(mn / kGroup);
  return swizzled(swizzle, start + row + group * stride + static_cast<uint32_t>(chunk) * chunk_step);
}

uint32_t Operand::mn_major(int chunk, int k) const {
  const int chunks = row_bytes(swizzle) / kChunk;  // of a panel's row
  const bool plain = swizzle == cuda::Swizzle::kNone;
  const auto panel = static_cast<uint32_t>(chunk / chunks), group = static_cast<uint32_t>(k / kGroup);
  const auto inside = static_cast<uint32_t>(chunk % chunks * kChunk + k % kGroup * row_bytes(swizzle));
  return swizzled(swizzle, start + inside + panel * (plain ? stride : leading) + group * (plain ? leading : stride));
}

namespace {

template <class Type>
auto element(const std::byte* memory, int i) {
  constexpr size_t kBytes = 4 / Type::kElements;
  uint32_t bits = 0;
  std::memcpy(&bits, memory + static_cast<size_t>(i) * kBytes, kBytes);
  return Type::value(bits);
}

// out(mn, k, value) for `count` indices m or n from `first` on, and all k of a step.
template <class Type, class Out>
void read_operand(Block& block, const Operand& operand, cuda::Major major, int first, int count, const Out& out) {
  constexpr int kElements = 4 * Type::kElements;  // of a chunk
  const bool by_k = major == cuda::Major::kK;
  for (int i = 0; i < count; i += by_k ? 1 : kElements) {
    for (int j = 0; j < (by_k ? 2 : 2 * kElements); ++j) {
      const std::byte* chunk =
          block.shared_at(by_k ? operand.k_major(first + i, j) : operand.mn_major((first + i) / kElements, j));
      for (int e = 0; e < kElements; ++e) {
        const auto value = element<Type>(chunk, e);
        by_k ? out(i, j * kElements + e, value) : out(i + e, j, value);
      }
    }
  }
}

template <class Type, class Sum>
void multiply_as(Block& block, const Product& product, int warp) {
  constexpr int kE = Type::kElements, kDepth = 8 * kE;
  const Issued& issued = product.issued;
  struct Scratch {  // too large for a fiber's stack
    Sum a[kRows][kDepth], b[kDepth][kMaxN], sums[kRows][kMaxN];
  };
  const auto scratch = std::make_unique_for_overwrite<Scratch>();
  auto& [a, b, sums] = *scratch;
  std::string unused;
  if (issued.a_in_registers) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int r = 0; r < 4; ++r) {
        for (int e = 0; e < kE; ++e) {
          a[lane / 4 + 8 * (r % 2)][kE * (lane % 4) + e + 4 * kE * (r / 2)] =
              Type::value(product.a[warp][lane][r] >> 32 / kE * e);
        }
      }
    }
  } else {
    read_operand<Type>(block, decode(issued.a, unused), issued.a_major, kRows * warp, kRows,
                       [&](int m, int k, Sum value) { a[m][k] = value; });
  }
  read_operand<Type>(block, decode(issued.b, unused), issued.b_major, 0, issued.n,
                     [&](int n, int k, Sum value) { b[k][n] = value; });
  Accumulator& sum = *product.sums[warp];
  const auto deal = [&](auto&& move) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < sum.count; ++i) {
        move(sums[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2],
             sum.values[static_cast<size_t>(lane * sum.count + i)]);
      }
    }
  };
  deal([&](Sum& x, uint32_t bits) { x = issued.accumulate ? std::bit_cast<Sum>(bits) : Sum{0}; });
  for (int m = 0; m < kRows; ++m) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < issued.n; ++n) sums[m][n] += a[m][k] * b[k][n];
    }
  }
  deal([](Sum x, uint32_t& bits) { bits = std::bit_cast<uint32_t>(x); });
}

}  // namespace

void multiply(Block& block, const Product& product, int warp) {
  switch (product.issued.type) {
    case cuda::Product::kBf16:
      return multiply_as<Bf16, float>(block, product, warp);
    case cuda::Product::kFp16:
      return multiply_as<Fp16, float>(block, product, warp);
    case cuda::Product::kTf32:
      return multiply_as<Tf32, float>(block, product, warp);
    case cuda::Product::kE4m3:
      return multiply_as<E4m3, float>(block, product, warp);
    case cuda::Product::kS8:
      return multiply_as<S8, int32_t>(block, product, warp);
  }
}

}  // namespace lcore::emulator
