// Gradients of linear attention with decay and of the gated delta rule (forward.cpp). One item is a head of a sequence
// (or some that share q and k): states before each chunk are computed again, then chunks go from right to left with dS,
// the gradient of the state behind them. In a chunk, with G = dO and all decays as in the forward:
//   dV = lower(scores)^T G + K_out dS,  dscores = lower(G V^T),  dQ = G S^T + dscores K,  dK = V dS^T + dscores^T Q,
//   dS <- decay dS + Q_in^T G.
// The delta rule solved (I + L) V = beta R with R = V0 - K_in S, so Y = (I + L)^-T dV, dbeta R = Y, dL = -lower(Y V^T).
// A token's log-decay receives what crosses it: pairs on both sides of it, and what enters or leaves the chunk past it.
// States are kept for 64 chunks at a time, and one for each 64 chunks before: 64 + length / 4096 of them.
#include <utility>

#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/linear_attention/gradients.h"
#include "cpu/linear_attention/state.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class T, bool kChannel>
class HeadGradients {
  using M = Widened<T>;

 public:
  HeadGradients(const LinearAttentionGradParams& grads, const LinearItem& head, GradientTiles<T, kChannel>& buffers)
      : g_(grads), p_(grads.forward), item_(head), b_(buffers), chunk_(buffers.chunk) {}

  void run() {
    const int64_t chunks = item_.chunks(), segments = (chunks + kSegment - 1) / kSegment;
    first_state(p_, item_, b_.state);
    for (int64_t s = 0; s < segments; ++s) {
      std::copy(b_.state, b_.state + b_.state_size, b_.segments + s * b_.state_size);
      if (s + 1 == segments) break;
      for (int64_t c = s * kSegment; c < (s + 1) * kSegment; ++c) step_right(c);
    }
    start_dstate();
    std::fill(b_.dbonus, b_.dbonus + chunk_.ld, T{0});
    std::fill(b_.dskip, b_.dskip + chunk_.ld_v, T{0});
    for (int64_t s = segments - 1; s >= 0; --s) {
      const int64_t first = s * kSegment, last = std::min(first + kSegment, chunks);
      std::copy(b_.segments + s * b_.state_size, b_.segments + (s + 1) * b_.state_size, b_.state);
      for (int64_t c = first; c < last; ++c) {
        std::copy(b_.state, b_.state + b_.state_size, b_.states + (c - first) * b_.state_size);
        if (c + 1 < last) step_right(c);
      }
      for (int64_t c = last - 1; c >= first; --c) step_left(c, b_.states + (c - first) * b_.state_size);
    }
    const int64_t head = item_.sequence * p_.heads + item_.head;
    if (g_.dbonus != nullptr) {
      std::copy(b_.dbonus, b_.dbonus + p_.key_dim, static_cast<T*>(g_.dbonus) + head * p_.key_dim);
    }
    if (g_.dskip != nullptr) {
      std::copy(b_.dskip, b_.dskip + p_.value_dim, static_cast<T*>(g_.dskip) + head * p_.value_dim);
    }
    if (g_.dinitial_state != nullptr) {
      store_state(p_, item_, b_.dstate, b_.row, g_.dinitial_state, g_.dinitial_norm);
    }
  }

 private:
  void step_right(int64_t c) {
    chunk_.load_keys(item_, c);
    chunk_.load_values(item_, c, b_.state);
    chunk_.advance(b_.state);
  }

  void start_dstate() {
    LinearAttentionParams last = p_;
    last.initial_state = g_.dfinal_state;
    last.initial_norm = g_.dfinal_norm;
    first_state(last, item_, b_.dstate);
  }

