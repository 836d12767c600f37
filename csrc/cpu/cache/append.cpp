// Append to a paged KV cache: new tokens go to the tail; when they complete a page, the tail's and the new tokens are
// written to it together, once: rounded to nearest even, or coded (encode.h). So a page's bytes depend on its tokens
// alone, not on how they arrived. One item a (sequence, kv head): their tails, pages and lengths are disjoint.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/cache_append.h"
#include "core/executor.h"
#include "cpu/cache/encode.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

// Below this many bytes of k and v, waking another thread costs more than the copy.
constexpr int64_t kInlineBytes = 64 << 10;

// The same type: bit for bit, NaN payloads included.
template <class T>
void copy_row(const T* src, int64_t stride, T* dst, int cols) {
  if (stride == 1) {
    std::memcpy(dst, src, cols * sizeof(T));
    return;
  }
  for (int c = 0; c < cols; ++c) dst[c] = src[c * stride];
}

template <class In, class Out>
void copy_row(const In* src, int64_t stride, Out* dst, int cols) {
  int c = 0;
  if constexpr (!std::is_same_v<In, double> && !std::is_same_v<Out, double>) {
    for (; stride == 1 && c + kLanes<float> <= cols; c += kLanes<float>) {
      if constexpr (std::is_same_v<Out, float>) {
        store(dst + c, load_float(src + c));
      } else {
        store_half(dst + c, load_float(src + c));
      }
    }
  }
  for (; c < cols; ++c) narrow(widen(src[c * stride]), dst + c);
}

// out[r][c] = in(r, c), rows contiguous in out.
void copy_rows(const RowsIn& in, int64_t rows, int cols, void* out, DType out_type) {
  with_type(in.data, in.type, [&](const auto* src) {
    with_type(out, out_type, [&](const auto* typed) {
      auto* dst = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>*>(typed);
      for (int64_t r = 0; r < rows; ++r) copy_row(src + r * in.row_stride, in.col_stride, dst + r * cols, cols);
    });
  });
}

// K or V of one (sequence, kv head).
struct Side {
  RowsIn fresh;  // the new tokens
  int dim;
  char* tail;  // [page_size][dim]
  bool value;
};

char* row_of(char* data, DType type, int64_t row, int dim) {
  return data + row * dim * static_cast<int64_t>(size_of(type));
}

RowsIn from_row(const RowsIn& rows, int64_t row) {
  const int64_t offset = row * rows.row_stride * static_cast<int64_t>(size_of(rows.type));
  return {static_cast<const char*>(rows.data) + offset, rows.type, rows.row_stride, rows.col_stride};
}

// The tokens of a page: `count` of them wait in the tail, the others are new.
struct PageRows {
  RowsIn waiting;
  int64_t count;
  RowsIn fresh;

  // Rows [begin, begin + rows) to out.
  void copy(int64_t begin, int64_t rows, int dim, char* out, DType type) const {
    const int64_t old = std::clamp<int64_t>(count - begin, 0, rows);
    copy_rows(from_row(waiting, begin), old, dim, out, type);
    copy_rows(from_row(fresh, std::max<int64_t>(begin - count, 0)), rows - old, dim, row_of(out, type, old, dim), type);
  }
};

// `rows` is scratch for a page of float rows, used where they are coded.
void fill_page(const CacheAppendParams& p, const Side& side, int64_t slot, int64_t page, const PageRows& in,
               float* rows) {
  const KvPages& pages = p.pages;
  const PageFormat format = pages.format(side.value);
  const int32_t* ids = pages.page_table + slot * pages.table_width + pages.column(page);
  const bool in_parts = page < pages.plain_pages;
  const auto place = [&](int64_t part, int64_t offset) {
    return reinterpret_cast<char*>(p.pool) + ids[part] * pages.page_bytes + offset;
  };
  if (!in_parts && !is_plain(format)) {
    in.copy(0, pages.page_size, side.dim, reinterpret_cast<char*>(rows), DType::kFloat32);
    auto* codes = reinterpret_cast<uint8_t*>(place(0, side.value ? pages.v_offset : 0));
    PageEncoder(format, side.value, static_cast<int>(pages.page_size), side.dim, codes).encode(rows);
    return;
  }
  const DType type = in_parts ? p.type : plain_type(format);
  const int64_t v_offset = in_parts ? pages.plain_v_offset : pages.v_offset, parts = in_parts ? pages.parts : 1;
  const int64_t tokens = pages.page_size / parts;
  for (int64_t part = 0; part < parts; ++part) {
    char* out = place(part, side.value ? v_offset : 0);
    in.copy(part * tokens, tokens, side.dim, out, type);
    char* padding = row_of(out, type, tokens, side.dim);
    std::memset(padding, 0, place(part, side.value ? pages.page_bytes : v_offset) - padding);
  }
}

void append(const CacheAppendParams& p, const Side& side, int64_t slot, int64_t count, float* rows) {
  const KvPages& pages = p.pages;
  int64_t length = pages.lengths[slot];
  for (int64_t done = 0; done < count;) {
    const int64_t waiting = length % pages.page_size;
    const int64_t take = std::min(count - done, pages.page_size - waiting);
    const RowsIn fresh = from_row(side.fresh, done);
    if (waiting + take == pages.page_size) {
      fill_page(p, side, slot, length / pages.page_size, {{side.tail, p.type, side.dim, 1}, waiting, fresh}, rows);
    } else {
      copy_rows(fresh, take, side.dim, row_of(side.tail, p.type, waiting, side.dim), p.type);
    }
    done += take;
    length += take;
  }
}

Side side_of(const CacheAppendParams& p, bool value, int64_t batch, int64_t head) {
  const Strided& x = value ? p.v : p.k;
  const int dim = value ? p.head_dim_v : p.head_dim;
  const int64_t offset = (batch * x.batch + head * x.head) * static_cast<int64_t>(size_of(p.type));
  char* tail = static_cast<char*>(value ? p.tail_v : p.tail_k);
  return {{static_cast<const char*>(x.data) + offset, p.type, x.seq, x.dim},
          dim,
          row_of(tail, p.type, (batch * p.kv_heads + head) * p.pages.page_size, dim),
          value};
}

}  // namespace

void cache_append(const CacheAppendParams& p, Executor& executor) {
  const int64_t page_values = p.pages.plain() ? 0 : p.pages.page_size * std::max(p.head_dim, p.head_dim_v);
  const Scratch scratch(bytes_of<float>(page_values), executor.workers());
  const auto item = [&](int64_t slot, int worker) {
    const int64_t batch = slot / p.kv_heads, head = slot % p.kv_heads;
    const int64_t count = p.counts == nullptr ? p.new_tokens : p.counts[batch];
    append(p, side_of(p, false, batch, head), slot, count, scratch.of<float>(worker));
    append(p, side_of(p, true, batch, head), slot, count, scratch.of<float>(worker));
    p.lengths[slot] += static_cast<int32_t>(count);
  };
  const int64_t slots = p.batch * p.kv_heads;
  const int64_t values = slots * p.new_tokens * (p.head_dim + p.head_dim_v);
  if (values * static_cast<int64_t>(size_of(p.type)) > kInlineBytes) return executor.run(slots, item);
  for (int64_t slot = 0; slot < slots; ++slot) item(slot, 0);
}

}  // namespace lcore::cpu::LCORE_ISA
