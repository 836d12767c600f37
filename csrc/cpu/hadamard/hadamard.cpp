// Signed Hadamard transform (QuaRot, Ashkboos et al. 2024): y = H S x / sqrt(b) in blocks of b, the largest power of
// two that divides dim, with signs S fixed for all time; inverse S H y / sqrt(b). Outliers of a channel spread over all
// of them, and products of two transformed vectors stay what they were. Log2 b passes over a row in L1.
#include "core/hadamard.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr int64_t kBlock = 64;  // tokens an item: enough to pay for waking a thread

// The lowest bit of MurmurHash3's finalizer: signs that no Walsh function resembles.
bool is_negative(uint32_t channel) {
  uint32_t h = channel + 1;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return ((h ^ (h >> 16)) & 1u) != 0;
}

template <class T>
void transform(T* __restrict x, int dim, int block) {
  for (int half = 1; half < block; half *= 2) {
    for (int begin = 0; begin < dim; begin += 2 * half) {
      for (int i = begin; i < begin + half; ++i) {
        const T a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
}

template <class T>
void run(const HadamardParams& p, Executor& executor) {
  const int block = p.dim & -p.dim;
  std::vector<T> signs(p.dim);  // with the factor 1 / sqrt(b)
  for (int c = 0; c < p.dim; ++c) {
    const double factor = 1 / std::sqrt(static_cast<double>(block));
    signs[c] = static_cast<T>(is_negative(c) ? -factor : factor);
  }
  const Scratch scratch(bytes_of<T>(round_up_lanes<T>(p.dim)), executor.workers());
  const int64_t blocks = (p.seq + kBlock - 1) / kBlock;
  executor.run(p.batch * blocks, [&](int64_t item, int worker) {
    T* row = scratch.of<T>(worker);
    const int64_t batch = item / blocks, begin = item % blocks * kBlock;
    const auto sign = [&] {
      for (int c = 0; c < p.dim; ++c) row[c] *= signs[c];
    };
    for (int64_t i = begin; i < std::min(begin + kBlock, p.seq); ++i) {
      for (int64_t h = 0; h < p.heads; ++h) {
        with_type(p.x.data, p.type, [&](const auto* x) {
          load_row(x + batch * p.x.batch + i * p.x.seq + h * p.x.head, p.x.dim, row, p.dim);
        });
        if (!p.inverse) sign();
        transform(row, p.dim, block);
        if (p.inverse) sign();
        const int64_t offset = ((batch * p.seq + i) * p.heads + h) * p.dim;
        store_row(row, p.dim, static_cast<char*>(p.out) + offset * static_cast<int64_t>(size_of(p.type)), p.type);
      }
    }
  });
}

}  // namespace

void hadamard(const HadamardParams& p, Executor& executor) {
  if (p.dim == 0) return;
  if (p.type == DType::kFloat64) return run<double>(p, executor);
  return run<float>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
