// Append to a paged KV cache: new tokens go to the tail; when they complete a page, the tail's and the new ones are
// written to it together, once: rounded to nearest even, or coded (encode.cuh). So a page's bytes depend on its tokens
// alone. Two launches for a prompt: a block a page that fills up, K or V, then a block a slot, a (sequence, kv head),
// for its new tail and length, which the first must not see. Of up to a page of new tokens (decode) the second does
// all. Lengths are read on the device: the host knows how many pages can fill up at most.
#include "core/cache_append.h"

#include <algorithm>

#include "cuda/generic/cache/encode.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace lcore::cuda::generic {
namespace {

constexpr int64_t kMostGrid = 65535;

struct AppendParams {
  CacheAppendParams p;
  bool fills_pages;  // the kernel of the tails
};

// K or V of one slot.
template <class T>
struct Side {
  const T* fresh;  // the new tokens
  int64_t row;
  int64_t column;
  T* tail;  // [page_size][dim]
  int dim;
  bool value;

  __device__ Side(const CacheAppendParams& p, int64_t slot, bool of_value)
      : dim(of_value ? p.head_dim_v : p.head_dim), value(of_value) {
    const Strided& x = value ? p.v : p.k;
    fresh = static_cast<const T*>(x.data) + slot / p.kv_heads * x.batch + slot % p.kv_heads * x.head;
    row = x.seq;
    column = x.dim;
    tail = static_cast<T*>(value ? p.tail_v : p.tail_k) + slot * p.pages.page_size * dim;
  }
};

__device__ int64_t new_tokens(const CacheAppendParams& p, int64_t slot) {
  return p.counts == nullptr ? p.new_tokens : p.counts[slot / p.kv_heads];
}

// Rows [begin, begin + count) as values of Out, then zeros up to `end` bytes.
template <class Out, class T>
__device__ void copy_rows(const PageRows<T>& rows, int64_t begin, int64_t count, uint8_t* out, int64_t end) {
  for (int64_t i = threadIdx.x; i < count * rows.dim; i += kEncodeThreads) {
    const T x = rows.at(static_cast<int>(begin + i / rows.dim), static_cast<int>(i % rows.dim));
    if constexpr (std::is_same_v<Out, T>)
      reinterpret_cast<Out*>(out)[i] = x;  // bit for bit
    else
      reinterpret_cast<Out*>(out)[i] = narrow<Out>(static_cast<float>(widen(x)));
  }
  const int64_t bytes = count * rows.dim * static_cast<int64_t>(sizeof(Out));
  for (int64_t i = bytes + threadIdx.x; i < end; i += kEncodeThreads) out[i] = 0;
}

template <class T>
__device__ void fill_page(const CacheAppendParams& p, const Side<T>& side, int64_t slot, int64_t page, int64_t length) {
  const KvPages& pages = p.pages;
  const int64_t begin = page * pages.page_size, waiting = length > begin ? length - begin : 0;
  const PageRows<T> rows{side.tail, waiting,     side.fresh + (begin + waiting - length) * side.row,
                         side.row,  side.column, side.dim};
  const PageFormat format = pages.format(side.value);
  const int32_t* ids = pages.page_table + slot * pages.table_width + pages.column(page);
  const bool in_parts = page < pages.plain_pages;
  if (!in_parts && !is_plain(format)) {
    uint8_t* out = p.pool + *ids * pages.page_bytes + (side.value ? pages.v_offset : 0);
    return PageEncoder<T>(format, side.value, static_cast<int>(pages.page_size), rows, out).encode();
  }
  const int64_t v_offset = in_parts ? pages.plain_v_offset : pages.v_offset, parts = in_parts ? pages.parts : 1;
  const int64_t tokens = pages.page_size / parts;
  for (int64_t part = 0; part < parts; ++part) {
    uint8_t* out = p.pool + ids[part] * pages.page_bytes + (side.value ? v_offset : 0);
    const int64_t end = side.value ? pages.page_bytes - v_offset : v_offset;
    if (in_parts)
      copy_rows<T>(rows, part * tokens, tokens, out, end);
    else if (format == PageFormat::kFloat32)
      copy_rows<float>(rows, part * tokens, tokens, out, end);
    else if (format == PageFormat::kFloat16)
      copy_rows<__half>(rows, part * tokens, tokens, out, end);
    else
      copy_rows<__nv_bfloat16>(rows, part * tokens, tokens, out, end);
  }
}

// Grid: (2 slots, pages).
template <class T>
__global__ void __launch_bounds__(kEncodeThreads, 2) fill_pages_kernel(AppendParams a) {
  const CacheAppendParams& p = a.p;
  const int64_t slot = blockIdx.x / 2, length = p.lengths[slot], end = length + new_tokens(p, slot);
  const Side<T> side(p, slot, blockIdx.x % 2 == 1);
  for (int64_t page = length / p.pages.page_size + blockIdx.y; (page + 1) * p.pages.page_size <= end;
       page += gridDim.y) {
    fill_page(p, side, slot, page, length);
  }
}

// Grid: slots.
template <class T>
__global__ void __launch_bounds__(kEncodeThreads, 2) append_tail_kernel(AppendParams a) {
  const CacheAppendParams& p = a.p;
  const int64_t slot = blockIdx.x, length = p.lengths[slot], end = length + new_tokens(p, slot);
  const int64_t size = p.pages.page_size, full = end / size * size, first = length > full ? length : full;
  for (int value = 0; value < 2; ++value) {
    const Side<T> side(p, slot, value == 1);
    for (int64_t page = length / size; a.fills_pages && (page + 1) * size <= end; ++page) {
      fill_page(p, side, slot, page, length);
    }
    __syncthreads();  // its rows have been read
    for (int64_t i = threadIdx.x; i < (end - first) * side.dim; i += kEncodeThreads) {
      const int64_t token = first + i / side.dim, c = i % side.dim;
      side.tail[(token - full) * side.dim + c] = side.fresh[(token - length) * side.row + c * side.column];
    }
  }
  if (threadIdx.x == 0) p.lengths[slot] = static_cast<int32_t>(end);
}

}  // namespace

void cache_append(const CacheAppendParams& p, Stream& stream) {
  const int64_t slots = p.batch * p.kv_heads;
  if (slots == 0 || p.new_tokens == 0) return;
  const bool few = p.new_tokens <= p.pages.page_size;
  for_float_type(p.type, "cache_append_", [&](auto zero) {
    using T = decltype(zero);
    const AppendParams params{p, few};
    if (!few) {
      const int64_t pages = std::min(p.new_tokens / p.pages.page_size + 1, kMostGrid);
      const dim3 grid(static_cast<unsigned>(2 * slots), static_cast<unsigned>(pages));
      launch(fill_pages_kernel<T>, grid, dim3(kEncodeThreads), 0, stream, params);
    }
    launch(append_tail_kernel<T>, dim3(static_cast<unsigned>(slots)), dim3(kEncodeThreads), 0, stream, params);
  });
}

}  // namespace lcore::cuda::generic
