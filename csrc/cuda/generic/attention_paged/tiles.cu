// Attention over a paged cache for bfloat16 and float16 models, on tensor cores: pages of the model's type, int8, int4
// and int2, head_dim up to 256 in steps of 16. expanded.cu has all others.
// A block has 16 query rows and one unit of keys; each of its four warps takes tiles of keys by itself, brings their
// bytes to a ring of its own, codes as codes, and never waits for the others; their states are folded at the unit's
// end. The surprising idea is the order of a tile's keys and channels: lane t of four holds neighbours 4 t .. 4 t + 3
// of every 16, so that one word of codes, shifted and masked, is two registers of mma.sync, the scores' accumulators
// are the weights' fragments, and no format needs a shuffle. K's scales are folded into q once a tile, V's go into
// weights.
#include "cuda/generic/attention_paged/coded.cuh"
#include "cuda/generic/attention_paged/fold.cuh"
#include "cuda/generic/attention_paged/stage.cuh"
#include "cuda/ptx/ldmatrix.h"

namespace lcore::cuda::generic {
namespace {

constexpr int kRows = 16;  // of mma.sync

// T: the model's type. kDim: head_dim_v, rounded up.
template <class T, int kDim>
class Tiles {
 public:
  __device__ Tiles(const TilesParams& params, int64_t slot, int64_t row)
      : p_(params.p),
        ring_(params.ring),
        s_(params.p, slot),
        row_(row),
        lane_(static_cast<int>(threadIdx.x) % kWarpLanes),
        warp_(static_cast<int>(threadIdx.x) / kWarpLanes),
        score_{RowScore(p_.a, s_, row + lane_ / 4), RowScore(p_.a, s_, row + lane_ / 4 + 8)} {
    auto* shared = dynamic_shared<uint8_t>();
    ids_ = reinterpret_cast<int32_t*>(shared);
    states_ = reinterpret_cast<float*>(shared + ring_.states);
    totals_ = reinterpret_cast<float2*>(shared + ring_.totals);
    q_ = reinterpret_cast<uint4*>(shared + ring_.queries);
    folded_ = reinterpret_cast<uint4*>(shared + ring_.folded) + warp_ * (p_.a.head_dim / 16 * kWarpLanes);
    total_ = reinterpret_cast<float*>(shared + ring_.total);
    outs_ = reinterpret_cast<float*>(shared + ring_.stages);
    stages_ = shared + ring_.stages + warp_ * kStages * ring_.stage_bytes;
  }

  __device__ void run(int64_t unit, bool all) {
    if (row_ >= s_.rows()) return;
    const KeyRange keys = s_.visible(p_.a, row_, kRows);
    if (!all && (keys.begin >= keys.end || unit < keys.begin / kUnit || unit > (keys.end - 1) / kUnit)) return;
    load_queries();
    const int64_t first = all ? keys.begin / kUnit : unit, last = all ? (keys.end + kUnit - 1) / kUnit : unit + 1;
    if (all) {
      for (int i = threadIdx.x; i < kRows * p_.a.head_dim_v; i += kTileThreads) total_[i] = 0;
      if (threadIdx.x < kRows) totals_[threadIdx.x] = make_float2(-INFINITY, 0);
    }
    for (int64_t u = first; u < last; ++u) {
      clear();
      reduce(of_unit(keys, u), u * kUnit);
      __syncthreads();  // every warp has done with its ring
      leave_state();
      __syncthreads();
      join_warps(u, all, totals_ + (u - first) % 2 * kRows, totals_ + (u - first + 1) % 2 * kRows);
      __syncthreads();
    }
    if (all) finish_rows(totals_ + (last - first) % 2 * kRows);
  }

 private:
  __device__ int group_lane() const { return lane_ / 4; }
  __device__ int quad_lane() const { return lane_ % 4; }

