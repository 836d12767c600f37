// Attention over a paged cache in float32, for every format, head_dim up to 512 and keys before RoPE: a block expands
// 32 keys of K at a time into shared memory, as float and rotated to their places where the cache says so, multiplies
// them with up to 16 query rows, then does the same with V. Where weights are 0 because the mask cuts a key off, its V
// is not looked at. A lane is a key for the scores and a channel for the outputs, so neither product shares sums
// between lanes and its order is fixed. This is the exact kernel; tiles.cu has the fast one for 16-bit models.
#include "cuda/generic/attention_paged/fold.cuh"
#include "cuda/generic/pages/reader.cuh"
#include "cuda/ptx/shared.h"
#include "cuda/turns.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kKeys = kWarpLanes;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpLanes;

// kRows query rows; kColumns output channels a thread.
template <int kRows, int kColumns>
class Expanded {
 public:
  static constexpr int kOwn = kRows / kWarps;  // rows whose maxima and sums a warp keeps

  __device__ Expanded(const PagedParams& params, int64_t slot, int64_t row)
      : p_(params), s_(params, slot), row_(row), lane_(threadIdx.x % kWarpLanes), warp_(threadIdx.x / kWarpLanes) {
    q_ = dynamic_shared<float>();
    weights_ = q_ + kRows * p_.a.head_dim;
    rescale_ = weights_ + kRows * kKeys;
    tile_ = rescale_ + kRows;
  }

  static size_t shared_bytes(const AttentionParams& a) {
    const int tile = kKeys * std::max(a.head_dim + 1, a.head_dim_v);
    return (kRows * (a.head_dim + kKeys + 1) + tile) * sizeof(float);
  }

  __device__ void run(int64_t unit, bool all) {
    if (row_ >= s_.rows()) return;
    const KeyRange keys = s_.visible(p_.a, row_, kRows);
    if (!all && (keys.begin >= keys.end || unit < keys.begin / kUnit || unit > (keys.end - 1) / kUnit)) return;
    load_queries();
    float total[kRows][kColumns] = {};
    Fold folds[kOwn];
    const int64_t first = all ? keys.begin / kUnit : unit, last = all ? (keys.end + kUnit - 1) / kUnit : unit + 1;
    for (int64_t u = first; u < last; ++u) {
      float out[kRows][kColumns] = {};
      float max[kOwn], sum[kOwn];
      reduce_unit(of_unit(keys, u), max, sum, out);
      if (!all) return store_partial(u, max, sum, out);
      fold_unit(max, sum, out, folds, total);
    }
    finish_rows(folds, total);
  }

 private:
  __device__ PageFormat tail_format() const {
    return p_.a.type == DType::kFloat32   ? PageFormat::kFloat32
           : p_.a.type == DType::kFloat16 ? PageFormat::kFloat16
                                          : PageFormat::kBFloat16;
  }

  // Pairs of a row in shared memory to a place; lanes share them out.
  __device__ void rotate_row(float* row, int64_t place, float scale) const {
    const Rotation& r = p_.pages.rope;
    for (int m = lane_; m < r.half; m += kWarpLanes) {
      float cosine, sine;
      turn(r, m, static_cast<double>(place), cosine, sine);
      float* x = row + (r.interleaved ? 2 * m : m);
      rotate(cosine * scale, sine * scale, x[0], x[r.interleaved ? 1 : r.half]);
    }
  }

  __device__ void load_queries() const {
    const AttentionParams& a = p_.a;
    for (int r = warp_; r < kRows; r += kWarps) {
      const int64_t row = row_ + r;
      const bool real = row < s_.rows();
      const int64_t at = s_.batch * a.q.batch + row / s_.group * a.q.seq + s_.head(row) * a.q.head;
      for (int c = lane_; c < a.head_dim; c += kWarpLanes) {
        const int64_t i = at + c * a.q.dim;
        float x = 0;
        if (real) {
          x = a.type == DType::kFloat32   ? static_cast<const float*>(a.q.data)[i]
              : a.type == DType::kFloat16 ? widen(static_cast<const __half*>(a.q.data)[i])
                                          : widen(static_cast<const __nv_bfloat16*>(a.q.data)[i]);
        }
        q_[r * a.head_dim + c] = x;
      }
      __syncwarp();
      if (p_.pages.before_rope() && real) {
        rotate_row(q_ + r * a.head_dim, p_.pages.position(s_.index, s_.place(row)),
                   static_cast<float>(p_.pages.rope.attention_scaling));
      }
    }
  }

  // Rows [key, key + kKeys) of K or V, zeros from `end` on.
  __device__ void expand(bool value, int64_t key, int64_t end, int ld) const {
    const int dim = value ? p_.a.head_dim_v : p_.a.head_dim;
    for (int r = warp_; r < kKeys; r += kWarps) {
      float* row = tile_ + r * ld;
      if (key + r >= end) {
        for (int c = lane_; c < dim; c += kWarpLanes) row[c] = 0;
        continue;
      }
      const RowPlace place(p_.pages, tail_format(), s_.index, s_.k_len, key + r, value, dim);
      for (int c = lane_; c < dim; c += kWarpLanes) row[c] = place.at(value, dim, c);
      if (value || !p_.pages.before_rope()) continue;
      __syncwarp();
      rotate_row(row, p_.pages.position(s_.index, key + r), static_cast<float>(p_.pages.rope.attention_scaling));
    }
  }