  void step_left(int64_t c, T* state) {
    chunk_.load_keys(item_, c);
    chunk_.load_values(item_, c, state);
    chunk_.load_queries(item_, c);
    const int n = chunk_.n, ld = chunk_.ld, ld_v = chunk_.ld_v;
    load_tensor(rows_at(g_.dout, p_.type, item_, item_.head, c * kChunk), n, p_.value_dim, b_.dout, ld_v);
    if (b_.output.needs_rows()) chunk_.read(state, b_.rows_v);
    b_.output.gradients(g_, item_, c * kChunk, n, b_.rows_v, b_.dout, b_.dskip);
    pack_tile(b_.dout, ld_v, n, b_.dout_panels);
    b_.unpack(chunk_.values);
    pack_transposed(b_.rows_v, ld_v, n, chunk_.columns, b_.values_t);
    std::fill(b_.dg, b_.dg + (kChannel ? n * ld : n), T{0});

    b_.written(chunk_.scores, chunk_.k_out, b_.dvalues);
    multiply_lower(b_.dout, ld_v, b_.values_t, chunk_.columns, n, b_.dscores);
    // Through the state behind the chunk: dK = V dS^T, decayed. Before b_.rows_v is spoiled.
    b_.through_state(b_.dstate, b_.rows_v, b_.dk);
    chunk_.decay.apply(chunk_.decay.suffix, b_.dk, n, b_.dk);
    b_.add_leaving(chunk_.k, b_.dk, state);
    // Through the state before it: dQ = G S^T, decayed.
    b_.through_state(state, b_.dout, b_.dq);
    const int late = chunk_.late();
    T *const q = chunk_.q + late * ld, *const dq = b_.dq + late * ld;
    chunk_.decay.apply(chunk_.decay.prefix, dq, n - late, dq);
    b_.add_entering(q, dq, n - late);
    if (late != 0) add_own_gradients();
    pair_gradients(chunk_.decay, q, chunk_.k, chunk_.scores + late * kChunk, n - late, chunk_.pairs,
                   b_.dscores + late * kChunk, dq, b_.dk, b_.dg);
    if constexpr (kChannel) {
      if (chunk_.has_rank_one()) rank_one_gradients(state);
    }
    gemm_to_panels<M, Accumulate::kScaleAndAdd>({chunk_.q_in, 1, ld}, b_.dout_panels, n, b_.dstate, p_.key_dim,
                                                p_.key_dim, ld_v, chunk_.total);
    if (chunk_.has_beta()) delta_gradients(state);
    if (chunk_.has_rank_one()) {
      gemm_to_panels<M, Accumulate::kAdd>({chunk_.one.a_in, 1, ld}, b_.dfound, n, b_.dstate, p_.key_dim, p_.key_dim,
                                          ld_v);
    }
    store_tokens(c * kChunk);
  }

  // Of the scores with their own keys, which then are out of the way.
  void add_own_gradients() {
    const int ld = chunk_.ld;
    for (int t = 0; t < chunk_.n; ++t) {
      const T own = std::exchange(b_.dscores[t * kChunk + t], T{0});
      for (int c = 0; c < ld; c += kLanes<T>) {
        const int at = t * ld + c;
        const Vec<T> q = load(chunk_.q + at), k = load(chunk_.k + at), u = load(chunk_.bonus + c);
        store(b_.dq + at, load(b_.dq + at) + own * u * k);
        store(b_.dk + at, load(b_.dk + at) + own * u * q);
        store(b_.dbonus + c, load(b_.dbonus + c) + own * q * k);
      }
    }
  }

  // Of U, what is found under a and written under b: U solves (I + L) U = A_in S + lower(A K^T) V, and Y = (I + L)^-T
  // dU. Rows of a meet keys of earlier tokens: a diagonal of their pairs has no weight.
  void rank_one_gradients(T* state) {
    const RankOne<T>& one = chunk_.one;
    const int n = chunk_.n, ld = chunk_.ld, ld_v = chunk_.ld_v;
    b_.written(one.scores, one.b_out, b_.dfound);
    solve_lower_transposed(one.minus, n, b_.dfound, ld_v);
    gemm_masked_to_panels<M>({one.given, 1, kChunk}, b_.dfound, n, b_.dvalues, ld_v,
                             [n](int r, int) { return Steps{r + 1, n}; });
    b_.unpack(one.found);
    pack_transposed(b_.rows_v, ld_v, n, chunk_.columns, b_.found_t);
    b_.through_state(b_.dstate, b_.rows_v, b_.db);
    chunk_.decay.apply(chunk_.decay.suffix, b_.db, n, b_.db);
    b_.add_leaving(one.b, b_.db, nullptr);
    multiply_lower(b_.dout, ld_v, b_.found_t, chunk_.columns, n, b_.dscores);
    pair_gradients(chunk_.decay, chunk_.q, one.b, one.scores, n, chunk_.pairs, b_.dscores, b_.dq, b_.db, b_.dg);
    b_.unpack(b_.dfound);
    b_.through_state(state, b_.rows_v, b_.da);
    T *const a = one.a + ld, *const da = b_.da + ld;
    chunk_.decay.apply(chunk_.decay.prefix, da, n - 1, da);
    b_.add_entering(a, da, n - 1);
    const auto add_pairs = [&](const T* values_t, const T* keys, const T* pairs, T* dkeys) {
      multiply_lower(b_.rows_v, ld_v, values_t, chunk_.columns, n, b_.dscores);
      for (int t = 0; t < n; ++t) b_.dscores[t * kChunk + t] = T{0};
      pair_gradients(chunk_.decay, a, keys, pairs + kChunk, n - 1, chunk_.pairs, b_.dscores + kChunk, da, dkeys, b_.dg);
    };
    add_pairs(b_.values_t, chunk_.k, one.given, b_.dk);
    add_pairs(b_.found_t, one.b, one.minus, b_.db);
  }

