// Attention forward on tensor cores, bf16 and fp16: out_i = sum_j softmax_j(score(q_i, k_j)) v_j, lse_i = ln sum_j
// e^score. Online softmax (Milakov and Gimelshein 2018; Dao 2023, FlashAttention-2, Algorithm 1) in powers of two.
// A block has a tile of rows of one head; its warps share the rows, each whole rows, so that no sum crosses a warp. It
// walks over blocks of keys at multiples of the tile's keys: while one of K and V is multiplied the other is on its
// way. The surprising idea: a block of keys that some row does not see wholly gets NaN and infinity out of its V first,
// and the rows that do see them get them back at the end (poison.cuh).
#include "cuda/generic/attention/kernels.h"
#include "cuda/generic/attention/poison.cuh"
#include "cuda/generic/attention/scores.cuh"
#include "cuda/generic/attention/shared_tile.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/exp2.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

struct ForwardTile {
  int dim;  // head_dim and head_dim_v up to this, zeros behind them
  int rows;
  int keys;
  int blocks;                 // on an SM, which bounds the registers of a thread
  bool queries_in_registers;  // else they are read from shared memory for each block of keys
};

// Four warps. 32 rows a warp halve what a product reads of K and V from shared memory, which 16 rows would be bound by;
// d 256 has registers for 16 only. Registers of a thread: sums of the output, scores, queries.
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpLanes;
constexpr ForwardTile kTiles[] = {
    {64, 128, 64, 2, true},    // 64 + 64 + 32; 16 + 8 + 8 = 32 KB
    {128, 128, 64, 2, false},  // 128 + 64; 32 + 16 + 16 = 64 KB
    {256, 64, 64, 2, false},   // 128 + 32; 32 + 32 + 32 = 96 KB, which every chip since sm_80 has
};

struct ForwardParams {
  AttentionParams p;
  Tiles tiles;
  bool vectors_q, vectors_k, vectors_v;
};

// A row's running maximum and sum, in this lane's quarter of the columns.
struct RowState {
  float max = -INFINITY;
  float sum = 0;
};

// Scores of two row halves become weights 2^(score - max), and the state moves on; `factor` turns a score into powers
// of two. Returns what the older sums are worth now.
template <int kEighths>
__device__ float weigh(float (&s)[kEighths][4], int half, float factor, RowState& state) {
  float top = state.max;
#pragma unroll
  for (int n = 0; n < kEighths; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
  top = reduce_max<4>(top);
  // Where every score is -inf, subtracting 0 makes each weight 0.
  const float shift = top == -INFINITY ? 0.0f : top * factor;
  const float keep = exp2_approx(fmaf(state.max, factor, -shift));
  float sum = state.sum * keep;
#pragma unroll
  for (int n = 0; n < kEighths; ++n) {
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      s[n][i] = exp2_approx(fmaf(s[n][i], factor, -shift));
      sum += s[n][i];
    }
  }
  state = {top, sum};
  return keep;
}

template <class T, int kTile>
__global__ void __launch_bounds__(kThreads, kTiles[kTile].blocks) attention_forward_kernel(ForwardParams f) {
  constexpr ForwardTile tile = kTiles[kTile];
  constexpr int kRowTiles = tile.rows / 16 / kWarps, kSteps = tile.dim / 16, kEighths = tile.keys / 8;
  const AttentionParams& p = f.p;
  Work work;
  if (!find_work(p, f.tiles, work)) return;
  const Sequence& s = work.sequence;
  const int kv_head = work.head / static_cast<int>(p.heads / p.kv_heads);
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes, g = lane / 4, t = lane % 4;
  const FragmentLanes lanes(lane);

  const SharedTile<T, tile.rows, tile.dim> q{dynamic_shared<T>()};
  const SharedTile<T, tile.keys, tile.dim> k{q.data + q.kElements}, v{k.data + k.kElements};
  const Rows<T> q_rows = rows_of<T>(p.q, f.vectors_q, s, work.head, s.q_begin);
  // Made anew where they are used: pointers and strides would take registers from the sums.
  const auto k_rows = [&] { return rows_of<T>(p.k, f.vectors_k, s, kv_head, s.k_begin); };
  const auto v_rows = [&] { return rows_of<T>(p.v, f.vectors_v, s, kv_head, s.k_begin); };

  const Band band = keys_of_rows(p, s);
  const Range seen = band.of(work.begin, work.count);
  const int first = seen.begin / tile.keys * tile.keys;
  const auto whole = [&](int key) { return band.whole(work.begin, work.count, key, tile.keys); };
  const Scores<float> scores(p, s, work.head, kLog2E);
  const bool plain = scores.plain();
  const float factor = plain ? scores.scale : 1.0f;

  load_tile<kThreads>(q, q_rows, work.begin, work.count, p.head_dim);
  if (first < seen.end) load_tile<kThreads>(k, k_rows(), first, s.k_len - first, p.head_dim);
  cp_async_commit();

  float out[kRowTiles][tile.dim / 8][4] = {};
  RowState state[kRowTiles][2];
  uint32_t queries[kRowTiles][tile.queries_in_registers ? kSteps : 1][4];
  bool scrubbed = false;
  for (int key = first; key < seen.end; key += tile.keys) {
    cp_async_wait<0>();
    __syncthreads();
    load_tile<kThreads>(v, v_rows(), key, s.k_len - key, p.head_dim_v);
    cp_async_commit();
    if constexpr (tile.queries_in_registers) {
      if (key == first) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            ldmatrix(queries[i][step], q.fragment(lanes.rows, warp * kRowTiles + i, step));
          }
        }
      }
    }

    float weights[kRowTiles][kEighths][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (!tile.queries_in_registers) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ldmatrix(queries[i][0], q.fragment(lanes.rows, warp * kRowTiles + i, step));
        }
      }
