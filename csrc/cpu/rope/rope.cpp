// Rotary position embedding (Su et al. 2021, RoFormer): each pair (x, y) of a head at position p turns by the angle
// p * inv_freq[m]:  x' = x cos - y sin,  y' = y cos + x sin, both times attention_scaling. Cosines and sines of a
// position (cpu/rope/turns.h) are made once and used by all its heads.
#include "core/rope.h"

#include <algorithm>

#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/rope/turns.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr int kBlock = 64;  // positions an item: enough to pay for waking a thread

template <class T>
void run(const RopeParams& p, Executor& executor) {
  const Turns<T> turns(p.rotation);
  const int padded = turns.padded();
  const Scratch scratch(bytes_of<T>(2 * padded + round_up_lanes<T>(p.head_dim)), executor.workers());
  const int64_t blocks = (p.seq + kBlock - 1) / kBlock;
  executor.run(p.batch * blocks, [&](int64_t item, int worker) {
    T* cosine = scratch.of<T>(worker);
    T* sine = cosine + padded;
    T* head = sine + padded;
    const int64_t batch = item / blocks;
    const int64_t begin = item % blocks * kBlock;
    for (int64_t i = begin; i < std::min(begin + kBlock, p.seq); ++i) {
      const int64_t at = batch * p.positions_batch + i * p.positions_seq;
      turns.fill(read_number(p.positions, p.positions_type, at), static_cast<T>(p.rotation.attention_scaling),
                 p.inverse ? T{-1} : T{1}, cosine, sine);
      for (int64_t h = 0; h < p.heads; ++h) {
        with_type(p.x.data, p.type, [&](const auto* x) {
          load_row(x + batch * p.x.batch + i * p.x.seq + h * p.x.head, p.x.dim, head, p.head_dim);
        });
        rotate(p.rotation, cosine, sine, head);
        const int64_t offset = ((batch * p.seq + i) * p.heads + h) * p.head_dim;
        store_row(head, p.head_dim, static_cast<char*>(p.out) + offset * static_cast<int64_t>(size_of(p.type)), p.type);
      }
    }
  });
}

}  // namespace

void rope(const RopeParams& p, Executor& executor) {
  if (p.type == DType::kFloat64) return run<double>(p, executor);
  return run<float>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
