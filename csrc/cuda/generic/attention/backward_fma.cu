// Attention backward in float or double by fused multiply-adds (fma_tile.cuh); formulas and schedule of backward.cu:
// keys own dK and dV, rows own dQ. A block has 64 keys, or rows, and 128 columns of their gradients; wider heads take
// several blocks, each with P and dS computed anew.
#include "cuda/generic/attention/fma_tile.cuh"
#include "cuda/generic/attention/kernels.h"
#include "cuda/generic/attention/scores.cuh"
#include "cuda/launch.h"

namespace lcore::cuda::generic {
namespace {

template <class X>
struct BackwardParams {
  AttentionGradParams g;
  const X* delta;
  Tiles tiles;
};

// One side of the block's tile: its rows of q or k, and of dout or v.
template <class X>
struct Side {
  Cells<X> scores;
  Cells<X> values;
};

template <class X>
__device__ Side<X> side_of(const AttentionGradParams& g, bool keys, const Sequence& s, int head) {
  const AttentionParams& p = g.forward;
  if (keys) return {cells_of<X>(p.k, p.type, s, head, s.k_begin), cells_of<X>(p.v, p.type, s, head, s.k_begin)};
  return {cells_of<X>(p.q, p.type, s, head, s.q_begin), cells_of<X>(g.dout, p.type, s, head, s.q_begin)};
}

template <class X, bool kKeys>
__global__ void __launch_bounds__(kFmaThreads) attention_backward_fma_kernel(BackwardParams<X> b) {
  const AttentionGradParams& g = b.g;
  const AttentionParams& p = g.forward;
  Work work;
  if (!find_work(p, b.tiles, work)) return;
  const Sequence& s = work.sequence;
  const int group = static_cast<int>(p.heads / p.kv_heads), column = blockIdx.z * kFmaColumns;
  const FmaPlace place;
  X *const operands = dynamic_shared<X>(), *const weights = operands + kFmaOperands;
  X* const dscores = weights + kFmaWeights;
  const Side<X> own = side_of<X>(g, kKeys, s, work.head);
  const Band band = kKeys ? rows_of_keys(p, s) : keys_of_rows(p, s);
  const Range seen = band.of(work.begin, work.count);
  const auto whole = [&](int other) {
    return work.count == kFmaTile && band.whole(work.begin, kFmaTile, other, kFmaTile);
  };

  X grad[4][8] = {}, grad_v[4][8] = {};
  bool found = false;
  for (int member = 0; member < (kKeys ? group : 1); ++member) {
    const int head = kKeys ? work.head * group + member : work.head;
    const Side<X> others = side_of<X>(g, !kKeys, s, kKeys ? head : head / group);
    const Scores<X> finish(p, s, head, 1.0);
    for (int other = seen.begin / kFmaTile * kFmaTile; other < seen.end; other += kFmaTile) {
      const int count = min(kFmaTile, band.count - other);
      X weight[4][4], dscore[4][4];
      multiply_rows(weight, own.scores, work.begin, work.count, others.scores, other, count, p.head_dim, operands);
      multiply_rows(dscore, own.values, work.begin, work.count, others.values, other, count, p.head_dim_v, operands);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int mine = work.begin + 4 * place.y + i;
        const Range range = band.of(mine);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int theirs = other + 4 * place.x + j;
          const bool sees = 4 * place.y + i < work.count && theirs >= range.begin && theirs < range.end;
          const int row = kKeys ? theirs : mine, key = kKeys ? mine : theirs;
          const int64_t at = lse_index(p, s, head, sees ? row : 0);
          const X lse = sees ? static_cast<const X*>(p.lse)[at] : -INFINITY;
          if (lse == -INFINITY) {
            weight[i][j] = dscore[i][j] = 0;
            continue;
          }
          X slope_of_cap;
          weight[i][j] = exp(finish.finish(weight[i][j], row, key, slope_of_cap) - lse);
          dscore[i][j] = weight[i][j] * (dscore[i][j] - b.delta[at]) * slope_of_cap;
        }
      }
      store_weights(dscores, dscore);
      if constexpr (kKeys) store_weights(weights, weight);
      const bool scrubs = !whole(other);
      found |= add_product(grad, dscores, others.scores, other, count, column, p.head_dim, scrubs, operands);
      if constexpr (kKeys) {
        found |= add_product(grad_v, weights, others.values, other, count, column, p.head_dim_v, scrubs, operands);
      }
    }
  }

  const int64_t first = kKeys ? k_token(p, s, work.begin) * p.kv_heads : q_token(p, s, work.begin) * p.heads;
  const int64_t stride = kKeys ? p.kv_heads : p.heads;
  const auto store = [&](void* to, const X(&sums)[4][8], X scale, int dim) {
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * place.y + i;
      for (int c = 0; c < 8; ++c) {
        const int at = column + fma_column(place, c);
        if (row >= work.count || at >= dim) continue;
        store_cell(to, p.type, (first + row * stride + work.head) * dim + at, sums[i][c] * scale);
      }
    }
  };
  store(kKeys ? g.dk : g.dq, grad, static_cast<X>(p.softmax_scale), p.head_dim);
  if constexpr (kKeys) store(g.dv, grad_v, X{1}, p.head_dim_v);
  if (!__syncthreads_or(found)) return;
  // A special query or key makes the score special, and so its share of the gradient NaN whatever its sign.
  const auto give_back = [&](void* to, int head, bool values, int dim) {
    const Side<X> others = side_of<X>(g, !kKeys, s, kKeys ? head : head / group);
    give_back_specials<X>(
        band, work.begin, work.count, min(kFmaColumns, dim - column), kFmaTile,
        [&](int j, int c) { return (values ? others.values : others.scores).at(j, column + c); },
        [&](int other) { return !whole(other); },
        [&](int i, int c, X special) {
          const int64_t at = (first + (i - work.begin) * stride + work.head) * dim + column + c;
          const Cells<X> result{to, p.type, at, 0, 0};
          store_cell(to, p.type, at, values ? result.at(0, 0) + special : special - special);
        });
  };
  for (int member = 0; member < (kKeys ? group : 1); ++member) {
    const int head = kKeys ? work.head * group + member : work.head;
    give_back(kKeys ? g.dk : g.dq, head, false, p.head_dim);
    if constexpr (kKeys) give_back(g.dv, head, true, p.head_dim_v);
  }
}

template <class X, bool kKeys>
void run(const AttentionGradParams& g, const void* delta, Stream& stream) {
  const AttentionParams& p = g.forward;
  const Tiles tiles = Tiles::of(p, kKeys, kFmaTile);
  if (tiles.total == 0) return;
  dim3 grid = tiles.grid();
  grid.z = fma_column_blocks(kKeys ? std::max(p.head_dim, p.head_dim_v) : p.head_dim);
  launch(attention_backward_fma_kernel<X, kKeys>, grid, dim3(kFmaThreads), sizeof(X) * (kFmaOperands + 2 * kFmaWeights),
         stream, BackwardParams<X>{g, static_cast<const X*>(delta), tiles});
}

}  // namespace

void attention_backward_fma(const AttentionGradParams& g, const void* delta, Stream& stream) {
  const auto run_both = [&](auto zero) {
    run<decltype(zero), true>(g, delta, stream);
    run<decltype(zero), false>(g, delta, stream);
  };
  if (g.forward.type == DType::kFloat64) return run_both(double{});
  run_both(float{});
}

}  // namespace lcore::cuda::generic