#pragma unroll
      for (int n = 0; n < kEighths / 2; ++n) {
        uint32_t b[4];
        ldmatrix(b, k.fragment(lanes.columns, n, step));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const uint32_t (&a)[4] = queries[i][tile.queries_in_registers ? step : 0];
          mma<T>(weights[i][2 * n], a, b[0], b[1]);
          mma<T>(weights[i][2 * n + 1], a, b[2], b[3]);
        }
      }
    }

    const bool cut = !whole(key);
    if (!plain || cut) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = work.begin + (warp * kRowTiles + i) * 16 + g + 8 * half;
          const Range own = band.of(row);
#pragma unroll
          for (int n = 0; n < kEighths; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& score = weights[i][n][2 * half + c];
              const int at = key + 8 * n + 2 * t + c;
              float unused;
              if (!plain) score = scores.finish(score, row, at, unused);
              if (at < own.begin || at >= own.end) score = -INFINITY;
            }
          }
        }
      }
    }

    uint32_t pairs[kRowTiles][kEighths / 2][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float keep = weigh(weights[i], half, factor, state[i][half]);
#pragma unroll
        for (int n = 0; n < tile.dim / 8; ++n) {
          out[i][n][2 * half] *= keep;
          out[i][n][2 * half + 1] *= keep;
        }
      }
      pack_fragments<T>(pairs[i], weights[i]);
    }

    cp_async_wait<0>();
    __syncthreads();
    if (cut && __syncthreads_or(scrub<kThreads>(v))) scrubbed = true;
    if (key + tile.keys < seen.end) {
      load_tile<kThreads>(k, k_rows(), key + tile.keys, s.k_len - key - tile.keys, p.head_dim);
      cp_async_commit();
    }

#pragma unroll
    for (int step = 0; step < kEighths / 2; ++step) {
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        ldmatrix_trans(b, v.fragment(lanes.rows, step, n));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma<T>(out[i][2 * n], pairs[i][step], b[0], b[1]);
          mma<T>(out[i][2 * n + 1], pairs[i][step], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // a warp's rows of q, which others may have copied, take its results

  T* const results = static_cast<T*>(p.out) + (q_token(p, s, work.begin) * p.heads + work.head) * p.head_dim_v;
  const int64_t stride = p.heads * p.head_dim_v;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    float share[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = reduce_add<4>(state[i][half].sum);
      float lse = sum == 0 ? -INFINITY : fmaf(state[i][half].max, factor, log2f(sum)) * static_cast<float>(kLn2);
      share[half] = sum == 0 ? 0.0f : 1 / sum;
      if (p.sinks != nullptr) share[half] *= add_sink(lse, static_cast<const float*>(p.sinks)[work.head]);
      const int row = (warp * kRowTiles + i) * 16 + g + 8 * half;
      if (t == 0 && row < work.count) static_cast<float*>(p.lse)[lse_index(p, s, work.head, work.begin + row)] = lse;
    }
    store_rows(q, warp * kRowTiles + i, out[i], share, results, stride, work.count, p.head_dim_v);
  }
  if (!scrubbed) return;
  __syncthreads();
  give_back_specials<float>(
      band, work.begin, work.count, p.head_dim_v, tile.keys, [&](int j, int c) { return widen(*v_rows().at(j, c)); },
      [&](int key) { return !whole(key); },
      [&](int i, int c, float special) {
        T& result = results[(i - work.begin) * stride + c];
        result = narrow<T>(widen(result) + special);
      });
}

template <class T, int kTile>
void run(const AttentionParams& p, Stream& stream) {
  constexpr ForwardTile tile = kTiles[kTile];
  const Tiles tiles = Tiles::of(p, false, tile.rows);
  if (tiles.total == 0) return;
  const ForwardParams f{p, tiles, in_vectors(p.q, p.head_dim), in_vectors(p.k, p.head_dim),
                        in_vectors(p.v, p.head_dim_v)};
  const size_t shared = sizeof(T) * tile.dim * (tile.rows + 2 * tile.keys);
  launch(attention_forward_kernel<T, kTile>, tiles.grid(), dim3(kThreads), shared, stream, f);
}

template <class T>
void run_type(const AttentionParams& p, Stream& stream) {
  const int dim = std::max(p.head_dim, p.head_dim_v);
  if (dim <= 64) return run<T, 0>(p, stream);
  if (dim <= 128) return run<T, 1>(p, stream);
  return run<T, 2>(p, stream);
}

}  // namespace

void attention_forward_mma(const AttentionParams& p, Stream& stream) {
  if (p.type == DType::kFloat16) return run_type<__half>(p, stream);
  run_type<__nv_bfloat16>(p, stream);
}

}  // namespace lcore::cuda::generic