  // Fragments of q: of each 16 channels lane t holds 4 t .. 4 t + 3 of rows g and g + 8.
  __device__ void load_queries() const {
    const AttentionParams& a = p_.a;
    for (int i = threadIdx.x; i < a.head_dim / 16 * kWarpLanes; i += kTileThreads) {
      const int lane = i % kWarpLanes, c = i / kWarpLanes * 16 + lane % 4 * 4;
      T x[2][4];
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row_ + lane / 4 + 8 * half;
        const T* q =
            static_cast<const T*>(a.q.data) + s_.batch * a.q.batch + row / s_.group * a.q.seq + s_.head(row) * a.q.head;
        for (int j = 0; j < 4; ++j) x[half][j] = row < s_.rows() ? q[(c + j) * a.q.dim] : narrow<T>(0.0f);
      }
      q_[i] = make_uint4(pair_of(x[0][0], x[0][1]), pair_of(x[1][0], x[1][1]), pair_of(x[0][2], x[0][3]),
                         pair_of(x[1][2], x[1][3]));
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] = 0;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max_[h] = -INFINITY;
      sum_[h] = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) shift_[g][h] = 0;
    }
  }

  // The unit's tiles whose turn is this warp's.
  __device__ void reduce(KeyRange keys, int64_t unit_begin) {
    const TileList tiles(p_.pages, s_.k_len, ring_);
    const PageIds ids = load_ids(p_.pages, s_.index, s_.k_len, unit_begin, ids_);
    __syncthreads();
    int64_t ahead = tiles.first(keys, warp_), now = ahead;
    for (int stage = 0; stage < kStages - 1; ++stage) ahead = issue(tiles, ids, keys, ahead, stage);
    for (int step = 0; now < keys.end; ++step) {
      ahead = issue(tiles, ids, keys, ahead, (step + kStages - 1) % kStages);
      cp_async_wait<kStages - 1>();
      __syncwarp();
      add_tile(tiles.at(now), stages_ + step % kStages * ring_.stage_bytes);
      __syncwarp();
      now = tiles.next(now, keys, warp_);
    }
    cp_async_wait<0>();
  }

  // Begins to bring a tile; the warp's next one after it.
  __device__ int64_t issue(const TileList& tiles, const PageIds& ids, KeyRange keys, int64_t key, int stage) const {
    if (key < keys.end) {
      bring_tile(p_, s_.index, s_.k_len, tiles.at(key), ids, ring_, stages_ + stage * ring_.stage_bytes, lane_);
      key = tiles.next(key, keys, warp_);
    }
    cp_async_commit();
    return key;
  }

  __device__ void add_tile(const Tile& tile, const uint8_t* stage) {
    const uint8_t* values = stage + ring_.v_begin;
    float bias[2] = {0, 0};
    if (tile.k_coded) {
      fold_scales(p_.pages.k_format, stage, tile.keys, bias);
      __syncwarp();
    }
    for (int begin = 0; begin < tile.keys; begin += 16) {
      float scores[2][4] = {};
      if (tile.k_coded)
        multiply_codes(p_.pages.k_format, stage, tile.keys, begin, scores);
      else
        multiply_keys(stage, scores);
      weigh(static_cast<int>(tile.begin) + begin, bias, scores);
      if (tile.v_coded)
        add_coded_values(p_.pages.v_format, values, tile.keys, begin, scores);
      else
        add_values(values, scores);
    }
    __syncwarp();
  }

  // q times K's scales, and a row's sum of q times what the code 0 stands for.
  __device__ void fold_scales(PageFormat format, const uint8_t* stage, int keys, float (&bias)[2]) const {
    const int dim = p_.a.head_dim;
    const auto* scales = reinterpret_cast<const __half*>(stage + key_words(format, dim) * keys * 4);
    const float centre = centre_of(format);
    for (int k = 0; k < dim / 16; ++k) {
      const uint4 q = q_[k * kWarpLanes + lane_];
      const uint32_t pairs[4] = {q.x, q.y, q.z, q.w};
      uint32_t out[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = 16 * k + 4 * quad_lane() + 2 * j;
        const float2 scale = halves_at(scales + c), zero = halves_at(scales + dim + c);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 x = values_of<T>(pairs[2 * j + h]);
          out[2 * j + h] = pair_of<__nv_bfloat16>(x.x * scale.x, x.y * scale.y);
          bias[h] = fmaf(x.x, fmaf(centre, scale.x, zero.x), bias[h]);
          bias[h] = fmaf(x.y, fmaf(centre, scale.y, zero.y), bias[h]);
        }
      }
      folded_[k * kWarpLanes + lane_] = make_uint4(out[0], out[1], out[2], out[3]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) bias[h] = quad_sum(bias[h]);
  }

  // Of 16 keys: column 2 t + i of the h-th accumulator is key 4 t + 2 h + i.
  __device__ int key_of_lane(int h) const { return 4 * (group_lane() / 2) + 2 * h + group_lane() % 2; }

  __device__ void multiply_codes(PageFormat format, const uint8_t* stage, int keys, int begin,
                                 float (&scores)[2][4]) const {
    const auto* words = reinterpret_cast<const uint32_t*>(stage);
    for (int k = 0; k < p_.a.head_dim / 16; ++k) {
      const uint4 q = folded_[k * kWarpLanes + lane_];
      const uint32_t a[4] = {q.x, q.y, q.z, q.w};
      const CodePlace place(format, 16 * k + 4 * quad_lane());
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t b[2];
        code_pairs(format, words[word_at(place.row, begin + key_of_lane(h), keys)] >> place.shift, b);
        mma_m16n8k16_bf16(scores[h], a, b);
      }
    }
  }

  __device__ void multiply_keys(const uint8_t* stage, float (&scores)[2][4]) const {
    for (int k = 0; k < p_.a.head_dim / 16; ++k) {
      const uint4 q = q_[k * kWarpLanes + lane_];
      const uint32_t a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = key_of_lane(h);
        const uint8_t* at = stage + value_at(row, 2 * k + quad_lane() / 2, ring_.k_row) + quad_lane() % 2 * 8;
        const uint2 pairs = *reinterpret_cast<const uint2*>(at);
        const uint32_t b[2] = {pairs.x, pairs.y};
        multiply<T>(scores[h], a, b);
      }
    }
  }

  // Scores of 16 keys become weights; what was summed so far is rescaled where a row's maximum has grown.
  __device__ void weigh(int key, const float (&bias)[2], float (&scores)[2][4]) {
    float keep[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = max_[r];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = scores[h][2 * r + i];
          x = score_[r](x + bias[r], key + 4 * quad_lane() + 2 * h + i);
          most = fmaxf(most, x);
        }
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      keep[r] = exp2f(max_[r] - reference(most));
      max_[r] = most;
      float sum = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scores[h][2 * r + i] = exp2f(scores[h][2 * r + i] - reference(most));
          sum += scores[h][2 * r + i];
        }
      }
      sum_[r] = fmaf(sum_[r], keep[r], sum);
    }
    if (__all_sync(kAllLanes, keep[0] == 1 && keep[1] == 1)) return;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] *= keep[i / 2];
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      shift_[g][0] *= keep[0];
      shift_[g][1] *= keep[1];
    }
  }

  __device__ void add_values(const uint8_t* stage, const float (&weights)[2][4]) {
    const uint32_t a[4] = {pair_of<T>(weights[0][0], weights[0][1]), pair_of<T>(weights[0][2], weights[0][3]),
                           pair_of<T>(weights[1][0], weights[1][1]), pair_of<T>(weights[1][2], weights[1][3])};
    // Row i of a matrix is key 4 (i / 2) + i % 2, of the second one two keys further; then 8 channels further.
    const int row = 4 * (lane_ % 8 / 2) + lane_ % 2 + 2 * (lane_ / 8 % 2);
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      if (8 * n >= p_.a.head_dim_v) break;
      uint32_t b[4];
      ldmatrix_trans(b, stage + value_at(row, n + lane_ / 16, ring_.v_row));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      multiply<T>(out_[n], a, first);
      multiply<T>(out_[n + 1], a, second);
    }
  }

  __device__ void add_coded_values(PageFormat format, const uint8_t* stage, int keys, int begin,
                                   const float (&weights)[2][4]) {
    const int dim = p_.a.head_dim_v, groups = static_cast<int>(value_groups(dim));
    const auto* words = reinterpret_cast<const uint32_t*>(stage);
    const auto* scales = reinterpret_cast<const __half*>(stage + keys / (2 * planes_of(format)) * dim * 4);
    const CodePlace place(format, begin + 4 * quad_lane());
    const float centre = centre_of(format);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g >= groups) break;
      uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = g * keys + begin + 4 * quad_lane() + 2 * h;
        const float2 scale = halves_at(scales + at), zero = halves_at(scales + groups * keys + at);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float x = weights[h][2 * r], y = weights[h][2 * r + 1];
          a[2 * h + r] = pair_of<__nv_bfloat16>(x * scale.x, y * scale.y);
          shift_[g][r] = fmaf(x, fmaf(centre, scale.x, zero.x), shift_[g][r]);
          shift_[g][r] = fmaf(y, fmaf(centre, scale.y, zero.y), shift_[g][r]);
        }
      }