  // From dvalues, the gradient of what the delta rule writes, to that of v (in its place), beta, k, g and the state.
  void delta_gradients(T* state) {
    const int n = chunk_.n, ld = chunk_.ld, ld_v = chunk_.ld_v;
    solve_lower_transposed(chunk_.minus, n, b_.dvalues, ld_v);
    b_.unpack(b_.dvalues);
    for (int t = 0; t < n; ++t) {
      row_from_panels(chunk_.residual, n, ld_v, t, b_.row);
      Vec<T> sum{};
      for (int c = 0; c < ld_v; c += kLanes<T>) sum += load(b_.rows_v + t * ld_v + c) * load(b_.row + c);
      b_.dbeta[t] = reduce_add<T>(sum);
    }
    multiply_lower(b_.rows_v, ld_v, b_.values_t, chunk_.columns, n, b_.dscores);  // -dL
    for (int i = 0; i < n; ++i) {
      T* row = b_.dscores + i * kChunk;
      row[i] = T{0};
      T sum{0};
      for (int j = 0; j < i; ++j) {
        sum -= row[j] * chunk_.overlap[i * kChunk + j];
        row[j] *= -chunk_.beta[i];
      }
      b_.dbeta[i] += sum;
    }
    pair_gradients(chunk_.decay, chunk_.k, chunk_.k, chunk_.overlap, n, chunk_.pairs, b_.dscores, b_.dk, b_.dk, b_.dg);
    scale_rows(b_.dvalues, n, ld_v, chunk_.beta);
    // R = V0 - K_in S.
    for (int t = 0; t < n; ++t) {
      T* row = b_.rows_v + t * ld_v;
      for (int c = 0; c < ld_v; c += kLanes<T>) store(row + c, load(row + c) * -chunk_.beta[t]);
    }
    b_.through_state(state, b_.rows_v, b_.through);
    chunk_.decay.apply(chunk_.decay.prefix, b_.through, n, b_.through);
    b_.add_entering(chunk_.k, b_.through, n);
    for (int i = 0; i < n * ld; i += kLanes<T>) store(b_.dk + i, load(b_.dk + i) + load(b_.through + i));
    gemm_to_panels<M, Accumulate::kAdd>({chunk_.minus_k_in, 1, ld}, b_.dvalues, n, b_.dstate, p_.key_dim, p_.key_dim,
                                        ld_v);
  }

  void store_tokens(int64_t token) {
    const int n = chunk_.n, ld = chunk_.ld, ld_v = chunk_.ld_v;
    const T scale = static_cast<T>(p_.scale);
    for (int i = 0; i < n * ld; i += kLanes<T>) store(b_.dq + i, load(b_.dq + i) * scale);
    const RowsIn v = rows_at(p_.v, p_.type, item_, item_.head, token);
    if (g_.dweight != nullptr) load_tensor(v, n, p_.value_dim, b_.rows_v, ld_v);
    for (int t = 0; t < n; ++t) {
      const int64_t at = row_index(p_, item_, token + t, p_.heads, item_.head);
      store_key_row(b_.dq + t * ld, g_.dq, g_.dq_of_heads, token + t);
      store_key_row(b_.dk + t * ld, g_.dk, g_.dk_of_heads, token + t);
      const int width = kChannel ? p_.key_dim : 1;
      store_tensor(b_.dg + t * (kChannel ? ld : 1), width, element_at(g_.dg, p_.g_type, at * width), p_.g_type);
      if (g_.dbeta != nullptr) store_tensor(b_.dbeta + t, 1, element_at(g_.dbeta, p_.beta_type, at), p_.beta_type);
      if (g_.da != nullptr) {
        store_tensor(b_.da + t * ld, p_.key_dim, element_at(g_.da, p_.type, at * p_.key_dim), p_.type);
        store_tensor(b_.db + t * ld, p_.key_dim, element_at(g_.db, p_.type, at * p_.key_dim), p_.type);
      }
      row_from_panels(b_.dvalues, n, ld_v, t, b_.row);
      if (g_.dweight != nullptr) store_weight(t, at);
      for (int i = 0; g_.dskip != nullptr && i < ld_v; i += kLanes<T>) {
        store(b_.row + i, load(b_.row + i) + load(b_.output.skip + i) * load(b_.dout + t * ld_v + i));
      }
      store_tensor(b_.row, p_.value_dim, element_at(g_.dv, p_.type, at * p_.value_dim), p_.type);
    }
  }

