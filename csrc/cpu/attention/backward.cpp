// Attention backward (Dao et al. 2022, FlashAttention, Algorithm 4), with the gradient of lse and of the sinks:
//   P = exp(score - lse), dP = dO V^T, dS = P (dP - delta) with delta_i = dO_i . O_i - dlse_i,
//   dQ = dS K * scale, dK = dS^T Q * scale, dV = P^T dO, dsink_h = - sum_i exp(sink_h - lse_i) delta_i.
// Two schedules with the same bits, without atomics. Where there are kv heads enough for the workers, one item is a
// (sequence, kv head): it walks over the keys and keeps a float dQ of all its rows beside it, five products. Else two
// passes recompute the scores, one over tiles of queries for dQ, one over blocks of keys for dK and dV: seven products,
// but a single long sequence uses every core. Either way dQ adds up over blocks of keys in order, dK and dV over rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/executor.h"
#include "cpu/attention/scores.h"
#include "cpu/attention/tile.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

// What a worker may hold of dQ in the one-pass schedule: 65536 rows of head_dim 128.
constexpr int64_t kMostQueryGradientBytes = int64_t{32} << 20;

template <class T>
struct Buffers {
  T* q;         // [rows][ld_dim], scaled
  T* dout;      // [rows][ld_dim_v]
  T* keys_t;    // [head_dim][keys]
  T* values_t;  // [head_dim_v][keys]
  T* keys;      // [keys][ld_dim]
  T* values;    // [keys][ld_dim_v]
  T* weights;   // [rows][keys]: scores, then P
  T* dscores;   // [rows][keys]: dP, then dS
  T* grad;      // [max(rows, keys)][ld_dim]: dQ or dK
  T* grad_v;    // [keys][ld_dim_v]: dV
};

template <class T>
struct Plan {
  TileSize tile;
  int ld_dim;
  int ld_dim_v;

  explicit Plan(const AttentionParams& p)
      : tile(backward_tile(std::max(p.head_dim, p.head_dim_v))),
        ld_dim(round_up_lanes<T>(p.head_dim)),
        ld_dim_v(round_up_lanes<T>(p.head_dim_v)) {}

  Buffers<T> lay_out(const AttentionParams& p, Arena<T>& arena) const {
    const int64_t rows = tile.rows, keys = tile.keys;
    Buffers<T> b{};
    b.q = arena.take(rows * ld_dim);
    b.dout = arena.take(rows * ld_dim_v);
    b.keys_t = arena.take(p.head_dim * keys);
    b.values_t = arena.take(p.head_dim_v * keys);
    b.keys = arena.take(keys * ld_dim);
    b.values = arena.take(keys * ld_dim_v);
    b.weights = arena.take(rows * keys);
    b.dscores = arena.take(rows * keys);
    b.grad = arena.take(std::max(rows, keys) * ld_dim);
    b.grad_v = arena.take(keys * ld_dim_v);
    return b;
  }
  int64_t scratch(const AttentionParams& p) const {
    Arena<T> measure(nullptr);
    lay_out(p, measure);
    return measure.used();
  }
};

// One tile of rows, or one block of keys, of one kv head.
struct Item {
  Sequence sequence;
  int64_t begin;
  int count;
  int64_t cost;
};

int64_t lse_index(const AttentionParams& p, const Sequence& s, int64_t row) {
  return s.batch * p.lse_batch + s.head(row) * p.lse_head + s.q_begin + s.position(row);
}

// One row of scores and dP becomes P and dS in place.
template <class T>
void differentiate_row(const AttentionParams& p, const Sequence& s, int64_t row, int64_t key, int keys, int keys_padded,
                       const T* delta, T* weights, T* dscores) {
  const Columns columns = visible_columns(p, s, row, key, keys);
  const int64_t at = lse_index(p, s, row);
  const T lse = static_cast<const T*>(p.lse)[at];
  if (columns.empty() || lse == -kInfinity<T>) {
    std::fill(weights, weights + keys_padded, T{0});
    std::fill(dscores, dscores + keys_padded, T{0});
    return;
  }
  finish_scores(p, s, row, key, columns, weights);
  const Columns span = vector_span<T>(columns);
  const T inverse_cap = p.softcap > 0 ? static_cast<T>(1.0 / p.softcap) : T{0};
  for (int c = span.begin; c < span.end; c += kLanes<T>) {
    const Vec<T> score = load(weights + c);
    const Vec<T> weight = exp(score - lse);
    Vec<T> dscore = weight * (load(dscores + c) - delta[at]);
    if (p.softcap > 0) {
      // The capped score is softcap * tanh; ALiBi is added after the cap and must not enter its slope.
      Vec<T> ratio = score * inverse_cap;
      if (p.alibi_slopes != nullptr) {
        const T slope = p.alibi_slopes[s.batch * p.alibi_batch + s.head(row)];
        const int64_t distance = s.position(row) + s.k_len - s.q_len - key - c;
        for (int i = 0; i < kLanes<T>; ++i) ratio[i] += slope * std::abs(static_cast<T>(distance - i)) * inverse_cap;
      }
      dscore *= T{1} - ratio * ratio;
    }
    store(weights + c, weight);
    store(dscores + c, dscore);
  }
  const auto clear = [](T* x, int begin, int end) { std::fill(x + begin, x + end, T{0}); };
  clear(weights, 0, span.begin);
  clear(weights, span.end, keys_padded);
  // Masked columns inside the first and last vector: their weight is 0, but dP may be anything.
  clear(dscores, 0, columns.begin);
  clear(dscores, columns.end, keys_padded);
}

