// Attention backward on tensor cores, bf16 and fp16 (Dao 2023, FlashAttention-2, Algorithm 2), with the gradient of
// lse:
//   P = e^(score - lse), dP = dO V^T, dS = P (dP - delta), dQ = dS K scale, dK = dS^T Q scale, dV = P^T dO.
// No atomics, so the bits repeat: a block owns 64 keys and walks over the rows of all heads of their group for dK and
// dV; in a second launch a block owns 64 rows and walks over the keys for dQ. Scores are computed twice, seven products
// instead of five, and nothing but the gradients is written. Both are one kernel, as both are the same products: S of
// own by other rows, dP of own by other, then dS x other and P x other; P and dS stay in registers, where the results
// of a product are the operands of the next. The surprising idea: float16 cannot hold every dS, so a warp counts dS in
// a unit, a power of two that grows as a running maximum does.
#include "cuda/generic/attention/kernels.h"
#include "cuda/generic/attention/poison.cuh"
#include "cuda/generic/attention/scores.cuh"
#include "cuda/generic/attention/shared_tile.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/exp2.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

struct BackwardTile {
  int dim;     // head_dim and head_dim_v up to this, zeros behind them
  int others;  // rows, or keys, of the other side at a time
  int stages;  // of which this many are in shared memory
};

// Four warps of 16 own rows, two blocks an SM. Registers of a thread: two gradients, S, dP; at d 256 one gradient only,
// so that dK and dV take a launch each. Shared memory: own tiles of two tensors, the other side's in stages.
constexpr int kOwn = 64;
constexpr int kThreads = 4 * kWarpLanes;
constexpr BackwardTile kTiles[] = {
    {64, 64, 2},   // 32 + 32 + 32 + 32; 16 + 32 = 48 KB
    {128, 32, 2},  // 64 + 64 + 16 + 16; 32 + 32 = 64 KB
    {256, 32, 1},  // 128 + 16 + 16; 64 + 32 = 96 KB
};

enum class Wanted { kKeysAndValues, kKeys, kValues, kQueries };

struct BackwardParams {
  AttentionGradParams g;
  const float* delta;
  Tiles tiles;
  bool vectors_q, vectors_k, vectors_v, vectors_dout;
};

// lse and delta of the other side's rows.
struct RowFacts {
  float* lse;
  float* delta;
};

// The largest dS that is counted in one unit: half of what float16 holds.
constexpr float kMostScaled = 32768;

// A larger unit, when the warp's dS want it; the sums so far are counted in the new one.
template <int kEighths, int kSums>
__device__ void fit_unit(const float (&ds)[kEighths][4], float (&sums)[kSums][4], float& unit) {
  float top = 0;
#pragma unroll
  for (int n = 0; n < kEighths; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) top = fmaxf(top, isfinite(ds[n][i]) ? fabsf(ds[n][i]) : 0.0f);
  }
  if (!__any_sync(kAllLanes, top > kMostScaled * unit)) return;
  // The power of two below the maximum.
  const float grown = __uint_as_float(__float_as_uint(reduce_max(top)) & 0x7f800000u) * (2 / kMostScaled);
  const float keep = unit / grown;
#pragma unroll
  for (int n = 0; n < kSums; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] *= keep;
  }
  unit = grown;
}