#pragma unroll
      for (int n = 8 * g; n < 8 * g + 8; ++n) {
        if (8 * n >= dim) break;
        uint32_t b[2];
        code_pairs(format, words[word_at(place.row, 8 * n + group_lane(), dim)] >> place.shift, b);
        mma_m16n8k16_bf16(out_[n], a, b);
      }
    }
  }

  __device__ float quad_sum(float x) const {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
  }

  // This warp's state, to shared memory where the ring was.
  __device__ void leave_state() {
    const int dim = p_.a.head_dim_v;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(sum_[r]);
      const int row = group_lane() + 8 * r;
      if (quad_lane() == 0) {
        states_[2 * (warp_ * kRows + row)] = max_[r];
        states_[2 * (warp_ * kRows + row) + 1] = sum;
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float shift = quad_sum(shift_[g][r]);
#pragma unroll
        for (int n = 8 * g; n < 8 * g + 8; ++n) {
          if (8 * n >= dim) break;
          float* out = outs_ + (warp_ * kRows + row) * dim + 8 * n + 2 * quad_lane();
          out[0] = out_[n][2 * r] + shift;
          out[1] = out_[n][2 * r + 1] + shift;
        }
      }
    }
  }

  // The warps' states folded in order: a partial state, or added to the total, whose maxima and sums move on to
  // `after`.
  __device__ void join_warps(int64_t unit, bool all, const float2* before, float2* after) const {
    const int dim = p_.a.head_dim_v;
#pragma unroll 1
    for (int row = 0; row < kRows; ++row) {
      if (row_ + row >= s_.rows()) break;
      Fold fold;
      float keep[kTileWarps], gain[kTileWarps];
#pragma unroll
      for (int w = 0; w < kTileWarps; ++w) {
        fold.add(states_[2 * (w * kRows + row)], states_[2 * (w * kRows + row) + 1]);
        keep[w] = fold.keep;
        gain[w] = fold.gain;
      }
      Fold total;
      if (all) {
        total.max = before[row].x;
        total.sum = before[row].y;
        total.add(fold.max, fold.sum);
        if (threadIdx.x == 0) after[row] = make_float2(total.max, total.sum);
      }
      float* state = all ? nullptr : p_.state(s_.index, row_ / kRows, unit, row);
      for (int c = threadIdx.x; c < dim; c += kTileThreads) {
        float out = 0;
#pragma unroll
        for (int w = 0; w < kTileWarps; ++w) {
          out = fmaf(outs_[(w * kRows + row) * dim + c], gain[w], out * keep[w]);
        }
        if (all)
          total_[row * dim + c] = total.out(total_[row * dim + c], out);
        else
          state[2 + c] = out;
      }
      if (!all && threadIdx.x == 0) {
        state[0] = fold.max;
        state[1] = fold.sum;
      }
    }
  }

  __device__ void finish_rows(const float2* totals) const {
    const int dim = p_.a.head_dim_v;
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = row_ + r;
      if (row >= s_.rows()) break;
      Fold total;
      total.max = totals[r].x;
      total.sum = totals[r].y;
      float lse;
      const float factor = finish(p_.a, s_.head(row), total, lse);
      for (int c = threadIdx.x; c < dim; c += kTileThreads) {
        store_out(p_.a, out_row(p_.a, s_, row) + c, total_[r * dim + c] * factor);
      }
      if (threadIdx.x == 0) store_lse(p_.a, s_, row, lse);
    }
  }

  static constexpr int kGroups = kDim / kValueGroup;

  const PagedParams& p_;
  const Ring& ring_;
  Slot s_;
  int64_t row_;
  int lane_;
  int warp_;
  RowScore score_[2];
  int32_t* ids_;     // pages of the unit
  float* states_;    // [warps][kRows]: max, sum
  float2* totals_;   // [2][kRows]: max and sum of the units so far, of every other unit
  uint4* q_;         // [head_dim / 16][lanes]
  uint4* folded_;    // the same, times the scales of the warp's tile
  float* total_;     // [kRows][head_dim_v]
  float* outs_;      // [warps][kRows][head_dim_v], where the rings are
  uint8_t* stages_;  // the warp's ring
  float out_[kDim / 8][4];
  float max_[2];
  float sum_[2];             // of this lane's keys
  float shift_[kGroups][2];  // what every channel of a group is more: weights times zeros, of this lane's keys
};

