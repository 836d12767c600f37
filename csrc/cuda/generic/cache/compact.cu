// Compaction of a paged KV cache after eviction: in every slot, a (sequence, kv head), the tokens to keep move forward
// to the indices 0, 1, 2, ... in place. Columns do not mix: a block has 64 of them of one slot's K or V and walks over
// the tokens 32 at a time, all read before any is written; a token never moves back, so what later steps read is still
// there. The new tail is put together aside, because the tail's old rows may stand before the places they go to; a
// second launch copies it, the table and the length, once nobody reads the old ones.
// Bits stay where a row keeps its type; a row that comes to the end of a full page is rounded as append does, one that
// returns to the tail is widened, and finite where it was.
#include "core/cache_compact.h"

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/numeric.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 64;
constexpr int kEach = 8;  // rows a thread
constexpr int kRows = kThreads / kColumns * kEach;

struct CompactParams {
  CacheCompactParams p;
  uint8_t* new_tails;  // [2][slots][page_size][most_dim] of p.type
  int most_dim;
};

// K or V of one slot.
struct Rows {
  uint8_t* tail;
  uint8_t* new_tail;
  DType page_type;
  int64_t page_begin;  // bytes from a page's start to these rows, and to the end of their padding
  int64_t page_end;
  int dim;

  __device__ Rows(const CompactParams& c, int64_t slot, bool value) {
    const KvPages& pages = c.p.pages;
    const auto size = static_cast<int64_t>(size_of(c.p.type));
    dim = value ? c.p.head_dim_v : c.p.head_dim;
    tail = static_cast<uint8_t*>(value ? c.p.tail_v : c.p.tail_k) + slot * pages.page_size * dim * size;
    new_tail = c.new_tails + ((value ? c.p.slots : 0) + slot) * pages.page_size * c.most_dim * size;
    page_type = plain_type(pages.format(value));
    page_begin = value ? pages.v_offset : 0;
    page_end = value ? pages.page_bytes : pages.v_offset;
  }
};

__device__ uint32_t load_bits(const uint8_t* p, DType type) {
  return type == DType::kFloat32 ? *reinterpret_cast<const uint32_t*>(p) : *reinterpret_cast<const uint16_t*>(p);
}
__device__ void store_bits(uint8_t* p, DType type, uint32_t bits) {
  if (type == DType::kFloat32)
    *reinterpret_cast<uint32_t*>(p) = bits;
  else
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(bits);
}

