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
#include "cpu/attention/block.h"
#include "cpu/attention/operands.h"
#include "cpu/attention/scores.h"
#include "cpu/attention/tile.h"
#include "cpu/kernels.h"
#include "cpu/masked_gemm.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class M>
struct Buffers {
  using In = typename M::In;
  using Out = typename M::Out;
  In* q;            // [rows][ld_q]: A of the scores
  In* dout;         // [rows][ld_dout]: A of dP
  In* q_panels;     // rows as steps: B of dK
  In* dout_panels;  // rows as steps: B of dV
  In* keys_t;       // keys as columns: B of the scores
  In* values_t;     // keys as columns: B of dP
  In* keys;         // keys as steps: B of dQ
  Out* weights;     // [rows][ld_scores]: scores, then P
  Out* dscores;     // [rows][ld_scores]: dP, then dS
  In* weights_t;    // A of dV, and of dK and dQ below: the tiles themselves where M widens, else pairs of rows
  In* dscores_t;    // [rows / 2][ld_scores], or of keys
  In* dscores_row;  // [rows][ld_scores / 2]
  Out* grad;        // [max(rows, keys)][ld_dim]: dQ or dK
  Out* grad_v;      // [keys][ld_dim_v]: dV
};

template <class M>
struct Plan {
  using In = typename M::In;
  using Out = typename M::Out;
  TileSize tile;
  int ld_q;
  int ld_dout;
  int ld_dim;
  int ld_dim_v;
  int ld_scores;

  explicit Plan(const AttentionParams& p)
      : tile(backward_tile(std::max(p.head_dim, p.head_dim_v))),
        ld_q(round_up_lanes<In>(div_up(p.head_dim, M::kPair))),
        ld_dout(round_up_lanes<In>(div_up(p.head_dim_v, M::kPair))),
        ld_dim(round_up_lanes<Out>(p.head_dim)),
        ld_dim_v(round_up_lanes<Out>(p.head_dim_v)),
        ld_scores(odd_lines<Out>(tile.keys)) {}

