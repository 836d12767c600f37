// Attention forward in float or double by fused multiply-adds (fma_tile.cuh), for float32 and float64, and for 16-bit
// inputs of large head_dim: the formula of forward.cu, with e^x. A block has 64 rows of one head and 128 columns of the
// output; wider values take several blocks, each with the scores computed anew.
#include "cuda/generic/attention/fma_tile.cuh"
#include "cuda/generic/attention/kernels.h"
#include "cuda/generic/attention/scores.cuh"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

struct ForwardParams {
  AttentionParams p;
  Tiles tiles;
};

constexpr int kRowLanes = 16;  // that share a row

// Scores of a row become weights e^(score - max), and the running maximum and sum move on; returns what the older sums
// are worth now.
template <class X>
__device__ X weigh(X (&s)[4], X& running_max, X& running_sum) {
  X top = running_max;
#pragma unroll
  for (int j = 0; j < 4; ++j) top = fmax(top, s[j]);
  top = reduce_max<kRowLanes>(top);
  // Where every score is -inf, subtracting 0 makes each weight 0.
  const X shift = top == -INFINITY ? X{0} : top;
  const X keep = exp(running_max - shift);
  X sum = running_sum * keep;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    s[j] = exp(s[j] - shift);
    sum += s[j];
  }
  running_max = top;
  running_sum = sum;
  return keep;
}

template <class X>
__global__ void __launch_bounds__(kFmaThreads) attention_forward_fma_kernel(ForwardParams f) {
  const AttentionParams& p = f.p;
  Work work;
  if (!find_work(p, f.tiles, work)) return;
  const Sequence& s = work.sequence;
  const int kv_head = work.head / static_cast<int>(p.heads / p.kv_heads), column = blockIdx.z * kFmaColumns;
  const FmaPlace place;
  X *const operands = dynamic_shared<X>(), *const weights = operands + kFmaOperands;
  const Cells<X> q = cells_of<X>(p.q, p.type, s, work.head, s.q_begin);
  const Cells<X> k = cells_of<X>(p.k, p.type, s, kv_head, s.k_begin);
  const Cells<X> v = cells_of<X>(p.v, p.type, s, kv_head, s.k_begin);
  const Band band = keys_of_rows(p, s);
  const Range seen = band.of(work.begin, work.count);
  const auto whole = [&](int key) { return band.whole(work.begin, work.count, key, kFmaTile); };
  const Scores<X> finish(p, s, work.head, 1.0);

  X out[4][8] = {}, maximum[4], sum[4] = {};
  for (X& m : maximum) m = -INFINITY;
  bool found = false;
  for (int key = seen.begin / kFmaTile * kFmaTile; key < seen.end; key += kFmaTile) {
    const int keys = min(kFmaTile, s.k_len - key);
    X scores[4][4];
    multiply_rows(scores, q, work.begin, work.count, k, key, keys, p.head_dim, operands);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = work.begin + 4 * place.y + i;
      const Range own = band.of(row);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = key + 4 * place.x + j;
        X unused;
        const X score = finish.finish(scores[i][j], row, at, unused);
        scores[i][j] = at >= own.begin && at < own.end ? score : -INFINITY;
      }
      const X keep = weigh(scores[i], maximum[i], sum[i]);
#pragma unroll
      for (X& x : out[i]) x *= keep;
    }
    store_weights(weights, scores);
    found |= add_product(out, weights, v, key, keys, column, p.head_dim_v, !whole(key), operands);
  }

  const int64_t token = q_token(p, s, work.begin);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * place.y + i;
    const X total = reduce_add<kRowLanes>(sum[i]);
    X lse = total == 0 ? -INFINITY : maximum[i] + log(total);
    X share = total == 0 ? X{0} : X{1} / total;
    if (p.sinks != nullptr) share *= add_sink(lse, static_cast<const X*>(p.sinks)[work.head]);
    if (row >= work.count) continue;
    if (place.x == 0 && blockIdx.z == 0) static_cast<X*>(p.lse)[lse_index(p, s, work.head, work.begin + row)] = lse;
    for (int c = 0; c < 8; ++c) {
      const int at = column + fma_column(place, c);
      if (at >= p.head_dim_v) continue;
      store_cell(p.out, p.type, ((token + row) * p.heads + work.head) * p.head_dim_v + at, out[i][c] * share);
    }
  }
  if (!__syncthreads_or(found)) return;
  const Cells<X> results{p.out, p.type, (token * p.heads + work.head) * p.head_dim_v, p.heads * p.head_dim_v, 1};
  give_back_specials<X>(
      band, work.begin, work.count, min(kFmaColumns, p.head_dim_v - column), kFmaTile,
      [&](int j, int c) { return v.at(j, column + c); }, [&](int key) { return !whole(key); },
      [&](int i, int c, X special) {
        const int row = i - work.begin;
        const int64_t at = results.begin + row * results.stride + column + c;
        store_cell(p.out, p.type, at, results.at(row, column + c) + special);
      });
}

template <class X>
void run(const AttentionParams& p, Stream& stream) {
  const Tiles tiles = Tiles::of(p, false, kFmaTile);
  if (tiles.total == 0) return;
  dim3 grid = tiles.grid();
  grid.z = fma_column_blocks(p.head_dim_v);
  launch(attention_forward_fma_kernel<X>, grid, dim3(kFmaThreads), sizeof(X) * (kFmaOperands + kFmaWeights), stream,
         ForwardParams{p, tiles});
}

}  // namespace

void attention_forward_fma(const AttentionParams& p, Stream& stream) {
  if (p.type == DType::kFloat64) return run<double>(p, stream);
  run<float>(p, stream);
}

}  // namespace lcore::cuda::generic