template <class T, int kDim>
__global__ void __launch_bounds__(kTileThreads, 2) tiles_kernel(TilesParams params) {
  const bool all = params.p.partial == nullptr;
  const int64_t units = all ? 1 : params.p.units;
  const int64_t tile = gridDim.y - 1 - blockIdx.y;  // the last rows see most: first
  Tiles<T, kDim>(params, blockIdx.x / units, tile * kRows).run(blockIdx.x % units, all);
}

template <class T>
void run(const TilesParams& params, Stream& stream) {
  const int dim = params.p.a.head_dim_v;
  const auto kernel = dim <= 64 ? tiles_kernel<T, 64> : dim <= 128 ? tiles_kernel<T, 128> : tiles_kernel<T, 256>;
  launch(kernel, grid_of(params.p), dim3(kTileThreads), params.ring.shared_bytes, stream, params);
}

}  // namespace

bool has_tiles(const PagedParams& p) {
  const AttentionParams& a = p.a;
  const KvPages& pages = p.pages;
  if (a.type != DType::kBFloat16 && a.type != DType::kFloat16) return false;
  const auto readable = [&](PageFormat format) { return is_integer(format) || format == plain_format(a.type); };
  const auto fits = [](int dim) { return dim % 16 == 0 && dim > 0 && dim <= 256; };
  const int64_t part = pages.plain_pages > 0 ? pages.page_size / pages.parts : pages.page_size;
  return readable(pages.k_format) && readable(pages.v_format) && fits(a.head_dim) && fits(a.head_dim_v) &&
         !pages.before_rope() && pages.page_size % 16 == 0 && part % 16 == 0 && kUnit % pages.page_size == 0;
}

void attention_tiles(const PagedParams& p, Stream& stream) {
  const TilesParams params{p, Ring::lay_out(p)};
  p.a.type == DType::kFloat16 ? run<__half>(params, stream) : run<__nv_bfloat16>(params, stream);
}

}  // namespace lcore::cuda::generic