// P and dS of rows [row, row + rows) against the block of keys that b.keys_t and b.values_t hold.
template <class T>
void differentiate(const AttentionParams& p, const Plan<T>& plan, const Sequence& s, int64_t row, int rows, int64_t key,
                   int keys, const T* delta, const Buffers<T>& b) {
  const int padded = round_up_lanes<T>(keys);
  gemm<T, Accumulate::kOverwrite>({b.q, plan.ld_dim, 1}, b.keys_t, padded, b.weights, padded, rows, padded, p.head_dim);
  gemm<T, Accumulate::kOverwrite>({b.dout, plan.ld_dim_v, 1}, b.values_t, padded, b.dscores, padded, rows, padded,
                                  p.head_dim_v);
  for (int r = 0; r < rows; ++r) {
    differentiate_row(p, s, row + r, key, keys, padded, delta, b.weights + int64_t{r} * padded,
                      b.dscores + int64_t{r} * padded);
  }
}

template <class T>
void load_rows_of(const AttentionGradParams& g, const Plan<T>& plan, const Sequence& s, int64_t row, int rows,
                  const Buffers<T>& b) {
  const AttentionParams& p = g.forward;
  load_query_tile(p.q, p.type, s, row, rows, p.head_dim, static_cast<T>(p.softmax_scale), b.q, plan.ld_dim);
  load_query_tile(g.dout, p.type, s, row, rows, p.head_dim_v, T{1}, b.dout, plan.ld_dim_v);
}

// K and V of a block, in both orientations.
template <class T>
void load_block(const AttentionParams& p, const Plan<T>& plan, const Sequence& s, int64_t key, int keys,
                const Buffers<T>& b) {
  const int padded = round_up_lanes<T>(keys);
  load_keys_transposed(p, false, s, key, keys, b.keys, plan.ld_dim, b.keys_t, padded);
  load_keys_transposed(p, true, s, key, keys, b.values, plan.ld_dim_v, b.values_t, padded);
}

void* element(void* data, DType type, int64_t index) {
  return static_cast<char*>(data) + index * static_cast<int64_t>(size_of(type));
}

// dQ of rows [row, row + rows) from their sums over dS K.
template <class T>
void store_query_gradient(const AttentionGradParams& g, const Plan<T>& plan, const Sequence& s, int64_t row,
                          int64_t rows, T* grad) {
  const AttentionParams& p = g.forward;
  const T scale = static_cast<T>(p.softmax_scale);
  for (int64_t r = 0; r < rows; ++r) {
    T* sums = grad + r * plan.ld_dim;
    for (int c = 0; c < plan.ld_dim; c += kLanes<T>) store(sums + c, load(sums + c) * scale);
    const int64_t at = s.q_begin + s.position(row + r);
    const int64_t token = p.cu_seqlens_q == nullptr ? s.batch * p.seq_q + at : at;
    const int64_t index = (token * p.heads + s.head(row + r)) * p.head_dim;
    store_row(sums, p.head_dim, element(g.dq, p.type, index), p.type);
  }
}

