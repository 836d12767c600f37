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
  int64_t page_begin;  // bytes from a page's start to this side, and to its end
  int64_t page_end;
};

char* row_of(char* data, DType type, int64_t row, int dim) {
  return data + row * dim * static_cast<int64_t>(size_of(type));
}

RowsIn from_row(const RowsIn& rows, int64_t row) {
  const int64_t offset = row * rows.row_stride * static_cast<int64_t>(size_of(rows.type));
  return {static_cast<const char*>(rows.data) + offset, rows.type, rows.row_stride, rows.col_stride};
}

// A page from the tail's and the new tokens. `rows` is scratch for a page of float rows, used where they are coded.
void fill_page(const CacheAppendParams& p, const Side& side, uint8_t* page, const RowsIn& waiting, int64_t count,
               const RowsIn& fresh, float* rows) {
  const KvPages& pages = p.pages;
  const PageFormat format = pages.format(side.value);
  char* codes = reinterpret_cast<char*>(page) + side.page_begin;
  char* out = is_plain(format) ? codes : reinterpret_cast<char*>(rows);
  const DType type = is_plain(format) ? plain_type(format) : DType::kFloat32;
  copy_rows(waiting, count, side.dim, out, type);
  copy_rows(fresh, pages.page_size - count, side.dim, row_of(out, type, count, side.dim), type);
  if (is_plain(format)) {
    char* padding = row_of(codes, type, pages.page_size, side.dim);
    std::memset(padding, 0, codes + (side.page_end - side.page_begin) - padding);
  } else {
    PageEncoder(format, side.value, static_cast<int>(pages.page_size), side.dim, reinterpret_cast<uint8_t*>(codes))
        .encode(rows);
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
      const int64_t id = pages.page_table[slot * pages.table_width + length / pages.page_size];
      fill_page(p, side, p.pool + id * pages.page_bytes, {side.tail, p.type, side.dim, 1}, waiting, fresh, rows);
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
          value,
          value ? p.pages.v_offset : 0,
          value ? p.pages.page_bytes : p.pages.v_offset};
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