  // A row of dq or dk: to its tensor, or where heads share q and k to the sum of those that this worker has.
  void store_key_row(T* row, void* tensor, void* of_heads, int64_t token) {
    if (p_.heads == p_.qk_heads) {
      const int64_t index = row_index(p_, item_, token, p_.heads, item_.head) * p_.key_dim;
      return store_tensor(row, p_.key_dim, element_at(tensor, p_.type, index), p_.type);
    }
    const int64_t together = heads_together(p_);
    T* sum = static_cast<T*>(of_heads) +
             row_index(p_, item_, token, p_.heads / together, item_.head / together) * p_.key_dim;
    const bool first = item_.head % together == 0;
    for (int c = 0; c < p_.key_dim; ++c) sum[c] = first ? row[c] : sum[c] + row[c];
  }

  // v is weight times the tensor's row, which lies in b_.rows_v now; b_.row holds the gradient of the product.
  void store_weight(int t, int64_t at) {
    const int ld_v = chunk_.ld_v;
    if (p_.stabilizer != nullptr) b_.rows_v[t * ld_v + p_.value_dim] = T{1};
    Vec<T> sum{};
    for (int c = 0; c < ld_v; c += kLanes<T>) {
      sum += load(b_.row + c) * load(b_.rows_v + t * ld_v + c);
      store(b_.row + c, load(b_.row + c) * chunk_.weight[t]);
    }
    const T dweight = reduce_add<T>(sum);
    store_tensor(&dweight, 1, element_at(g_.dweight, p_.weight_type, at), p_.weight_type);
  }

  const LinearAttentionGradParams& g_;
  const LinearAttentionParams& p_;
  const LinearItem& item_;
  GradientTiles<T, kChannel>& b_;
  Chunk<T, kChannel>& chunk_;
};

// dq or dk of q's heads from the shares of v's heads, in order.
template <class T>
void add_heads(const LinearAttentionParams& p, const T* of_heads, void* sums, int64_t token, T* row) {
  const int64_t shares = p.heads / p.qk_heads / heads_together(p);
  for (int64_t h = 0; h < p.qk_heads; ++h) {
    const T* first = of_heads + (token * p.qk_heads + h) * shares * p.key_dim;
    std::copy(first, first + p.key_dim, row);
    for (int64_t i = 1; i < shares; ++i) {
      for (int c = 0; c < p.key_dim; ++c) row[c] += first[i * p.key_dim + c];
    }
    store_tensor(row, p.key_dim, element_at(sums, p.type, (token * p.qk_heads + h) * p.key_dim), p.type);
  }
}

template <class T, bool kChannel>
void run(const LinearAttentionGradParams& g, Executor& executor) {
  const LinearAttentionParams& p = g.forward;
  const std::vector<LinearItem> items = linear_items<T>(p, 1);
  Arena measure(nullptr);
  GradientTiles<T, kChannel>(p, items.empty() ? 0 : items.front().length, measure);
  const Scratch scratch(measure.used(), executor.workers());
  const int64_t together = heads_together(p);
  executor.run(static_cast<int64_t>(items.size()) / together, [&](int64_t i, int worker) {
    Arena arena(scratch.of(worker));
    GradientTiles<T, kChannel> b(p, items.front().length, arena);
    for (int64_t h = 0; h < together; ++h) HeadGradients<T, kChannel>(g, items[i * together + h], b).run();
  });
  if (p.heads == p.qk_heads) return;
  const int64_t tokens = p.cu_seqlens == nullptr ? p.batch * p.seq : p.cu_seqlens[p.batch];
  executor.run(tokens, [&](int64_t token, int worker) {
    T* row = scratch.of<T>(worker);
    add_heads(p, static_cast<const T*>(g.dq_of_heads), g.dq, token, row);
    add_heads(p, static_cast<const T*>(g.dk_of_heads), g.dk, token, row);
  });
}

}  // namespace

void linear_attention_backward(const LinearAttentionGradParams& g, Executor& executor) {
  const bool channel = g.forward.per_channel;
  if (g.forward.type == DType::kFloat64)
    return channel ? run<double, true>(g, executor) : run<double, false>(g, executor);
  return channel ? run<float, true>(g, executor) : run<float, false>(g, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