template <class T>
void query_gradient(const AttentionGradParams& g, const Plan<T>& plan, const Item& item, const T* delta,
                    const Buffers<T>& b) {
  const AttentionParams& p = g.forward;
  const Sequence& s = item.sequence;
  load_rows_of(g, plan, s, item.begin, item.count, b);
  std::fill(b.grad, b.grad + int64_t{item.count} * plan.ld_dim, T{0});
  const KeyRange range = visible(p, s, item.begin, item.count);
  for (int64_t key = range.begin / plan.tile.keys * plan.tile.keys; key < range.end; key += plan.tile.keys) {
    const int keys = static_cast<int>(std::min<int64_t>(plan.tile.keys, s.k_len - key));
    load_block(p, plan, s, key, keys, b);
    differentiate(p, plan, s, item.begin, item.count, key, keys, delta, b);
    gemm<T, Accumulate::kAdd>({b.dscores, round_up_lanes<T>(keys), 1}, b.keys, plan.ld_dim, b.grad, plan.ld_dim,
                              item.count, plan.ld_dim, keys);
  }
  store_query_gradient(g, plan, s, item.begin, item.count, b.grad);
}

// dK and dV of a block of keys; with dq, [rows of the sequence][ld_dim], also adds the block's share of dQ to it.
template <class T>
void key_gradients(const AttentionGradParams& g, const Plan<T>& plan, const Item& item, const T* delta,
                   const Buffers<T>& b, T* dq = nullptr) {
  const AttentionParams& p = g.forward;
  const Sequence& s = item.sequence;
  const int padded = round_up_lanes<T>(item.count);
  load_block(p, plan, s, item.begin, item.count, b);
  std::fill(b.grad, b.grad + int64_t{item.count} * plan.ld_dim, T{0});
  std::fill(b.grad_v, b.grad_v + int64_t{item.count} * plan.ld_dim_v, T{0});
  const RowRange seeing = seeing_rows(p, s, item.begin, item.count);
  for (int64_t row = seeing.begin; row < seeing.end; row += plan.tile.rows) {
    const int rows = static_cast<int>(std::min<int64_t>(plan.tile.rows, seeing.end - row));
    load_rows_of(g, plan, s, row, rows, b);
    differentiate(p, plan, s, row, rows, item.begin, item.count, delta, b);
    gemm<T, Accumulate::kAdd>({b.weights, 1, padded}, b.dout, plan.ld_dim_v, b.grad_v, plan.ld_dim_v, item.count,
                              plan.ld_dim_v, rows);
    gemm<T, Accumulate::kAdd>({b.dscores, 1, padded}, b.q, plan.ld_dim, b.grad, plan.ld_dim, item.count, plan.ld_dim,
                              rows);
    if (dq != nullptr) {
      gemm<T, Accumulate::kAdd>({b.dscores, padded, 1}, b.keys, plan.ld_dim, dq + row * plan.ld_dim, plan.ld_dim, rows,
                                plan.ld_dim, item.count);
    }
  }
  for (int r = 0; r < item.count; ++r) {
    const int64_t at = s.k_begin + item.begin + r;
    const int64_t token = (p.cu_seqlens_k == nullptr ? s.batch * p.seq_k + at : at) * p.kv_heads + s.kv_head;
    store_row(b.grad + int64_t{r} * plan.ld_dim, p.head_dim, element(g.dk, p.type, token * p.head_dim), p.type);
    store_row(b.grad_v + int64_t{r} * plan.ld_dim_v, p.head_dim_v, element(g.dv, p.type, token * p.head_dim_v), p.type);
  }
}

// All gradients of one kv head of one sequence, keys in order; dq has room for its rows.
template <class T>
void head_gradients(const AttentionGradParams& g, const Plan<T>& plan, const Sequence& s, const T* delta,
                    const Buffers<T>& b, T* dq) {
  std::fill(dq, dq + s.rows() * plan.ld_dim, T{0});
  for (int64_t key = 0; key < s.k_len; key += plan.tile.keys) {
    const int count = static_cast<int>(std::min<int64_t>(plan.tile.keys, s.k_len - key));
    key_gradients(g, plan, {s, key, count, 0}, delta, b, dq);
  }
  store_query_gradient(g, plan, s, 0, s.rows(), dq);
}

std::vector<Item> list_items(const AttentionParams& p, int size, bool keys) {
  std::vector<Item> items;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const Sequence s = sequence_of(p, batch, head);
      const int64_t total = keys ? s.k_len : s.rows();
      for (int64_t begin = 0; begin < total; begin += size) {
        const int count = static_cast<int>(std::min<int64_t>(size, total - begin));
        const auto length = [](const auto& range) { return std::max<int64_t>(range.end - range.begin, 0); };
        const int64_t other =
            keys ? length(seeing_rows(p, s, begin, count)) : length(visible(p, s, begin, int64_t{count}));
        items.push_back({s, begin, count, other * count});
      }
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return items;
}

