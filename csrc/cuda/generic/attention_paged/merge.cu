// Attention over a paged cache: the choice of a kernel and of its schedule, and the folding of units that had a block
// each. All of it from what the host knows without reading the device: so a CUDA graph may hold it. Merging: a block a
// row, a thread a channel; maxima and sums of 128 units at a time come to shared memory together, and the outs of 8
// units are on their way at once.
#include "cuda/generic/attention_paged/fold.cuh"
#include "cuda/kernels.h"

namespace lcore::cuda::generic {
namespace {

constexpr int kMostDim = 512;
constexpr int kAhead = 8;
constexpr int64_t kManyBlocks = 256;  // two an SM: units need no blocks of their own
constexpr int64_t kMostPartialBytes = int64_t{256} << 20;

// Grid: slots by rows.
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(PagedParams p) {
  __shared__ float maxima[kMergeThreads];
  __shared__ float sums[kMergeThreads];
  const AttentionParams& a = p.a;
  const Slot s(p, blockIdx.x);
  const int64_t row = blockIdx.y, tile = row / p.tile_rows;
  if (row >= s.rows()) return;
  const int in_tile = static_cast<int>(row % p.tile_rows);
  const KeyRange keys = s.visible(a, tile * p.tile_rows, p.tile_rows);
  const int64_t first = keys.begin / kUnit, last = keys.begin < keys.end ? (keys.end - 1) / kUnit + 1 : first;
  for (int begin = 0; begin == 0 || begin < a.head_dim_v; begin += kMergeThreads) {
    const int c = begin + static_cast<int>(threadIdx.x);
    Fold fold;
    float out = 0;
    for (int64_t unit = first; unit < last; unit += kMergeThreads) {
      const int count = static_cast<int>(last - unit < kMergeThreads ? last - unit : kMergeThreads);
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < count) {
        const float* state = p.state(s.index, tile, unit + threadIdx.x, in_tile);
        maxima[threadIdx.x] = state[0];
        sums[threadIdx.x] = state[1];
      }
      __syncthreads();
      for (int u = 0; u < count; u += kAhead) {
        float outs[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          outs[i] = u + i < count && c < a.head_dim_v ? p.state(s.index, tile, unit + u + i, in_tile)[2 + c] : 0;
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (u + i >= count) break;
          fold.add(maxima[u + i], sums[u + i]);
          out = fold.out(out, outs[i]);
        }
      }
    }
    float lse;
    const float factor = finish(a, s.head(row), fold, lse);
    if (c < a.head_dim_v) store_out(a, out_row(a, s, row) + c, out * factor);
    if (begin == 0 && threadIdx.x == 0) store_lse(a, s, row, lse);
  }
}

}  // namespace

void attention_merge(const PagedParams& p, Stream& stream) {
  const dim3 grid(static_cast<unsigned>(p.a.batch * p.a.kv_heads),
                  static_cast<unsigned>(p.a.seq_q * (p.a.heads / p.a.kv_heads)));
  launch(merge_kernel, grid, dim3(kMergeThreads), 0, stream, p);
}

void attention_paged(const AttentionParams& a, Stream& stream) {
  const int64_t slots = a.batch * a.kv_heads, rows = a.seq_q * (a.heads / a.kv_heads);
  if (slots * rows == 0) return;
  if (a.type == DType::kFloat64 || std::max(a.head_dim, a.head_dim_v) > kMostDim) {
    throw std::runtime_error(
        "lcore.attention_paged: the CUDA kernels take float32, float16 and bfloat16 with a head_dim of at most 512; "
        "use the CPU");
  }
  PagedParams p{a, *a.pages, rows <= 4 ? 4 : 16, 0, 0, nullptr};
  p.a.pages = nullptr;
  const bool tiles = has_tiles(p);
  if (tiles) p.tile_rows = 16;
  p.row_tiles = (rows + p.tile_rows - 1) / p.tile_rows;
  const int64_t keys = (p.pages.table_width + 1) * p.pages.page_size;
  p.units = (keys + kUnit - 1) / kUnit;
  const int64_t state = (2 + a.head_dim_v) * static_cast<int64_t>(sizeof(float)) * p.tile_rows;
  const int64_t bytes = slots * p.row_tiles * p.units * state;
  if (p.units > 1 && slots * p.row_tiles < kManyBlocks && bytes <= kMostPartialBytes) {
    p.partial = static_cast<float*>(stream.scratch(static_cast<size_t>(bytes)));
  }
  tiles ? attention_tiles(p, stream) : attention_expanded(p, stream);
  if (p.partial != nullptr) attention_merge(p, stream);
}

}  // namespace lcore::cuda::generic
