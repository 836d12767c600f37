// Bounds of pages of keys (Tang et al. 2024, Quest): for each page of a kv head the least and the greatest value of
// each channel. Computed once, when a page is full; reads K as the attention kernels do, wherever and however it lies.
// As bfloat16 the least is rounded down and the greatest up, so that both stay bounds; what was stored as bfloat16 is
// exact. A NaN anywhere in a channel makes both its bounds NaN: nothing is known of it.
#include "core/page_bounds.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/executor.h"
#include "cpu/attention/operands.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/pack_rows.h"
#include "cpu/rounding.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

// Pages that are worth waking a thread for: one takes a microsecond.
constexpr int64_t kPagesInline = 32;

struct Buffers {
  float* least;  // [padded head_dim]
  float* most;
  float* expanded;  // a page's rows where K is coded
};

Buffers lay_out(const PageBoundsParams& p, Arena& arena) {
  const int padded = round_up_lanes<float>(p.keys.head_dim);
  const bool coded = p.keys.pages != nullptr && !is_plain(p.keys.pages->k_format);
  return {arena.take<float>(padded), arena.take<float>(padded),
          arena.take<float>(coded ? p.page_size * p.keys.head_dim : 0)};
}

// Columns of kVectors vectors from c on, of all rows; a NaN that is there stays.
template <int kVectors, class Element>
void bound_columns(const Element* rows, const RowsIn& in, int count, int c, int head_dim, const Buffers& b) {
  constexpr int kLane = kLanes<float>;
  Vec<float> least[kVectors], most[kVectors], unknown[kVectors]{};
  for (int j = 0; j < kVectors; ++j) {
    least[j] = load(b.least + c + j * kLane);
    most[j] = load(b.most + c + j * kLane);
  }
  for (int r = 0; r < count; ++r) {
    if (c == 0) prefetch_ahead(in, rows, r, count, head_dim);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec<float> x =
          load_columns<float>(rows + r * in.row_stride + c * in.col_stride, in.col_stride, j * kLane, head_dim - c);
      least[j] = x < least[j] ? x : least[j];
      most[j] = x > most[j] ? x : most[j];
      unknown[j] = x == x ? unknown[j] : x;
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    store(b.least + c + j * kLane, unknown[j] != unknown[j] ? unknown[j] : least[j]);
    store(b.most + c + j * kLane, unknown[j] != unknown[j] ? unknown[j] : most[j]);
  }
}

// Nothing is rounded here.
[[gnu::noinline]] void bound_rows(const RowsIn& in, int count, int head_dim, const Buffers& b) {
  constexpr int kLane = kLanes<float>;
  with_type(in.data, in.type, [&](const auto* rows) {
    int c = 0;
    for (; c + 4 * kLane <= head_dim; c += 4 * kLane) bound_columns<4>(rows, in, count, c, head_dim, b);
    for (; c < head_dim; c += kLane) bound_columns<1>(rows, in, count, c, head_dim, b);
  });
}

// To bfloat16 away from zero for numbers whose sign bit is `sign`, towards zero for others.
BFloat16 round_away(float x, uint32_t sign) {
  if (x != x) return to_bfloat16(x);
  const auto bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + (bits >> 31 == sign ? 0xffffu : 0u)) >> 16)};
}

}  // namespace

void page_bounds(const PageBoundsParams& p, Executor& executor) {
  const int dim = p.keys.head_dim;
  const int64_t pages = p.last - p.first;
  const int64_t page_bytes = 2 * dim * static_cast<int64_t>(size_of(p.type));
  Arena measure(nullptr);
  lay_out(p, measure);
  const Scratch scratch(measure.used(), executor.workers());
  const auto item = [&](int64_t i, int worker) {
    Arena arena(scratch.of(worker));
    const Buffers b = lay_out(p, arena);
    const int64_t slot = i / pages, page = p.first + i % pages;
    const Sequence s = sequence_of(p.keys, slot / p.keys.kv_heads, slot % p.keys.kv_heads);
    char* out = static_cast<char*>(p.bounds) + i * page_bytes;
    if ((page + 1) * p.page_size > s.k_len) {
      std::memset(out, 0, page_bytes);
      return;
    }
    std::fill(b.least, b.least + round_up_lanes<float>(dim), kInfinity<float>);
    std::fill(b.most, b.most + round_up_lanes<float>(dim), -kInfinity<float>);
    // Tiny numbers must not be taken for 0, as a thread may have been told to do.
    for_each_run(p.keys, false, s, page * p.page_size, static_cast<int>(p.page_size), b.expanded,
                 [&](const RowsIn& rows, int, int count) {
                   const RoundUpward exact;
                   bound_rows(rows, count, dim, b);
                 });
    if (p.type == DType::kFloat32) {
      std::memcpy(out, b.least, page_bytes / 2);
      std::memcpy(out + page_bytes / 2, b.most, page_bytes / 2);
    } else {
      auto* to = reinterpret_cast<BFloat16*>(out);
      std::transform(b.least, b.least + dim, to, [](float x) { return round_away(x, 1); });
      std::transform(b.most, b.most + dim, to + dim, [](float x) { return round_away(x, 0); });
    }
  };
  executor.run(p.keys.batch * p.keys.kv_heads * pages, item, kPagesInline);
}

}  // namespace lcore::cpu::LCORE_ISA
