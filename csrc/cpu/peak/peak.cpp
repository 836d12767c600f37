// The machine's own ceilings, for benchmarks: fused multiply-adds that depend on nothing but registers, and a read of
// memory far larger than the caches. Each returns work done by all workers together a second.
#include <algorithm>
#include <chrono>
#include <vector>

#include "core/executor.h"
#include "cpu/arithmetic.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

// The best of `repeats`: anything else that runs only makes a ceiling lower.
template <class Body>
double best_rate(double work, Executor& executor, int repeats, const Body& body) {
  double best = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    executor.run(executor.workers(), body);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, work / seconds.count());
  }
  return best;
}

// Operations a second of the arithmetic's steps.
template <class M>
double peak_steps(Executor& executor, int repeats) {
  constexpr int kChains = 12;  // cover the latency of two units
  constexpr int64_t kSteps = 20'000'000;
  using In = typename M::In;
  std::vector<float> sinks(executor.workers() * kLanes<float>);
  const double work = 2.0 * M::kPair * kChains * kLanes<float> * kSteps * executor.workers();
  return best_rate(work, executor, repeats, [&](int64_t item, int) {
    Vec<float> acc[kChains];
    for (int i = 0; i < kChains; ++i) {
      acc[i] = splat(static_cast<float>(i));
      __asm__ volatile("" : "+x"(acc[i]));  // chains that the compiler could prove equal would become one
    }
    Vec<In> factor = splat(M::kPair == 2 ? static_cast<In>(0x3f7f3f7f) : static_cast<In>(0.999f));  // just below 1
    for (int64_t step = 0; step < kSteps; ++step) {
      __asm__ volatile("" : "+x"(factor));  // unknown to the compiler, so that the loop is not folded
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = M::step(factor, factor, acc[i]);
    }
    Vec<float> total{};
    for (const Vec<float>& a : acc) total += a;
    store(sinks.data() + item * kLanes<float>, total);
  });
}

}  // namespace

double peak_fma(Executor& executor, int repeats) { return peak_steps<Widened<float>>(executor, repeats); }

double peak_dot(Executor& executor, int repeats) {
  if constexpr (!kHasBF16Pairs) return 0;
  return peak_steps<BF16Pairs>(executor, repeats);
}

// Bytes read a second, from 256 MB a worker.
double peak_read(Executor& executor, int repeats) {
  constexpr int64_t kFloats = int64_t{64} << 20;
  const Scratch memory(bytes_of<float>(kFloats), executor.workers());
  for (int worker = 0; worker < executor.workers(); ++worker) {
    std::fill_n(memory.of<float>(worker), kFloats, 1.0f);
  }
  std::vector<float> sinks(executor.workers() * kLanes<float>);
  return best_rate(4.0 * kFloats * executor.workers(), executor, repeats, [&](int64_t item, int) {
    const float* data = memory.of<float>(item);
    Vec<float> total[4] = {};
    for (int64_t i = 0; i < kFloats; i += 4 * kLanes<float>) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) total[j] += load(data + i + j * kLanes<float>);
    }
    store(sinks.data() + item * kLanes<float>, total[0] + total[1] + total[2] + total[3]);
  });
}

}  // namespace lcore::cpu::LCORE_ISA