  __device__ void reduce_unit(KeyRange keys, float (&max)[kOwn], float (&sum)[kOwn], float (&out)[kRows][kColumns]) {
    const int dim = p_.a.head_dim, dim_v = p_.a.head_dim_v;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      max[r] = -INFINITY;
      sum[r] = 0;
    }
    for (int64_t key = keys.begin / kKeys * kKeys; key < keys.end; key += kKeys) {
      __syncthreads();
      expand(false, key, s_.k_len, dim + 1);
      __syncthreads();
      float dots[kOwn] = {};
      for (int c = 0; c < dim; ++c) {
        const float k = tile_[lane_ * (dim + 1) + c];
#pragma unroll
        for (int r = 0; r < kOwn; ++r) dots[r] = fmaf(q_[(warp_ * kOwn + r) * dim + c], k, dots[r]);
      }
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const int at = warp_ * kOwn + r;
        const RowScore score(p_.a, s_, row_ + at);
        const float x = score(dots[r], static_cast<int>(key) + lane_), most = fmaxf(max[r], reduce_max(x));
        const float weight = exp2f(x - reference(most)), keep = exp2f(max[r] - reference(most));
        sum[r] = fmaf(sum[r], keep, reduce_add(weight));
        max[r] = most;
        weights_[at * kKeys + lane_] = weight;
        if (lane_ == 0) rescale_[at] = keep;
      }
      __syncthreads();
      expand(true, key, s_.k_len, dim_v);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float keep = rescale_[r];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) out[r][j] *= keep;
      }
      for (int i = 0; i < kKeys; ++i) {
        float values[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int c = static_cast<int>(threadIdx.x) + j * kThreads;
          values[j] = c < dim_v ? tile_[i * dim_v + c] : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float weight = weights_[r * kKeys + i];
          if (weight == 0) continue;  // a NaN behind the mask stays there
#pragma unroll
          for (int j = 0; j < kColumns; ++j) out[r][j] = fmaf(weight, values[j], out[r][j]);
        }
      }
    }
  }

  __device__ void store_partial(int64_t unit, const float (&max)[kOwn], const float (&sum)[kOwn],
                                const float (&out)[kRows][kColumns]) const {
    const int64_t tile = row_ / kRows;
    if (lane_ == 0) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        float* state = p_.state(s_.index, tile, unit, warp_ * kOwn + r);
        state[0] = max[r];
        state[1] = sum[r];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int c = static_cast<int>(threadIdx.x) + j * kThreads;
        if (c < p_.a.head_dim_v) p_.state(s_.index, tile, unit, r)[2 + c] = out[r][j];
      }
    }
  }

  __device__ void fold_unit(const float (&max)[kOwn], const float (&sum)[kOwn], const float (&out)[kRows][kColumns],
                            Fold (&folds)[kOwn], float (&total)[kRows][kColumns]) const {
    __syncthreads();  // weights_ and rescale_ have been read
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      folds[r].add(max[r], sum[r]);
      if (lane_ == 0) {
        rescale_[warp_ * kOwn + r] = folds[r].keep;
        weights_[warp_ * kOwn + r] = folds[r].gain;
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Fold fold;
      fold.keep = rescale_[r];
      fold.gain = weights_[r];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) total[r][j] = fold.out(total[r][j], out[r][j]);
    }
  }

  __device__ void finish_rows(const Fold (&folds)[kOwn], const float (&total)[kRows][kColumns]) const {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t row = row_ + warp_ * kOwn + r;
      if (row >= s_.rows()) continue;
      float lse;
      const float factor = finish(p_.a, s_.head(row), folds[r], lse);
      if (lane_ == 0) {
        store_lse(p_.a, s_, row, lse);
        rescale_[warp_ * kOwn + r] = factor;
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row_ + r >= s_.rows()) break;
      const int64_t at = out_row(p_.a, s_, row_ + r);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int c = static_cast<int>(threadIdx.x) + j * kThreads;
        if (c < p_.a.head_dim_v) store_out(p_.a, at + c, total[r][j] * rescale_[r]);
      }
    }
  }

  const PagedParams& p_;
  Slot s_;
  int64_t row_;
  int lane_;
  int warp_;
  float* q_;        // [kRows][head_dim]
  float* weights_;  // [kRows][kKeys]
  float* rescale_;  // [kRows]
  float* tile_;     // [kKeys][head_dim + 1], or [kKeys][head_dim_v]
};

template <int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) expanded_kernel(PagedParams p) {
  const bool all = p.partial == nullptr;
  const int64_t units = all ? 1 : p.units;
  const int64_t tile = gridDim.y - 1 - blockIdx.y;  // the last rows see most: first
  Expanded<kRows, kColumns>(p, blockIdx.x / units, tile * kRows).run(blockIdx.x % units, all);
}

template <int kRows, int kColumns>
void run(const PagedParams& p, Stream& stream) {
  launch(expanded_kernel<kRows, kColumns>, grid_of(p), dim3(kThreads), Expanded<kRows, kColumns>::shared_bytes(p.a),
         stream, p);
}

template <int kRows>
void run(const PagedParams& p, Stream& stream) {
  if (p.a.head_dim_v <= kThreads) return run<kRows, 1>(p, stream);
  if (p.a.head_dim_v <= 2 * kThreads) return run<kRows, 2>(p, stream);
  run<kRows, 4>(p, stream);
}

}  // namespace

void attention_expanded(const PagedParams& p, Stream& stream) {
  p.tile_rows == 4 ? run<4>(p, stream) : run<16>(p, stream);
}

}  // namespace lcore::cuda::generic
