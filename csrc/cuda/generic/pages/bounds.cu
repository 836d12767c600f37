// Bounds of pages of keys (Tang et al. 2024, Quest): for each page of a kv head the least and the greatest value of
// each channel, once a page is full. A block a page, a thread a channel: rows of values are read as whole lines, words
// of codes come from L1. As bfloat16 the least is rounded down and the greatest up. A NaN in a channel makes both its
// bounds NaN: nothing is known of it.
#include "core/page_bounds.h"
#include "cuda/generic/pages/reader.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace lcore::cuda::generic {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostGrid = 65535;

struct BoundsParams {
  PageBoundsParams p;  // without keys.pages, which is the host's
  KvPages pages;
  bool paged;
};

// To bfloat16 away from zero for numbers whose sign bit is `sign`, towards zero for others.
__device__ __nv_bfloat16 round_away(float x, uint32_t sign) {
  if (isnan(x)) return __float2bfloat16_rn(x);
  const uint32_t bits = __float_as_uint(x);
  return __ushort_as_bfloat16(static_cast<unsigned short>((bits + (bits >> 31 == sign ? 0xffffu : 0u)) >> 16));
}

// at(row): the channel's value in a row of the page.
template <class At>
__device__ void bound(int64_t rows, At&& at, float& least, float& most) {
  float unknown = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float x = at(r);
    least = x < least ? x : least;
    most = x > most ? x : most;
    unknown = isnan(x) ? x : unknown;
  }
  if (isnan(unknown)) least = most = unknown;
}

// Grid: (pages, slots).
template <class T>
__global__ void __launch_bounds__(kThreads) page_bounds_kernel(BoundsParams b) {
  const PageBoundsParams& p = b.p;
  const int dim = p.keys.head_dim;
  const int64_t slots = p.keys.batch * p.keys.kv_heads, count = p.last - p.first;
  for (int64_t slot = blockIdx.y; slot < slots; slot += gridDim.y) {
    const int64_t page = p.first + blockIdx.x, begin = page * p.page_size;
    const int64_t length = b.paged ? b.pages.lengths[slot] : p.keys.seq_k;
    const int64_t rows = begin + p.page_size > length ? 0 : p.page_size;
    const T* keys = static_cast<const T*>(p.keys.k.data) + slot / p.keys.kv_heads * p.keys.k.batch +
                    slot % p.keys.kv_heads * p.keys.k.head + begin * p.keys.k.seq;
    for (int c = threadIdx.x; c < dim; c += kThreads) {
      float least = rows == 0 ? 0.0f : INFINITY, most = -least;
      if (b.paged) {
        bound(
            rows,
            [&](int64_t r) {
              const auto format = plain_format(p.keys.type);
              return RowPlace(b.pages, format, slot, length, begin + r, false, dim).at(false, dim, c);
            },
            least, most);
      } else {
        bound(
            rows, [&](int64_t r) { return static_cast<float>(widen(keys[r * p.keys.k.seq + c * p.keys.k.dim])); },
            least, most);
      }
      const int64_t at = (slot * count + page - p.first) * 2 * dim + c;
      if (rows == 0) most = 0;
      if (p.type == DType::kFloat32) {
        static_cast<float*>(p.bounds)[at] = least;
        static_cast<float*>(p.bounds)[at + dim] = most;
      } else {
        static_cast<__nv_bfloat16*>(p.bounds)[at] = round_away(least, 1);
        static_cast<__nv_bfloat16*>(p.bounds)[at + dim] = round_away(most, 0);
      }
    }
  }
}

}  // namespace

void page_bounds(const PageBoundsParams& p, Stream& stream) {
  if (p.keys.pages != nullptr && p.keys.pages->before_rope()) {
    throw std::runtime_error(
        "lcore.page_bounds_paged: no CUDA kernel for bounds of keys that are stored before RoPE; use the CPU");
  }
  const int64_t slots = p.keys.batch * p.keys.kv_heads, pages = p.last - p.first;
  if (slots * pages * p.keys.head_dim == 0) return;
  BoundsParams params{p, {}, p.keys.pages != nullptr};
  if (params.paged) params.pages = *p.keys.pages;
  params.p.keys.pages = nullptr;
  const dim3 grid(static_cast<unsigned>(pages), static_cast<unsigned>(slots < kMostGrid ? slots : kMostGrid));
  for_float_type(p.keys.type, "page_bounds", [&](auto zero) {
    launch(page_bounds_kernel<decltype(zero)>, grid, dim3(kThreads), 0, stream, params);
  });
}

}  // namespace lcore::cuda::generic