// Rounds to nearest even; with `bounded`, a finite value stays finite.
__device__ uint32_t convert(uint32_t bits, DType from, DType to, bool bounded) {
  if (from == to) return bits;
  const auto low = static_cast<unsigned short>(bits);
  float x = from == DType::kFloat32   ? __uint_as_float(bits)
            : from == DType::kFloat16 ? __half2float(__ushort_as_half(low))
                                      : __bfloat162float(__ushort_as_bfloat16(low));
  const float most = to == DType::kFloat16 ? 65504.f : to == DType::kBFloat16 ? 0x1.fep127f : 0x1.fffffep127f;
  if (bounded && isfinite(x)) x = fminf(fmaxf(x, -most), most);
  return to == DType::kFloat32   ? __float_as_uint(x)
         : to == DType::kFloat16 ? __half_as_ushort(__float2half_rn(x))
                                 : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Where tokens of one slot are and go.
struct Moves {
  const CompactParams& c;
  const Rows& rows;
  int64_t slot;
  const int32_t* keep;
  int64_t count;
  int64_t paged;  // tokens in pages, before and after
  int64_t paged_after;

  __device__ Moves(const CompactParams& all, const Rows& side, int64_t at) : c(all), rows(side), slot(at) {
    const int64_t size = c.p.pages.page_size;
    keep = c.p.keep + c.p.offsets[slot];
    count = c.p.offsets[slot + 1] - c.p.offsets[slot];
    paged = c.p.lengths[slot] / size * size;
    paged_after = count / size * size;
  }
  __device__ DType from(int64_t i) const { return keep[i] < paged ? rows.page_type : c.p.type; }
  __device__ DType to(int64_t i) const { return i < paged_after ? rows.page_type : c.p.type; }
  __device__ const uint8_t* source(int64_t i) const {
    if (keep[i] >= paged) return row(rows.tail, c.p.type, keep[i] - paged);
    return row(page(c.p.pages.page_table, c.p.pages.table_width, keep[i]), rows.page_type,
               keep[i] % c.p.pages.page_size);
  }
  __device__ uint8_t* target(int64_t i) const {
    if (i >= paged_after) return row(rows.new_tail, c.p.type, i - paged_after);
    return row(page(c.p.new_table, c.p.new_width, i), rows.page_type, i % c.p.pages.page_size);
  }
  __device__ uint8_t* page(const int32_t* table, int64_t width, int64_t token) const {
    const KvPages& pages = c.p.pages;
    return c.p.pool + table[slot * width + token / pages.page_size] * pages.page_bytes + rows.page_begin;
  }
  __device__ uint8_t* row(uint8_t* base, DType type, int64_t r) const {
    return base + r * rows.dim * static_cast<int64_t>(size_of(type));
  }
};

// Grid: (slots, K and V, columns).
__global__ void __launch_bounds__(kThreads) move_rows_kernel(CompactParams c) {
  const int64_t slot = blockIdx.x;
  const Rows rows(c, slot, blockIdx.y == 1);
  const Moves moves(c, rows, slot);
  if (moves.count == c.p.lengths[slot]) return;  // all stay
  const int column = static_cast<int>(blockIdx.z) * kColumns + static_cast<int>(threadIdx.x) % kColumns;
  for (int64_t begin = 0; begin < moves.count; begin += kRows) {
    uint32_t bits[kEach];
    const auto each = [&](auto&& fn) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t i = begin + threadIdx.x / kColumns + j * (kThreads / kColumns);
        if (i < moves.count && column < rows.dim) fn(i, bits[j]);
      }
    };
    each([&](int64_t i, uint32_t& x) {
      x = load_bits(moves.source(i) + column * static_cast<int64_t>(size_of(moves.from(i))), moves.from(i));
    });
    __syncthreads();
    each([&](int64_t i, uint32_t x) {
      uint8_t* to = moves.target(i) + column * static_cast<int64_t>(size_of(moves.to(i)));
      store_bits(to, moves.to(i), convert(x, moves.from(i), moves.to(i), i >= moves.paged_after));
    });
  }
  // Padding of pages whose last row has moved.
  if (blockIdx.z > 0) return;
  const int64_t size = c.p.pages.page_size;
  const int64_t end = size * rows.dim * static_cast<int64_t>(size_of(rows.page_type));
  for (int64_t i = size - 1; i < moves.paged_after; i += size) {
    if (moves.source(i) == moves.target(i)) continue;
    uint8_t* page = moves.page(c.p.new_table, c.p.new_width, i);
    for (int64_t b = end + threadIdx.x; b < rows.page_end - rows.page_begin; b += kThreads) page[b] = 0;
  }
}

// Grid: slots.
__global__ void __launch_bounds__(kThreads) finish_kernel(CompactParams c) {
  const int64_t slot = blockIdx.x, size = c.p.pages.page_size;
  const int64_t count = c.p.offsets[slot + 1] - c.p.offsets[slot];
  if (count == c.p.lengths[slot]) return;
  for (int value = 0; value < 2; ++value) {
    const Rows rows(c, slot, value == 1);
    const int64_t bytes = count % size * rows.dim * static_cast<int64_t>(size_of(c.p.type));
    for (int64_t i = threadIdx.x; i < bytes / 2; i += kThreads) {
      reinterpret_cast<uint16_t*>(rows.tail)[i] = reinterpret_cast<const uint16_t*>(rows.new_tail)[i];
    }
  }
  for (int64_t i = threadIdx.x; i < count / size; i += kThreads) {
    c.p.page_table[slot * c.p.pages.table_width + i] = c.p.new_table[slot * c.p.new_width + i];
  }
  __syncthreads();  // every thread has read the length
  if (threadIdx.x == 0) c.p.lengths[slot] = static_cast<int32_t>(count);
}

}  // namespace

void cache_compact(const CacheCompactParams& p, Stream& stream) {
  if (p.slots == 0) return;
  const int most = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  const CompactParams params{
      p, static_cast<uint8_t*>(stream.scratch(2 * p.slots * p.pages.page_size * most * size_of(p.type))), most};
  const dim3 grid(static_cast<unsigned>(p.slots), 2, static_cast<unsigned>((most + kColumns - 1) / kColumns));
  launch(move_rows_kernel, grid, dim3(kThreads), 0, stream, params);
  launch(finish_kernel, dim3(static_cast<unsigned>(p.slots)), dim3(kThreads), 0, stream, params);
}

}  // namespace lcore::cuda::generic