// delta_i = dO_i . O_i - dlse_i, shaped as lse.
template <class T>
void row_deltas(const AttentionGradParams& g, const Plan<T>& plan, const Item& item, T* delta, const Buffers<T>& b) {
  const AttentionParams& p = g.forward;
  const Sequence& s = item.sequence;
  const int64_t dense_batch = p.cu_seqlens_q == nullptr ? p.seq_q * p.heads * p.head_dim_v : 0;
  const Strided out{p.out, dense_batch, p.heads * p.head_dim_v, p.head_dim_v, 1};
  const int ld = plan.ld_dim_v;
  load_query_tile(out, p.type, s, item.begin, item.count, p.head_dim_v, T{1}, b.values, ld);
  load_query_tile(g.dout, p.type, s, item.begin, item.count, p.head_dim_v, T{1}, b.dout, ld);
  for (int r = 0; r < item.count; ++r) {
    Vec<T> sum{};
    for (int c = 0; c < ld; c += kLanes<T>) sum += load(b.values + r * ld + c) * load(b.dout + r * ld + c);
    const int64_t at = lse_index(p, s, item.begin + r);
    delta[at] = reduce_add<T>(sum) - (g.dlse == nullptr ? T{0} : static_cast<const T*>(g.dlse)[at]);
  }
}

template <class T>
T sink_gradient(const AttentionParams& p, int64_t head, const T* delta) {
  const T sink = static_cast<const T*>(p.sinks)[head];
  double gradient = 0;  // one number for all rows of a head: float would lose what few rows add
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const Sequence s = sequence_of(p, batch, 0);
    for (int64_t i = 0; i < s.q_len; ++i) {
      const int64_t at = batch * p.lse_batch + head * p.lse_head + s.q_begin + i;
      const T lse = static_cast<const T*>(p.lse)[at];
      // An infinite sink holds all the mass itself; a sink of -inf holds none, also where nothing else stands.
      const T weight = sink == -kInfinity<T> ? T{0} : (sink == lse ? T{1} : std::exp(sink - lse));
      gradient -= static_cast<double>(weight) * delta[at];
    }
  }
  return static_cast<T>(gradient);
}

template <class T>
void run(const AttentionGradParams& g, Executor& executor) {
  const AttentionParams& p = g.forward;
  const Plan<T> plan(p);
  const Scratch<T> scratch(plan.scratch(p), executor.workers());
  const int64_t lse_elements = p.cu_seqlens_q == nullptr ? p.batch * p.heads * p.seq_q : p.heads * p.seq_q;
  const Scratch<T> deltas(lse_elements, 1);
  T* delta = deltas.of(0);
  const auto for_each = [&](const std::vector<Item>& items, const auto& fn) {
    executor.run(static_cast<int64_t>(items.size()), [&](int64_t i, int worker) {
      Arena<T> arena(scratch.of(worker));
      fn(items[i], plan.lay_out(p, arena));
    });
  };
  // The rows' outputs share the buffer of a block's values.
  const std::vector<Item> rows = list_items(p, std::min(plan.tile.rows, plan.tile.keys), false);
  for_each(rows, [&](const Item& item, const Buffers<T>& b) { row_deltas(g, plan, item, delta, b); });
  const int64_t heads = p.batch * p.kv_heads;
  int64_t longest = 0;
  for (int64_t i = 0; i < heads; ++i)
    longest = std::max(longest, sequence_of(p, i / p.kv_heads, i % p.kv_heads).rows());
  const int64_t dq_elements = longest * plan.ld_dim;
  const bool balanced = heads >= 4 * executor.workers() || heads % executor.workers() == 0;
  if (balanced && dq_elements * static_cast<int64_t>(sizeof(T)) <= kMostQueryGradientBytes) {
    const Scratch<T> dq(dq_elements, executor.workers());
    executor.run(heads, [&](int64_t i, int worker) {
      Arena<T> arena(scratch.of(worker));
      head_gradients(g, plan, sequence_of(p, i / p.kv_heads, i % p.kv_heads), delta, plan.lay_out(p, arena),
                     dq.of(worker));
    });
  } else {
    for_each(rows, [&](const Item& item, const Buffers<T>& b) { query_gradient(g, plan, item, delta, b); });
    for_each(list_items(p, plan.tile.keys, true),
             [&](const Item& item, const Buffers<T>& b) { key_gradients(g, plan, item, delta, b); });
  }
  if (g.dsinks != nullptr) {
    executor.run(p.heads, [&](int64_t head, int) { static_cast<T*>(g.dsinks)[head] = sink_gradient(p, head, delta); });
  }
}

}  // namespace

void attention_backward(const AttentionGradParams& g, Executor& executor) {
  if (g.forward.type == DType::kFloat64) return run<double>(g, executor);
  return run<float>(g, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
