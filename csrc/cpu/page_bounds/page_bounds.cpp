// Bounds of pages of keys (Tang et al. 2024, Quest): for each page of a kv head the least and the greatest value of
// each channel. Computed once, when a page is full; reads K as the attention kernels do, wherever and however it lies.
// As bfloat16 the least is rounded down and the greatest up, so that both stay bounds; what was stored as bfloat16 is
// exact. A NaN anywhere in a channel makes both its bounds NaN: nothing is known of it. Keys that are stored before
// RoPE are bounded in the panels that attention multiplies, rotated to their positions: to the bit what a query will
// meet.
#include "core/page_bounds.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

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

// Keys that are read as rotated, in the panels of attention.
template <class M>
struct RotatedKeys {
  using In = typename M::In;
  In* panel;
  KeyRotation<M> rotation;

  static RotatedKeys lay_out(const PageBoundsParams& p, const RotationTable<M>& table, Arena& arena) {
    In* panel = arena.take<In>(int64_t{div_up(p.keys.head_dim, M::kPair)} * kPanel<In>);
    return {panel, KeyRotation<M>::lay_out(table, p.keys.head_dim, arena)};
  }

  // Of a page: panels begin at multiples of a vector's lanes, before the page where that does not.
  void bound(const PageBoundsParams& p, const Sequence& s, int64_t page, const Buffers& b) const {
    const int64_t begin = page * p.page_size, end = begin + p.page_size;
    for (int64_t key = begin / kLanes<In> * kLanes<In>; key < end; key += kPanel<In>) {
      const auto keys = static_cast<int>(std::min<int64_t>(end - key, kPanel<In>));
      pack_keys_as_columns<M>(p.keys, false, s, key, keys, panel, b.expanded, &rotation);
      const RoundUpward exact;
      bound_channels(p.keys.head_dim, static_cast<int>(std::max<int64_t>(begin - key, 0)), keys, b);
    }
  }

 private:
  // Columns [first, last) of the panel. Nothing is rounded here.
  [[gnu::noinline]] void bound_channels(int dim, int first, int last, const Buffers& b) const {
    constexpr int kLane = kLanes<In>;
    const int width = round_up_lanes<In>(last);
    for (int c = 0; c < dim; ++c) {
      Vec<float> least = splat(b.least[c]), most = splat(b.most[c]), unknown{};
      for (int j = first / kLane * kLane; j < width; j += kLane) {
        const Vec<float> x = load_panel_row<M>(panel + j, width, c), at = iota<float>() + static_cast<float>(j);
        const auto held = (at >= static_cast<float>(first)) & (at < static_cast<float>(last));
        least = held & (x < least) ? x : least;
        most = held & (x > most) ? x : most;
        unknown = held & (x != x) ? x : unknown;
      }
      const float sum = reduce_add<float>(unknown);  // NaN if any lane is
      b.least[c] = sum != sum ? sum : -reduce_max<float>(-least);
      b.most[c] = sum != sum ? sum : reduce_max<float>(most);
    }
  }
};

// To bfloat16 away from zero for numbers whose sign bit is `sign`, towards zero for others.
BFloat16 round_away(float x, uint32_t sign) {
  if (x != x) return to_bfloat16(x);
  const auto bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + (bits >> 31 == sign ? 0xffffu : 0u)) >> 16)};
}

}  // namespace

namespace {

template <class M>
void run(const PageBoundsParams& p, Executor& executor) {
  const int dim = p.keys.head_dim;
  const int64_t pages = p.last - p.first;
  const int64_t page_bytes = 2 * dim * static_cast<int64_t>(size_of(p.type));
  const std::optional<RotationTable<M>> table = RotationTable<M>::of(p.keys);
  Arena measure(nullptr);
  lay_out(p, measure);
  if (table.has_value()) RotatedKeys<M>::lay_out(p, *table, measure);
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
    if (table.has_value()) {
      RotatedKeys<M>::lay_out(p, *table, arena).bound(p, s, page, b);
    } else {
      for_each_run(p.keys, false, s, page * p.page_size, static_cast<int>(p.page_size), b.expanded,
                   [&](const RowsIn& rows, int, int count) {
                     const RoundUpward exact;
                     bound_rows(rows, count, dim, b);
                   });
    }
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

}  // namespace

void page_bounds(const PageBoundsParams& p, Executor& executor) {
  if constexpr (kHasBF16Pairs) {
    if (in_bfloat16(p.keys)) return run<BF16Pairs>(p, executor);
  }
  return run<Widened<float>>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