// d += A B^T of the warp's 16 rows of `own` and all of `other`.
template <class T, int kOthers, int kDim>
__device__ void multiply(float (&d)[kOthers / 8][4], const SharedTile<T, kOwn, kDim>& own,
                         const SharedTile<T, kOthers, kDim>& other, const FragmentLanes& lanes) {
  const int warp = threadIdx.x / kWarpLanes;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[4];
    ldmatrix(a, own.fragment(lanes.rows, warp, step));
#pragma unroll
    for (int n = 0; n < kOthers / 16; ++n) {
      uint32_t b[4];
      ldmatrix(b, other.fragment(lanes.columns, n, step));
      mma<T>(d[2 * n], a, b[0], b[1]);
      mma<T>(d[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// sums += W B: W the warp's 16 rows of weights, B the other side's rows.
template <class T, int kOthers, int kDim>
__device__ void add_product(float (&sums)[kDim / 8][4], const float (&weights)[kOthers / 8][4],
                            const SharedTile<T, kOthers, kDim>& other, const FragmentLanes& lanes) {
  uint32_t a[kOthers / 16][4];
  pack_fragments<T>(a, weights);
#pragma unroll
  for (int step = 0; step < kOthers / 16; ++step) {
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_trans(b, other.fragment(lanes.rows, step, n));
      mma<T>(sums[2 * n], a[step], b[0], b[1]);
      mma<T>(sums[2 * n + 1], a[step], b[2], b[3]);
    }
  }
}

template <class T, int kTile, Wanted kWanted>
__global__ void __launch_bounds__(kThreads, 2) attention_backward_kernel(BackwardParams f) {
  constexpr BackwardTile tile = kTiles[kTile];
  constexpr bool kKeys = kWanted != Wanted::kQueries, kByScores = kWanted != Wanted::kValues;
  constexpr bool kByWeights = kWanted == Wanted::kKeysAndValues || kWanted == Wanted::kValues;
  constexpr int kEighths = tile.others / 8, kSums = tile.dim / 8;
  using Own = SharedTile<T, kOwn, tile.dim>;
  using Other = SharedTile<T, tile.others, tile.dim>;
  const AttentionParams& p = f.g.forward;
  Work work;
  if (!find_work(p, f.tiles, work)) return;
  const Sequence& s = work.sequence;
  const int group = static_cast<int>(p.heads / p.kv_heads), members = kKeys ? group : 1;
  const int first_head = kKeys ? work.head * group : work.head, kv_head = kKeys ? work.head : work.head / group;
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes, g = lane / 4, t = lane % 4;
  const FragmentLanes lanes(lane);

  // The score's operands are q and k, dP's are dout and v.
  const Own own{dynamic_shared<T>()}, own_values{own.data + Own::kElements};
  const auto other_of = [&](int stage) {
    return Other{own_values.data + Own::kElements + 2 * stage * Other::kElements};
  };
  const auto other_values_of = [&](int stage) { return Other{other_of(stage).data + Other::kElements}; };
  __shared__ __align__(16) float lse_of_rows[2][64], delta_of_rows[2][64];

  // Made anew where they are used: pointers and strides would take registers from the sums.
  const auto k_rows = [&] { return rows_of<T>(p.k, f.vectors_k, s, kv_head, s.k_begin); };
  const auto v_rows = [&] { return rows_of<T>(p.v, f.vectors_v, s, kv_head, s.k_begin); };
  const auto q_rows = [&](int head) { return rows_of<T>(p.q, f.vectors_q, s, head, s.q_begin); };
  const auto dout_rows = [&](int head) { return rows_of<T>(f.g.dout, f.vectors_dout, s, head, s.q_begin); };

  const Band band = kKeys ? rows_of_keys(p, s) : keys_of_rows(p, s);
  const Range seen = band.of(work.begin, work.count);
  const int first = seen.begin / tile.others * tile.others;
  const int rounds = first < seen.end ? (seen.end - first + tile.others - 1) / tile.others : 0;
  // Rows that only pad the own tile have weights without meaning: they are masked, too.
  const auto whole = [&](int other) { return work.count == kOwn && band.whole(work.begin, kOwn, other, tile.others); };

  const auto load = [&](int round, int stage) {
    const int head = first_head + round / rounds, other = first + round % rounds * tile.others;
    const int count = band.count - other;
    if constexpr (kKeys) {
      load_tile<kThreads>(other_of(stage), q_rows(head), other, count, p.head_dim);
      load_tile<kThreads>(other_values_of(stage), dout_rows(head), other, count, p.head_dim_v);
      for (int i = threadIdx.x; i < tile.others; i += kThreads) {
        const int64_t at = lse_index(p, s, head, i < count ? other + i : 0);
        const int bytes = i < count ? 4 : 0;
        cp_async<4>(&lse_of_rows[stage][i], static_cast<const float*>(p.lse) + at, bytes);
        cp_async<4>(&delta_of_rows[stage][i], f.delta + at, bytes);
      }
    } else {
      load_tile<kThreads>(other_of(stage), k_rows(), other, count, p.head_dim);
      load_tile<kThreads>(other_values_of(stage), v_rows(), other, count, p.head_dim_v);
    }
    cp_async_commit();
  };

  // Of own rows by half: lse in powers of two and delta, where they are queries.
  float own_lse[2] = {}, own_delta[2] = {};
  const auto in_powers = [](float lse) { return lse == -INFINITY ? INFINITY : lse * static_cast<float>(kLog2E); };
  if constexpr (kKeys) {
    load_tile<kThreads>(own, k_rows(), work.begin, work.count, p.head_dim);
    load_tile<kThreads>(own_values, v_rows(), work.begin, work.count, p.head_dim_v);
  } else {
    load_tile<kThreads>(own, q_rows(work.head), work.begin, work.count, p.head_dim);
    load_tile<kThreads>(own_values, dout_rows(work.head), work.begin, work.count, p.head_dim_v);
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + g + 8 * half;
      if (row >= work.count) continue;
      const int64_t at = lse_index(p, s, work.head, work.begin + row);
      own_lse[half] = in_powers(static_cast<const float*>(p.lse)[at]);
      own_delta[half] = f.delta[at];
    }
  }
  cp_async_commit();

  float grad[kByScores ? kSums : 1][4] = {}, grad_v[kByWeights ? kSums : 1][4] = {};
  float unit = 1;
  bool scrubbed = false;
  if (rounds > 0) load(0, 0);
  for (int round = 0; round < rounds * members; ++round) {
    const int stage = tile.stages == 1 ? 0 : round % tile.stages;
    const bool last = round + 1 == rounds * members;
    if (tile.stages > 1 && !last) {
      load(round + 1, (round + 1) % tile.stages);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const int head = first_head + round / rounds, other = first + round % rounds * tile.others;
    const Other others = other_of(stage), other_values = other_values_of(stage);

    float weights[kEighths][4] = {}, dscores[kEighths][4] = {};
    multiply(weights, own, others, lanes);
    if constexpr (kByScores) multiply(dscores, own_values, other_values, lanes);

    const Scores<float> scores(p, s, head, kLog2E);
    const bool cut = !whole(other), plain = scores.plain();
    const Range range[2] = {band.of(work.begin + warp * 16 + g), band.of(work.begin + warp * 16 + g + 8)};
#pragma unroll
    for (int n = 0; n < kEighths; ++n) {
      float lse[2], delta[2];
      if constexpr (kKeys) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          lse[c] = in_powers(lse_of_rows[stage][8 * n + 2 * t + c]);
          delta[c] = delta_of_rows[stage][8 * n + 2 * t + c];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, c = i % 2;
        const int mine = work.begin + warp * 16 + g + 8 * half, theirs = other + 8 * n + 2 * t + c;
        const float row_lse = kKeys ? lse[c] : own_lse[half], row_delta = kKeys ? delta[c] : own_delta[half];
        float slope_of_cap = 1, weight;
        if (plain) {
          weight = exp2_approx(fmaf(weights[n][i], scores.scale, -row_lse));
        } else {
          weight = exp2_approx(
              scores.finish(weights[n][i], kKeys ? theirs : mine, kKeys ? mine : theirs, slope_of_cap) - row_lse);
        }
        float dscore = weight * (dscores[n][i] - row_delta) * slope_of_cap;
        if (cut && (mine >= work.begin + work.count || theirs < range[half].begin || theirs >= range[half].end)) {
          weight = dscore = 0;
        }
        weights[n][i] = weight;
        dscores[n][i] = dscore;
      }
    }
    if (cut) {
      __syncthreads();
      bool found = false;
      if constexpr (kByScores) found |= scrub<kThreads>(others);
      if constexpr (kByWeights) found |= scrub<kThreads>(other_values);
      if (__syncthreads_or(found)) scrubbed = true;
    }
    if constexpr (kByWeights) add_product<T>(grad_v, weights, other_values, lanes);
    if constexpr (kByScores) {
      if constexpr (std::is_same_v<T, __half>) {
        fit_unit(dscores, grad, unit);
        const float inverse = 1 / unit;
#pragma unroll
        for (float (&eighth)[4] : dscores) {
#pragma unroll
          for (float& x : eighth) x *= inverse;
        }
      }
      add_product<T>(grad, dscores, others, lanes);
    }
    __syncthreads();
    if (tile.stages == 1 && !last) load(round + 1, 0);
  }
  cp_async_wait<0>();
  __syncthreads();

  const int64_t stride = kKeys ? p.kv_heads : p.heads;
  const int64_t begin = (kKeys ? k_token(p, s, work.begin) : q_token(p, s, work.begin)) * stride + work.head;
  T* const results = static_cast<T*>(kKeys ? f.g.dk : f.g.dq) + begin * p.head_dim;
  T* const value_results = static_cast<T*>(f.g.dv) + begin * p.head_dim_v;
  if constexpr (kByScores) {
    const float scale = static_cast<float>(p.softmax_scale) * unit;
    store_rows(own, warp, grad, {scale, scale}, results, stride * p.head_dim, work.count, p.head_dim);
  }
  if constexpr (kByWeights) {
    store_rows(own_values, warp, grad_v, {1.0f, 1.0f}, value_results, stride * p.head_dim_v, work.count, p.head_dim_v);
  }
  if (!scrubbed) return;
  __syncthreads();
  const auto cut = [&](int other) { return !whole(other); };
  for (int head = first_head; head < first_head + members; ++head) {
    if constexpr (kByScores) {
      // A special query or key makes the score special, and so its share of the gradient NaN whatever its sign.
      const Rows<T> others = kKeys ? q_rows(head) : k_rows();
      give_back_specials<float>(
          band, work.begin, work.count, p.head_dim, tile.others, [&](int j, int c) { return widen(*others.at(j, c)); },
          cut,
          [&](int i, int c, float special) {
            results[(i - work.begin) * stride * p.head_dim + c] = narrow<T>(special - special);
          });
    }
    if constexpr (kByWeights) {
      const Rows<T> others = dout_rows(head);
      give_back_specials<float>(
          band, work.begin, work.count, p.head_dim_v, tile.others,
          [&](int j, int c) { return widen(*others.at(j, c)); }, cut,
          [&](int i, int c, float special) {
            T& result = value_results[(i - work.begin) * stride * p.head_dim_v + c];
            result = narrow<T>(widen(result) + special);
          });
    }
  }
}

template <class T, int kTile, Wanted kWanted>
void run(const AttentionGradParams& g, const float* delta, Stream& stream) {
  constexpr BackwardTile tile = kTiles[kTile];
  const AttentionParams& p = g.forward;
  const Tiles tiles = Tiles::of(p, kWanted != Wanted::kQueries, kOwn);
  if (tiles.total == 0) return;
  const BackwardParams f{g,
                         delta,
                         tiles,
                         in_vectors(p.q, p.head_dim),
                         in_vectors(p.k, p.head_dim),
                         in_vectors(p.v, p.head_dim_v),
                         in_vectors(g.dout, p.head_dim_v)};
  const size_t shared = sizeof(T) * tile.dim * 2 * (kOwn + tile.stages * tile.others);
  launch(attention_backward_kernel<T, kTile, kWanted>, tiles.grid(), dim3(kThreads), shared, stream, f);
}

template <class T, int kTile>
void run_tile(const AttentionGradParams& g, const float* delta, Stream& stream) {
  if constexpr (kTiles[kTile].dim <= 128) {
    run<T, kTile, Wanted::kKeysAndValues>(g, delta, stream);
  } else {
    run<T, kTile, Wanted::kKeys>(g, delta, stream);
    run<T, kTile, Wanted::kValues>(g, delta, stream);
  }
  run<T, kTile, Wanted::kQueries>(g, delta, stream);
}

template <class T>
void run_type(const AttentionGradParams& g, const float* delta, Stream& stream) {
  const int dim = std::max(g.forward.head_dim, g.forward.head_dim_v);
  if (dim <= 64) return run_tile<T, 0>(g, delta, stream);
  if (dim <= 128) return run_tile<T, 1>(g, delta, stream);
  run_tile<T, 2>(g, delta, stream);
}

}  // namespace

void attention_backward_mma(const AttentionGradParams& g, const float* delta, Stream& stream) {
  if (g.forward.type == DType::kFloat16) return run_type<__half>(g, delta, stream);
  run_type<__nv_bfloat16>(g, delta, stream);
}

}  // namespace lcore::cuda::generic
