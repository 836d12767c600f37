// Compaction of a paged KV cache after eviction: in every slot, a (sequence, kv head), the tokens to keep move forward
// to the indices 0, 1, 2, ... A token never moves back, so rows are moved in order and in place; only the rows of the
// new tail are put together aside, because the tail's old rows may stand before the places they go to.
// Rows that stay in pages, or in the tail, keep their bits. A row that comes to the end of a full page is rounded as
// append does; one that returns to the tail is widened, and is the same in a page again.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/cache_compact.h"
#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

// K or V of one slot.
struct Rows {
  char* tail;          // [page_size][dim]
  DType page_type;     // of the pages
  int64_t page_begin;  // bytes from a page's start to these rows, and to the end of their padding
  int64_t page_end;
  int dim;
};

float largest(DType type) {
  return type == DType::kFloat16 ? 65504.f : type == DType::kBFloat16 ? 0x1.fep127f : 0x1.fffffep127f;
}

// Rounds to nearest even; with `bounded`, a finite value stays finite.
void convert(const char* src, DType from, char* dst, DType to, int dim, bool bounded) {
  constexpr int kPiece = 256;
  alignas(64) float values[kPiece];
  const auto bytes = [](DType type, int64_t count) { return count * static_cast<int64_t>(size_of(type)); };
  for (int done = 0; done < dim; done += kPiece) {
    const int count = std::min(kPiece, dim - done);
    load_rows<float>({src + bytes(from, done), from, count, 1}, 1, count, values, count);
    for (int c = 0; bounded && c < count; ++c) {
      if (std::isfinite(values[c])) values[c] = std::clamp(values[c], -largest(to), largest(to));
    }
    store_row(values, count, dst + bytes(to, done), to);
  }
}

void move(const CacheCompactParams& p, const Rows& rows, int64_t slot, char* new_tail) {
  const KvPages& pages = p.pages;
  const int32_t* keep = p.keep + p.offsets[slot];
  const int64_t count = p.offsets[slot + 1] - p.offsets[slot];
  const int64_t size = pages.page_size;
  const int64_t paged = pages.lengths[slot] / size * size;  // tokens in pages, before and after
  const int64_t paged_after = count / size * size;
  const int64_t page_row = rows.dim * static_cast<int64_t>(size_of(rows.page_type));
  const int64_t tail_row = rows.dim * static_cast<int64_t>(size_of(p.type));
  const auto page = [&](const int32_t* table, int64_t width, int64_t token) {
    return reinterpret_cast<char*>(p.pool) + table[slot * width + token / size] * pages.page_bytes + rows.page_begin;
  };

  for (int64_t i = 0; i < count; ++i) {
    const bool from_page = keep[i] < paged, to_page = i < paged_after;
    const char* src = from_page ? page(pages.page_table, pages.table_width, keep[i]) + keep[i] % size * page_row
                                : rows.tail + (keep[i] - paged) * tail_row;
    char* dst = to_page ? page(p.new_table, p.new_width, i) + i % size * page_row : new_tail + i % size * tail_row;
    const DType from = from_page ? rows.page_type : p.type, to = to_page ? rows.page_type : p.type;
    if (src == dst) continue;
    if (from == to) {
      std::memcpy(dst, src, to_page ? page_row : tail_row);
    } else {
      convert(src, from, dst, to, rows.dim, !to_page);
    }
    if (to_page && i % size == size - 1) {
      char* end = dst + page_row;
      std::memset(end, 0, dst - (size - 1) * page_row + (rows.page_end - rows.page_begin) - end);
    }
  }
  std::memcpy(rows.tail, new_tail, count % size * tail_row);
}

Rows rows_of(const CacheCompactParams& p, bool value, int64_t slot) {
  const KvPages& pages = p.pages;
  const int dim = value ? p.head_dim_v : p.head_dim;
  char* tail = static_cast<char*>(value ? p.tail_v : p.tail_k);
  return {tail + slot * pages.page_size * dim * static_cast<int64_t>(size_of(p.type)), plain_type(pages.format(value)),
          value ? pages.v_offset : 0, value ? pages.page_bytes : pages.v_offset, dim};
}

}  // namespace

void cache_compact(const CacheCompactParams& p, Executor& executor) {
  const int64_t tail_bytes = p.pages.page_size * std::max(p.head_dim, p.head_dim_v) * size_of(p.type);
  const Scratch scratch(tail_bytes, executor.workers());
  executor.run(p.slots, [&](int64_t slot, int worker) {
    const int64_t count = p.offsets[slot + 1] - p.offsets[slot];
    if (count == p.lengths[slot]) return;  // all stay
    move(p, rows_of(p, false, slot), slot, scratch.of(worker));
    move(p, rows_of(p, true, slot), slot, scratch.of(worker));
    const int32_t* table = p.new_table + slot * p.new_width;
    std::copy(table, table + count / p.pages.page_size, p.page_table + slot * p.pages.table_width);
    p.lengths[slot] = static_cast<int32_t>(count);
  });
}

}  // namespace lcore::cpu::LCORE_ISA