  Buffers<M> lay_out(const AttentionParams& p, Arena& arena) const {
    const int64_t rows = tile.rows, keys = tile.keys, pair = M::kPair;
    Buffers<M> b{};
    b.q = arena.take<In>(rows * ld_q);
    b.dout = arena.take<In>(rows * ld_dout);
    b.q_panels = arena.take<In>(rows / pair * ld_dim);
    b.dout_panels = arena.take<In>(rows / pair * ld_dim_v);
    b.keys_t = arena.take<In>(div_up(p.head_dim, M::kPair) * keys);
    b.values_t = arena.take<In>(div_up(p.head_dim_v, M::kPair) * keys);
    b.keys = arena.take<In>(keys / pair * ld_dim);
    b.weights = arena.take<Out>(rows * ld_scores);
    b.dscores = arena.take<Out>(rows * ld_scores);
    if constexpr (M::kPair == 1) {
      b.weights_t = b.weights;
      b.dscores_t = b.dscores_row = b.dscores;
    } else {
      b.weights_t = arena.take<In>(rows / pair * ld_scores);
      b.dscores_t = arena.take<In>(rows / pair * ld_scores);
      b.dscores_row = arena.take<In>(rows * ld_scores / pair);
    }
    b.grad = arena.take<Out>(std::max(rows, keys) * ld_dim);
    b.grad_v = arena.take<Out>(keys * ld_dim_v);
    return b;
  }
  int64_t scratch(const AttentionParams& p) const {
    Arena measure(nullptr);
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

// One row of scores and dP becomes P and dS in place; columns [0, keys_padded) outside the visible ones become 0.
template <class T>
void differentiate_row(const AttentionParams& p, const Sequence& s, int64_t row, int64_t key, Columns columns,
                       int keys_padded, T scale, const T* delta, T* weights, T* dscores) {
  const int64_t at = lse_index(p, s, row);
  const T lse = static_cast<const T*>(p.lse)[at];
  if (columns.empty() || lse == -kInfinity<T>) {
    std::fill(weights, weights + keys_padded, T{0});
    std::fill(dscores, dscores + keys_padded, T{0});
    return;
  }
  finish_scores(p, s, row, key, columns, scale, weights);
  const Columns span = vector_span<T>(columns);
  const T inverse_cap = p.softcap > 0 ? static_cast<T>(1.0 / p.softcap) : T{0};
  for (int c = span.begin; c < span.end; c += kLanes<T>) {
    const Vec<T> score = load(weights + c);
    const Vec<T> weight = exp(score - lse);
    Vec<T> dscore = weight * (load(dscores + c) - delta[at]);
    if (p.softcap > 0) {
      // The capped score is softcap * tanh; ALiBi is added after the cap and must not enter its slope.
      const Vec<T> capped = p.alibi_slopes == nullptr ? score : score + alibi<T>(p, s, row, key + c);
      const Vec<T> ratio = capped * inverse_cap;
      dscore *= T{1} - ratio * ratio;
    }
    store(weights + c, weight);
    store(dscores + c, dscore);
  }
  // Masked columns inside the first and last vector too: there dP may be anything, and the weight NaN where lse is.
  for (T* x : {weights, dscores}) {
    std::fill(x, x + columns.begin, T{0});
    std::fill(x + columns.end, x + keys_padded, T{0});
  }
}

// P and dS of the block, as the operands of the gradients' products.
template <class M>
void differentiate(const AttentionParams& p, const Plan<M>& plan, const Block& block, const typename M::Out* delta,
                   const Buffers<M>& b) {
  using Out = typename M::Out;
  multiply_by_columns<M>(p, block, {b.q, plan.ld_q, 1}, b.keys_t, div_up(p.head_dim, M::kPair), b.weights,
                         plan.ld_scores);
  multiply_by_columns<M>(p, block, {b.dout, plan.ld_dout, 1}, b.values_t, div_up(p.head_dim_v, M::kPair), b.dscores,
                         plan.ld_scores);
  const int padded = round_up_lanes<Out>(block.keys), ld = plan.ld_scores;
  const Out scale = M::kPair == 2 ? static_cast<Out>(p.softmax_scale) : Out{1};  // widened queries hold it already
  for (int r = 0; r < block.rows; ++r) {
    const Columns columns = visible_columns(p, block.s, block.row + r, block.key, block.keys);
    differentiate_row(p, block.s, block.row + r, block.key, columns, padded, scale, delta, b.weights + int64_t{r} * ld,
                      b.dscores + int64_t{r} * ld);
  }
  if constexpr (M::kPair == 2) {
    // An odd last row is paired with zeros.
    Out* const past[] = {b.weights + int64_t{block.rows} * ld, b.dscores + int64_t{block.rows} * ld};
    if (block.rows % 2 != 0) {
      for (Out* row : past) std::fill(row, row + padded, Out{0});
    }
    for (int r = 0; r < block.rows; r += 2) {
      for (int c = 0; c < padded; c += kLanes<Out>) {
        const int64_t at = int64_t{r} * ld + c;
        store(b.weights_t + r / 2 * ld + c, pair_up(load(b.weights + at), load(b.weights + at + ld)));
        store(b.dscores_t + r / 2 * ld + c, pair_up(load(b.dscores + at), load(b.dscores + at + ld)));
      }
    }
    for (int r = 0; r < block.rows; ++r) {
      for (int c = 0; c < padded; c += kLanes<Out>) {
        store_weights(b.dscores_row + (int64_t{r} * ld + c) / 2, load(b.dscores + int64_t{r} * ld + c));
      }
    }
  }
}

// out (keys x cols) += A^T B: A's pairs of rows lie in steps of ld, B's rows are steps of panels.
template <class M>
void add_over_rows(const AttentionParams& p, const Block& block, const typename M::In* a, int ld,
                   typename M::In* panels, typename M::Out* out, int cols) {
  const int depth = div_up(block.rows, M::kPair);
  if (block.whole) {
    gemm<M, Accumulate::kAdd>({a, 1, ld}, panels, depth, {0, depth}, out, cols, block.keys, cols);
  } else {
    gemm_masked<M, Accumulate::kAdd>({a, 1, ld}, panels, block.rows, all_finite(panels, int64_t{depth} * cols), out,
                                     cols, block.keys, cols,
                                     [&](int j, int count) { return block.rows_seeing(p, j, count); });
  }
}

// dq (rows x head_dim) += dS K.
template <class M>
void add_query_gradient(const AttentionParams& p, const Plan<M>& plan, const Block& block, const Buffers<M>& b,
                        typename M::Out* dq) {
  const int depth = div_up(block.keys, M::kPair), ld = plan.ld_dim;
  const MatrixA<typename M::In> dscores{b.dscores_row, plan.ld_scores / M::kPair, 1};
  if (block.whole) {
    gemm<M, Accumulate::kAdd>(dscores, b.keys, depth, {0, depth}, dq, ld, block.rows, ld);
  } else {
    gemm_masked<M, Accumulate::kAdd>(dscores, b.keys, block.keys, all_finite(b.keys, int64_t{depth} * ld), dq, ld,
                                     block.rows, ld, [&](int r, int count) { return block.keys_seen(p, r, count); });
  }
}

template <class M>
void load_rows_of(const AttentionGradParams& g, const Plan<M>& plan, const Sequence& s, int64_t row, int rows,
                  const Buffers<M>& b) {
  const AttentionParams& p = g.forward;
  using Out = typename M::Out;
  load_query_tile<M>(p.q, p.type, s, row, rows, p.head_dim, static_cast<Out>(p.softmax_scale), b.q, plan.ld_q);
  load_query_tile<M>(g.dout, p.type, s, row, rows, p.head_dim_v, Out{1}, b.dout, plan.ld_dout);
}

// K and V of a block as the products of the scores and of dQ want them.
template <class M>
void load_block(const AttentionParams& p, const Sequence& s, int64_t key, int keys, const Buffers<M>& b) {
  pack_keys_as_columns<M>(p, false, s, key, keys, b.keys_t);
  pack_keys_as_columns<M>(p, true, s, key, keys, b.values_t);
  pack_keys_as_rows<M>(p, false, s, key, keys, b.keys);
}

void* element(void* data, DType type, int64_t index) {
  return static_cast<char*>(data) + index * static_cast<int64_t>(size_of(type));
}

// One row of a gradient from its sums, times scale. + 0 makes -0 into 0: a sum that underflowed has the sign of its
// last term, which the mask may have left out.
template <class T>
void store_gradient(T* sums, int ld, T scale, int cols, void* data, DType type, int64_t index) {
  for (int c = 0; c < ld; c += kLanes<T>) store(sums + c, load(sums + c) * scale + T{0});
  store_row(sums, cols, element(data, type, index), type);
}

// dQ of rows [row, row + rows) from their sums over dS K.
template <class M>
void store_query_gradient(const AttentionGradParams& g, const Plan<M>& plan, const Sequence& s, int64_t row,
                          int64_t rows, typename M::Out* grad) {
  const AttentionParams& p = g.forward;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = s.q_begin + s.position(row + r);
    const int64_t token = p.cu_seqlens_q == nullptr ? s.batch * p.seq_q + at : at;
    const int64_t index = (token * p.heads + s.head(row + r)) * p.head_dim;
    store_gradient(grad + r * plan.ld_dim, plan.ld_dim, static_cast<typename M::Out>(p.softmax_scale), p.head_dim, g.dq,
                   p.type, index);
  }
}

template <class M>
void query_gradient(const AttentionGradParams& g, const Plan<M>& plan, const Item& item, const typename M::Out* delta,
                    const Buffers<M>& b) {
  const AttentionParams& p = g.forward;
  const Sequence& s = item.sequence;
  load_rows_of(g, plan, s, item.begin, item.count, b);
  std::fill(b.grad, b.grad + int64_t{item.count} * plan.ld_dim, typename M::Out{0});
  const KeyRange range = visible(p, s, item.begin, item.count);
  for (int64_t key = range.begin / plan.tile.keys * plan.tile.keys; key < range.end; key += plan.tile.keys) {
    const int keys = static_cast<int>(std::min<int64_t>(plan.tile.keys, s.k_len - key));
    load_block<M>(p, s, key, keys, b);
    const Block block(p, s, item.begin, item.count, key, keys);
    differentiate(p, plan, block, delta, b);
    add_query_gradient(p, plan, block, b, b.grad);
  }
  store_query_gradient(g, plan, s, item.begin, item.count, b.grad);
}

// dK and dV of a block of keys; with dq, [rows of the sequence][ld_dim], also adds the block's share of dQ to it.
template <class M>
void key_gradients(const AttentionGradParams& g, const Plan<M>& plan, const Item& item, const typename M::Out* delta,
                   const Buffers<M>& b, typename M::Out* dq = nullptr) {
  using Out = typename M::Out;
  const AttentionParams& p = g.forward;
  const Sequence& s = item.sequence;
  load_block<M>(p, s, item.begin, item.count, b);
  std::fill(b.grad, b.grad + int64_t{item.count} * plan.ld_dim, Out{0});
  std::fill(b.grad_v, b.grad_v + int64_t{item.count} * plan.ld_dim_v, Out{0});
  const RowRange seeing = seeing_rows(p, s, item.begin, item.count);
  for (int64_t row = seeing.begin; row < seeing.end; row += plan.tile.rows) {
    const int rows = static_cast<int>(std::min<int64_t>(plan.tile.rows, seeing.end - row));
    load_rows_of(g, plan, s, row, rows, b);
    pack_query_rows<M>(p.q, p.type, s, row, rows, p.head_dim, b.q_panels);
    pack_query_rows<M>(g.dout, p.type, s, row, rows, p.head_dim_v, b.dout_panels);
    const Block block(p, s, row, rows, item.begin, item.count);
    differentiate(p, plan, block, delta, b);
    add_over_rows<M>(p, block, b.weights_t, plan.ld_scores, b.dout_panels, b.grad_v, plan.ld_dim_v);
    add_over_rows<M>(p, block, b.dscores_t, plan.ld_scores, b.q_panels, b.grad, plan.ld_dim);
    if (dq != nullptr) add_query_gradient(p, plan, block, b, dq + row * plan.ld_dim);
  }
  for (int r = 0; r < item.count; ++r) {
    const int64_t at = s.k_begin + item.begin + r;
    const int64_t token = (p.cu_seqlens_k == nullptr ? s.batch * p.seq_k + at : at) * p.kv_heads + s.kv_head;
    store_gradient(b.grad + int64_t{r} * plan.ld_dim, plan.ld_dim, static_cast<Out>(p.softmax_scale), p.head_dim, g.dk,
                   p.type, token * p.head_dim);
    store_gradient(b.grad_v + int64_t{r} * plan.ld_dim_v, plan.ld_dim_v, Out{1}, p.head_dim_v, g.dv, p.type,
                   token * p.head_dim_v);
  }
}

// All gradients of one kv head of one sequence, keys in order; dq has room for its rows.
template <class M>
void head_gradients(const AttentionGradParams& g, const Plan<M>& plan, const Sequence& s, const typename M::Out* delta,
                    const Buffers<M>& b, typename M::Out* dq) {
  std::fill(dq, dq + s.rows() * plan.ld_dim, typename M::Out{0});
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

// delta_i = dO_i . O_i - dlse_i, shaped as lse; `rows` holds two rows of ld.
template <class T>
void row_deltas(const AttentionGradParams& g, const Item& item, int ld, T* delta, T* rows) {
  const AttentionParams& p = g.forward;
  const Sequence& s = item.sequence;
  const int64_t dense_batch = p.cu_seqlens_q == nullptr ? p.seq_q * p.heads * p.head_dim_v : 0;
  const Strided out{p.out, dense_batch, p.heads * p.head_dim_v, p.head_dim_v, 1};
  std::fill(rows, rows + 2 * ld, T{0});
  for (int r = 0; r < item.count; ++r) {
    load_query_tile<Widened<T>>(out, p.type, s, item.begin + r, 1, p.head_dim_v, T{1}, rows, ld);
    load_query_tile<Widened<T>>(g.dout, p.type, s, item.begin + r, 1, p.head_dim_v, T{1}, rows + ld, ld);
    Vec<T> sum{};
    for (int c = 0; c < ld; c += kLanes<T>) sum += load(rows + c) * load(rows + ld + c);
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

// Whether one pass over the keys suits: heads enough for the workers, and their dQ in float no more than all of dQ.
bool in_one_pass(const AttentionParams& p, int workers, int64_t longest) {
  const int64_t heads = p.batch * p.kv_heads;
  int64_t rows = 0;
  for (int64_t i = 0; i < heads; ++i) rows += sequence_of(p, i / p.kv_heads, i % p.kv_heads).rows();
  const bool balanced = heads >= 4 * workers || heads % workers == 0;
  return balanced && longest * std::min<int64_t>(workers, heads) <= rows;
}

template <class M>
void run(const AttentionGradParams& g, Executor& executor) {
  using Out = typename M::Out;
  const AttentionParams& p = g.forward;
  const Plan<M> plan(p);
  const Scratch scratch(plan.scratch(p), executor.workers());
  const int64_t lse_elements = p.cu_seqlens_q == nullptr ? p.batch * p.heads * p.seq_q : p.heads * p.seq_q;
  const Scratch deltas(bytes_of<Out>(lse_elements), 1);
  Out* delta = deltas.of<Out>(0);
  const auto for_each = [&](const std::vector<Item>& items, const auto& fn) {
    executor.run(static_cast<int64_t>(items.size()), [&](int64_t i, int worker) {
      Arena arena(scratch.of(worker));
      fn(items[i], plan.lay_out(p, arena));
    });
  };
  const std::vector<Item> rows = list_items(p, plan.tile.rows, false);
  for_each(rows, [&](const Item& item, const Buffers<M>& b) { row_deltas(g, item, plan.ld_dim_v, delta, b.grad_v); });
  const int64_t heads = p.batch * p.kv_heads;
  int64_t longest = 0;
  for (int64_t i = 0; i < heads; ++i) {
    longest = std::max(longest, sequence_of(p, i / p.kv_heads, i % p.kv_heads).rows());
  }
  if (in_one_pass(p, executor.workers(), longest)) {
    const Scratch dq(bytes_of<Out>(longest * plan.ld_dim), executor.workers());
    executor.run(heads, [&](int64_t i, int worker) {
      Arena arena(scratch.of(worker));
      head_gradients(g, plan, sequence_of(p, i / p.kv_heads, i % p.kv_heads), delta, plan.lay_out(p, arena),
                     dq.of<Out>(worker));
    });
  } else {
    for_each(rows, [&](const Item& item, const Buffers<M>& b) { query_gradient(g, plan, item, delta, b); });
    for_each(list_items(p, plan.tile.keys, true),
             [&](const Item& item, const Buffers<M>& b) { key_gradients(g, plan, item, delta, b); });
  }
  if (g.dsinks != nullptr) {
    executor.run(p.heads,
                 [&](int64_t head, int) { static_cast<Out*>(g.dsinks)[head] = sink_gradient(p, head, delta); });
  }
}

}  // namespace

void attention_backward(const AttentionGradParams& g, Executor& executor) {
  if (g.forward.type == DType::kFloat64) return run<Widened<double>>(g, executor);
  if constexpr (kHasBF16Pairs) {
    if (in_bfloat16(g.forward)) return run<BF16Pairs>(g, executor);
  }
  return run<Widened<float>>(g, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
