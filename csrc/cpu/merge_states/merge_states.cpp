// Merging two attention states over disjoint keys:
//   lse = ln(e^lse_a + e^lse_b),  out = w_a out_a + w_b out_b  with  w_x = e^(lse_x - lse);
//   dout_x = w_x dout,  dlse_x = w_x (dout . (out_x - out) + dlse).
// (0, -inf) is neutral on both sides, also against itself. Source: Dao et al. 2023 (Flash-Decoding), FlashInfer.
#include "core/merge_states.h"

#include <algorithm>
#include <cmath>

#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr int64_t kRows = 64;  // rows an item: enough to pay for waking a thread

template <class T>
struct Weights {
  T a;
  T b;
  T lse;
};

template <class T>
Weights<T> weigh(T lse_a, T lse_b) {
  if (std::isnan(lse_a) || std::isnan(lse_b)) {
    const T nan = lse_a + lse_b;
    return {nan, nan, nan};
  }
  const T top = std::max(lse_a, lse_b);
  if (top == -kInfinity<T>) return {T{0}, T{0}, top};
  // An infinite lse (a sink of +inf) takes everything; two of them share it.
  const T a = lse_a == top ? T{1} : std::exp(lse_a - top);
  const T b = lse_b == top ? T{1} : std::exp(lse_b - top);
  return {a / (a + b), b / (a + b), top + std::log(a + b)};
}

const char* at(const void* data, DType type, int64_t index) {
  return static_cast<const char*>(data) + index * static_cast<int64_t>(size_of(type));
}
char* at(void* data, DType type, int64_t index) {
  return static_cast<char*>(data) + index * static_cast<int64_t>(size_of(type));
}

// Calls fn(row, index into lse, worker) for every (batch, seq, head) row.
template <class Fn>
void for_each_row(const MergeParams& p, Executor& executor, const Fn& fn) {
  const int64_t rows = p.batch * p.seq * p.heads;
  executor.run((rows + kRows - 1) / kRows, [&](int64_t item, int worker) {
    for (int64_t row = item * kRows; row < std::min(rows, (item + 1) * kRows); ++row) {
      const int64_t head = row % p.heads, seq = row / p.heads % p.seq, batch = row / p.heads / p.seq;
      fn(row, (batch * p.heads + head) * p.seq + seq, worker);
    }
  });
}

template <class T>
void merge(const MergeParams& p, Executor& executor) {
  const int ld = round_up_lanes<T>(static_cast<int>(p.head_dim));
  const int dim = static_cast<int>(p.head_dim);
  const Scratch scratch(bytes_of<T>(2 * ld), executor.workers());
  for_each_row(p, executor, [&](int64_t row, int64_t i, int worker) {
    T* a = scratch.of<T>(worker);
    T* b = a + ld;
    load_rows(RowsIn{at(p.out_a, p.type, row * dim), p.type, dim, 1}, 1, dim, a, ld);
    load_rows(RowsIn{at(p.out_b, p.type, row * dim), p.type, dim, 1}, 1, dim, b, ld);
    const Weights<T> w = weigh(static_cast<const T*>(p.lse_a)[i], static_cast<const T*>(p.lse_b)[i]);
    for (int c = 0; c < ld; c += kLanes<T>) store(a + c, load(a + c) * w.a + load(b + c) * w.b);
    store_row(a, dim, at(p.out, p.type, row * dim), p.type);
    static_cast<T*>(p.lse)[i] = w.lse;
  });
}

template <class T>
void merge_gradients(const MergeGradParams& g, Executor& executor) {
  const MergeParams& p = g.forward;
  const int ld = round_up_lanes<T>(static_cast<int>(p.head_dim));
  const int dim = static_cast<int>(p.head_dim);
  const Scratch scratch(bytes_of<T>(4 * ld), executor.workers());
  for_each_row(p, executor, [&](int64_t row, int64_t i, int worker) {
    T* dout = scratch.of<T>(worker);
    T* a = dout + ld;
    T* b = a + ld;
    T* grad = b + ld;
    const auto read = [&](const void* data, T* to) {
      load_rows(RowsIn{at(data, p.type, row * dim), p.type, dim, 1}, 1, dim, to, ld);
    };
    read(g.dout, dout);
    read(p.out_a, a);
    read(p.out_b, b);
    const Weights<T> w = weigh(static_cast<const T*>(p.lse_a)[i], static_cast<const T*>(p.lse_b)[i]);
    // out_a - out = w_b (out_a - out_b): no cancellation against a rounded output.
    Vec<T> gap{};
    for (int c = 0; c < ld; c += kLanes<T>) gap += load(dout + c) * (load(a + c) - load(b + c));
    const T difference = w.a * w.b == T{0} ? T{0} : w.a * w.b * reduce_add<T>(gap);
    const T dlse = static_cast<const T*>(g.dlse)[i];
    static_cast<T*>(g.dlse_a)[i] = difference + w.a * dlse;
    static_cast<T*>(g.dlse_b)[i] = w.b * dlse - difference;
    const auto write = [&](T weight, void* to) {
      for (int c = 0; c < ld; c += kLanes<T>) store(grad + c, load(dout + c) * weight);
      store_row(grad, dim, at(to, p.type, row * dim), p.type);
    };
    write(w.a, g.dout_a);
    write(w.b, g.dout_b);
  });
}

}  // namespace

void merge_states(const MergeParams& p, Executor& executor) {
  if (p.type == DType::kFloat64) return merge<double>(p, executor);
  return merge<float>(p, executor);
}

void merge_states_backward(const MergeGradParams& g, Executor& executor) {
  if (g.forward.type == DType::kFloat64) return merge_gradients<double>(g, executor);
  return merge_gradients<float>(g, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
