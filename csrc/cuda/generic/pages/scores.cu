// Upper bounds of the scores in a page (Tang et al. 2024, Quest): with m and M the page's least and greatest key
// channels, u = softmax_scale sum_c (q+ M + q- m) >= softmax_scale q . k for each k of the page, the largest over the
// queries and, unless per_head, the heads of the group. All of it rounds upward (fma.rp), so the result is not below
// the exact sum. What is not a number becomes +inf: such a page must be read.
// A warp a page: its bounds stay in registers, 4 channels a lane and step, while it walks over the rows of q.
#include "core/page_bounds.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kWarps = 8;
constexpr int64_t kMostGrid = 65535;

template <class T, class Bound>
__device__ float row_bound(const PageScoresParams& p, const T* q, const Bound* bounds, float sign, int lane) {
  float above = 0, below = 0;
  for (int c = lane; c < p.head_dim; c += kWarpLanes) {
    const float x = sign * static_cast<float>(widen(q[c * p.q.dim]));
    const float plus = x < 0.0f ? 0.0f : x, minus = x > 0.0f ? 0.0f : x;  // a NaN is in both
    above = __fmaf_ru(plus, widen(bounds[p.head_dim + c]), above);
    below = __fmaf_ru(minus, widen(bounds[c]), below);
  }
  float sum = __fadd_ru(above, below);
  for (int step = kWarpLanes / 2; step > 0; step /= 2) sum = __fadd_ru(sum, __shfl_xor_sync(kAllLanes, sum, step));
  return isnan(sum) ? INFINITY : sum;
}

// Grid: (pages / warps, slots or heads).
template <class T, class Bound>
__global__ void __launch_bounds__(kWarps* kWarpLanes) page_scores_kernel(PageScoresParams p) {
  const int64_t page = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpLanes, group = p.heads / p.kv_heads;
  const int lane = threadIdx.x % kWarpLanes;
  if (page >= p.pages) return;
  const int64_t columns = p.per_head ? p.heads : p.kv_heads;
  for (int64_t i = blockIdx.y; i < p.batch * columns; i += gridDim.y) {
    const int64_t batch = i / columns, first = p.per_head ? i % columns : i % columns * group;
    const int64_t heads = p.per_head ? 1 : group, kv_head = first / group, slot = batch * p.kv_heads + kv_head;
    const int64_t rows = p.q_lengths == nullptr ? p.seq_q : p.q_lengths[batch];
    const int64_t held = p.page_counts == nullptr ? p.pages : p.page_counts[slot];
    const auto* bounds = static_cast<const Bound*>(p.bounds.data) + batch * p.bounds.batch + kv_head * p.bounds.head +
                         page * p.bounds.seq;
    // A negative scale turns the greatest score into the least: turn the queries instead.
    const float sign = p.softmax_scale < 0 ? -1.0f : 1.0f;
    float best = -INFINITY;
    for (int64_t row = 0; row < rows && page < held; ++row) {
      for (int64_t h = first; h < first + heads; ++h) {
        const T* q = static_cast<const T*>(p.q.data) + batch * p.q.batch + row * p.q.seq + h * p.q.head;
        best = fmaxf(best, row_bound(p, q, bounds, sign, lane));
      }
    }
    if (lane != 0) continue;
    const double scale = sign * p.softmax_scale, product = best * scale;
    float score = __double2float_ru(product);
    if (score == product && fma(best, scale, -product) > 0) score = nextafterf(score, INFINITY);
    p.scores[i * p.pages + page] = best == -INFINITY ? best : (isnan(score) ? INFINITY : score);
  }
}

}  // namespace

void page_scores(const PageScoresParams& p, Stream& stream) {
  const int64_t items = p.batch * (p.per_head ? p.heads : p.kv_heads);
  if (items * p.pages == 0) return;
  const dim3 grid(static_cast<unsigned>((p.pages + kWarps - 1) / kWarps),
                  static_cast<unsigned>(items < kMostGrid ? items : kMostGrid));
  for_float_type(p.type, "page_scores", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      const bool wide = p.bounds_type == DType::kFloat32;
      launch(wide ? page_scores_kernel<T, float> : page_scores_kernel<T, __nv_bfloat16>, grid,
             dim3(kWarps * kWarpLanes), 0, stream, p);
    }
  });
}

}  // namespace lcore::cuda::generic
