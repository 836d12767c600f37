// Linear attention with decay, forward: S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t (Yang et al.
// 2023, GLA; Sun et al. 2023, RetNet; Dao and Gu 2024, Mamba-2), and the gated delta rule (Yang et al. 2024), which
// writes beta_t (v_t - S^T k_t) for v_t. By chunks of 64 tokens, between chunks a state, inside a chunk products:
//   O = (Q decayed from the start) S + lower(Q K^T, decayed) V,   S <- decay S + (K decayed to the end)^T V,
// where the delta rule first solves (I + lower(beta K K^T)) V' = beta (V - (K decayed from the start) S) and goes on
// with V'. RWKV-6 reads S_{t-1} + diag(u) k_t v_t^T: Q has the decays of a row before, and u is on the diagonal; RWKV-7
// also writes under keys b what the state holds under keys a (rank_one.h); mLSTM reads one more column (output.h). One
// item is a head of a sequence, chunks in order; where there are fewer items than workers, columns of V are shared
// out, each of which has a state of its own.
#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/linear_attention/chunk.h"
#include "cpu/linear_attention/output.h"
#include "cpu/linear_attention/state.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class T, bool kChannel>
struct Buffers {
  Chunk<T, kChannel> chunk;
  Output<T> output;
  T* state;  // panels [key_dim][ld_v]
  T* out;    // [tokens][ld_v]

  Buffers(const LinearAttentionParams& p, int columns, Arena& arena)
      : chunk(p, columns, arena),
        output(p, chunk.ld_v, arena),
        state(arena.take<T>(int64_t{p.key_dim} * chunk.ld_v)),
        out(arena.take<T>(kChunk * chunk.ld_v)) {}
};

template <class T, bool kChannel>
void run_item(const LinearAttentionParams& p, const LinearItem& item, Arena& arena) {
  Buffers<T, kChannel> b(p, item.columns, arena);
  Chunk<T, kChannel>& chunk = b.chunk;
  first_state(p, item, b.state);
  for (int64_t c = 0; c < item.chunks(); ++c) {
    chunk.load_keys(item, c);
    chunk.load_values(item, c, b.state);
    chunk.load_queries(item, c);
    chunk.read(b.state, b.out);
    b.output.apply(item, c * kChunk, chunk.n, b.out);
    for (int t = 0; t < chunk.n; ++t) {
      const int64_t index = row_index(p, item, c * kChunk + t, p.heads, item.head) * p.value_dim + item.column;
      store_tensor(b.out + t * chunk.ld_v, item.columns, element_at(p.out, p.type, index), p.type);
    }
    chunk.advance(b.state);
  }
  store_state(p, item, b.state, b.out, p.final_state, p.final_norm);
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
