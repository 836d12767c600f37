// One token of linear attention with decay or of the gated delta rule (forward.cpp), the state updated where it lies:
// bound by reading and writing the state once. With beta, and with a, a head's state is read twice, the second time
// from cache.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/executor.h"
#include "core/linear_attention.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class T>
struct Buffers {
  T* q;      // [key_dim]
  T* k;      // [key_dim]
  T* decay;  // [key_dim]
  T* a;      // [key_dim]: with a
  T* b;      // [key_dim]
  T* v;      // [value_dim]
  T* found;  // [value_dim]: what the state holds under a
  T* out;    // [value_dim]

  Buffers(const LinearAttentionParams& p, Arena& arena) {
    for (T** row : {&q, &k, &decay, &a, &b}) *row = arena.take<T>(p.key_dim);
    for (T** row : {&v, &found, &out}) *row = arena.take<T>(p.value_dim);
  }
};

// y += a x, with one multiply-add an element.
template <class T>
void add_scaled(T a, const T* __restrict x, int n, T* __restrict y) {
  for (int c = 0; c < n; ++c) y[c] += a * x[c];
}

template <class T>
void load_token(const Strided& x, DType type, int64_t batch, int64_t head, int n, T* row) {
  with_type(x.data, type, [&](const auto* data) { load_row(data + batch * x.batch + head * x.head, x.dim, row, n); });
}

template <class T>
T load_number(const Strided& x, DType type, int64_t batch, int64_t head) {
  T number;
  load_token(x, type, batch, head, 1, &number);
  return number;
}

// Updates n and divides the output by max(|q^T n|, e^-m).
template <class T>
void normalize(const LinearAttentionParams& p, int64_t batch, int64_t head, T weight, const Buffers<T>& b, T* norm) {
  T sum{0};
  for (int d = 0; d < p.key_dim; ++d) {
    norm[d] = norm[d] * b.decay[d] + b.k[d] * weight;
    sum += b.q[d] * static_cast<T>(p.scale) * norm[d];
  }
  const T m = static_cast<const T*>(p.stabilizer)[batch * p.heads + head];
  const T divisor = std::max(std::abs(sum), std::max(std::exp(-m), std::numeric_limits<T>::min()));
  for (int c = 0; c < p.value_dim; ++c) b.out[c] /= divisor;
}

template <class T>
void run_head(const LinearAttentionParams& p, int64_t batch, int64_t head, const Buffers<T>& b, T* state, T* norm) {
  const int64_t qk_head = head * p.qk_heads / p.heads;
  load_token(p.q, p.type, batch, qk_head, p.key_dim, b.q);
  load_token(p.k, p.type, batch, qk_head, p.key_dim, b.k);
  load_token(p.v, p.type, batch, head, p.value_dim, b.v);
  load_token(p.g, p.g_type, batch, head, p.per_channel ? p.key_dim : 1, b.decay);
  if (!p.per_channel) std::fill(b.decay + 1, b.decay + p.key_dim, b.decay[0]);
  for (int d = 0; d < p.key_dim; ++d) b.decay[d] = std::exp(b.decay[d]);
  T weight{1};
  if (p.weight.data != nullptr) {
    weight = load_number<T>(p.weight, p.weight_type, batch, head);
    for (int c = 0; c < p.value_dim; ++c) b.v[c] *= weight;
  }
  if (p.beta.data != nullptr) {
    for (int d = 0; d < p.key_dim; ++d) {
      add_scaled(-b.k[d] * b.decay[d], state + int64_t{d} * p.value_dim, p.value_dim, b.v);
    }
    const T beta = load_number<T>(p.beta, p.beta_type, batch, head);
    for (int c = 0; c < p.value_dim; ++c) b.v[c] *= beta;
  }
  if (p.a.data != nullptr) {
    load_token(p.a, p.type, batch, head, p.key_dim, b.a);
    load_token(p.b, p.type, batch, head, p.key_dim, b.b);
    std::fill(b.found, b.found + p.value_dim, T{0});
    for (int d = 0; d < p.key_dim; ++d) add_scaled(b.a[d], state + int64_t{d} * p.value_dim, p.value_dim, b.found);
  }
  std::fill(b.out, b.out + p.value_dim, T{0});
  for (int d = 0; d < p.key_dim; ++d) {
    T* __restrict row = state + int64_t{d} * p.value_dim;
    const T decay = b.decay[d], key = b.k[d], query = b.q[d] * static_cast<T>(p.scale);
    T* __restrict out = b.out;
    const T* __restrict v = b.v;
    if (p.bonus != nullptr) {  // the state before the token, and its own key
      const T own = query * key * static_cast<const T*>(p.bonus)[head * p.key_dim + d];
      for (int c = 0; c < p.value_dim; ++c) {
        out[c] += query * row[c] + own * v[c];
        row[c] = row[c] * decay + key * v[c];
      }
      continue;
    }
    if (p.a.data != nullptr) {
      const T* __restrict found = b.found;
      const T other = b.b[d];
      for (int c = 0; c < p.value_dim; ++c) {
        const T s = row[c] * decay + (key * v[c] + other * found[c]);
        row[c] = s;
        out[c] += query * s;
      }
      continue;
    }
    for (int c = 0; c < p.value_dim; ++c) {
      const T s = row[c] * decay + key * v[c];
      row[c] = s;
      out[c] += query * s;
    }
  }
  if (p.stabilizer != nullptr) normalize(p, batch, head, weight, b, norm);
}

template <class T>
void run(const LinearAttentionStepParams& step, Executor& executor) {
  const LinearAttentionParams& p = step.token;
  Arena measure(nullptr);
  Buffers<T>(p, measure);
  const Scratch scratch(measure.used(), executor.workers());
  // Waking a thread costs as much as the states of a few heads.
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (int64_t{p.key_dim} * p.value_dim));
  executor.run(
      p.batch * p.heads,
      [&](int64_t item, int worker) {
        Arena arena(scratch.of(worker));
        const Buffers<T> b(p, arena);
        const int64_t batch = item / p.heads, head = item % p.heads;
        const int64_t slot = step.slots == nullptr ? batch : step.slots[batch];
        std::fill(b.out, b.out + p.value_dim, T{0});
        if (slot >= 0) {
          const int64_t at = (slot * p.heads + head) * p.key_dim;
          T* norm = p.stabilizer == nullptr ? nullptr : static_cast<T*>(step.norm) + at;
          run_head(p, batch, head, b, static_cast<T*>(step.state) + at * p.value_dim, norm);
        }
        const int64_t bytes = item * p.value_dim * static_cast<int64_t>(size_of(p.type));
        store_row(b.out, p.value_dim, static_cast<char*>(p.out) + bytes, p.type);
      },
      grain);
}

}  // namespace

void linear_attention_step(const LinearAttentionStepParams& p, Executor& executor) {
  if (p.token.type == DType::kFloat64) return run<double>(p, executor);
  return run<float>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
