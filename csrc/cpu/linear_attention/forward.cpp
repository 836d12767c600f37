// Linear attention with decay, forward: S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t (Yang et al.
// 2023, GLA; Sun et al. 2023, RetNet; Dao and Gu 2024, Mamba-2), and the gated delta rule (Yang et al. 2024), which
// writes beta_t (v_t - S^T k_t) for v_t. By chunks of 64 tokens, between chunks a state, inside a chunk products:
//   O = (Q decayed from the start) S + lower(Q K^T, decayed) V,   S <- decay S + (K decayed to the end)^T V,
// where the delta rule first solves (I + lower(beta K K^T)) V' = beta (V - (K decayed from the start) S) and goes on
// with V'. RWKV-6 reads S_{t-1} + diag(u) k_t v_t^T: Q has the decays of a row before, and u is on the diagonal. One
// item is a head of a sequence, chunks in order; where there are fewer items than workers, columns of V are shared
// out, each of which has a state of its own.
#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/linear_attention/chunk.h"
#include "cpu/linear_attention/state.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class T, bool kChannel>
struct Buffers {
  Chunk<T, kChannel> chunk;
  T* state;  // panels [key_dim][ld_v]
  T* out;    // [tokens][ld_v]

  Buffers(const LinearAttentionParams& p, int columns, Arena& arena)
      : chunk(p, columns, arena),
        state(arena.take<T>(int64_t{p.key_dim} * chunk.ld_v)),
        out(arena.take<T>(kChunk * chunk.ld_v)) {}
};

template <class T, bool kChannel>
void run_item(const LinearAttentionParams& p, const LinearItem& item, Arena& arena) {
  using M = Widened<T>;
  Buffers<T, kChannel> b(p, item.columns, arena);
  Chunk<T, kChannel>& chunk = b.chunk;
  const int ld = chunk.ld, ld_v = chunk.ld_v;
  first_state(p, item, b.state);
  for (int64_t c = 0; c < item.chunks(); ++c) {
    chunk.load_keys(item, c);
    chunk.load_values(item, c, b.state);
    chunk.load_queries(item, c);
    const int n = chunk.n;
    gemm<M, Accumulate::kOverwrite>({chunk.q_in, ld, 1}, b.state, p.key_dim, {0, p.key_dim}, b.out, ld_v, n, ld_v);
    gemm_masked<M, Accumulate::kAdd>({chunk.scores, kChunk, 1}, chunk.values, n, all_finite(chunk.values, n * ld_v),
                                     b.out, ld_v, n, ld_v, [](int r, int count) { return Steps{0, r + count}; });
    for (int t = 0; t < n; ++t) {
      const int64_t index = row_index(p, item, c * kChunk + t, p.heads, item.head) * p.value_dim + item.column;
      store_row(b.out + t * ld_v, item.columns, element_at(p.out, p.out_type, index), p.out_type);
    }
    chunk.advance(b.state);
  }
  store_state(p, item, b.state, b.out, p.final_state);
}

template <class T, bool kChannel>
void run(const LinearAttentionParams& p, Executor& executor) {
  const int64_t heads = p.batch * p.heads;
  const int splits = static_cast<int>(heads == 0 ? 1 : std::max<int64_t>(1, executor.workers() / heads));
  const std::vector<LinearItem> items = linear_items<T>(p, splits);
  Arena measure(nullptr);
  Buffers<T, kChannel>(p, p.value_dim, measure);
  const Scratch scratch(measure.used(), executor.workers());
  executor.run(static_cast<int64_t>(items.size()), [&](int64_t i, int worker) {
    Arena arena(scratch.of(worker));
    run_item<T, kChannel>(p, items[i], arena);
  });
}

}  // namespace

void linear_attention(const LinearAttentionParams& p, Executor& executor) {
  if (p.type == DType::kFloat64) {
    return p.per_channel ? run<double, true>(p, executor) : run<double, false>(p, executor);
  }
  return p.per_channel ? run<float, true>(p, executor) : run<float, false>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
