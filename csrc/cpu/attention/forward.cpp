// Attention forward: out_i = sum_j softmax_j(score(q_i, k_j)) v_j over the keys j that i may see, lse_i = ln sum_j
// exp(score). Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention, Algorithm 1).
// Blocking: a work item is up to 1024 query rows of one kv head (all heads of its group); it walks over blocks of keys,
// each packed once into L2 and used by the item's tiles of 48 rows in turn. The surprising idea: keys are reduced in
// spans cut at absolute multiples of kSpan, each from a fresh state, and merged in order. An item may do its spans one
// after another or leave them to several workers; the bits are the same, for one token as for a whole prompt.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "core/executor.h"
#include "cpu/attention/block.h"
#include "cpu/attention/coded.h"
#include "cpu/attention/few_rows.h"
#include "cpu/attention/operands.h"
#include "cpu/attention/softmax.h"
#include "cpu/attention/tile.h"
#include "cpu/kernels.h"
#include "cpu/masked_gemm.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class M>
struct Buffers {
  using T = typename M::Out;
  typename M::In* q;        // [rows][ld_q]
  typename M::In* keys;     // panels of the block, or of some of its keys
  typename M::In* values;   // panels of the block
  T* scores;                // [tile.rows][ld_scores]
  typename M::In* weights;  // [tile.rows][ld_scores / kPair]: the scores' own memory where M widens
  T* new_max;               // [tile.rows]
  T* rescale;               // [tile.rows]
  float* expanded;          // rows of a block whose pages are coded and not read as such
  CodedScratch coded;
  std::optional<KeyRotation<M>> rotation;
  State<T> total;  // of all rows
  State<T> span;

  const KeyRotation<M>* rotated() const { return rotation.has_value() ? &*rotation : nullptr; }
};

template <class M>
struct Plan {
  using T = typename M::Out;
  using In = typename M::In;
  TileSize tile;
  int rows;  // of an item
  int ld_q;
  int ld_dim_v;
  int ld_scores;
  std::optional<RotationTable<M>> rotation;

  Plan(const AttentionParams& p, int workers)
      : tile(forward_tile(std::max(p.head_dim, p.head_dim_v))),
        ld_q(round_up_lanes<In>(div_up(p.head_dim, M::kPair))),
        ld_dim_v(round_up_lanes<T>(p.head_dim_v)),
        rotation(RotationTable<M>::of(p)) {
    int64_t longest = 0, longest_keys = 0, all = 0;
    for (int64_t i = 0; i < p.batch * p.kv_heads; ++i) {
      const Sequence s = sequence_of(p, i / p.kv_heads, i % p.kv_heads);
      longest = std::max(longest, s.rows());
      longest_keys = std::max(longest_keys, s.k_len);
      all += s.rows();
    }
    // No item needs more than the longest sequence; eight items a worker balance well where sequences alone do not.
    const int64_t bytes = bytes_of<T>(ld_q + 2 * ld_dim_v);
    const int64_t most = std::max<int64_t>(
        std::min<int64_t>(most_item_rows(p.head_dim), kMostScratchBytes / workers / bytes), tile.rows);
    const bool many = p.batch * p.kv_heads >= 4 * workers;
    const int64_t wanted = many ? most : std::clamp<int64_t>(all / (8 * workers), tile.rows, most);
    rows = static_cast<int>(std::min(longest, (wanted + tile.rows - 1) / tile.rows * tile.rows));
    tile.rows = std::min(tile.rows, rows);
    if (has_codes(p)) tile.keys = std::max(tile.keys, static_cast<int>(p.pages->page_size));  // blocks of whole pages
    ld_scores = odd_lines<T>(static_cast<int>(std::min<int64_t>(tile.keys, longest_keys)));
  }

  // Whether keys and values are read in place, few_rows.h; coded pages are in any case.
  bool few_rows(const AttentionParams& p) const { return rows <= kTileRows && !has_codes(p); }
  static bool has_codes(const AttentionParams& p) { return p.pages != nullptr && !p.pages->plain(); }
  // Of a block's keys, those in plain pages: a block ends where codes begin.
  static int keys_before_codes(const AttentionParams& p, int64_t key, int keys) {
    if (!has_codes(p)) return 0;
    return static_cast<int>(std::clamp<int64_t>(p.pages->plain_pages * p.pages->page_size - key, 0, keys));
  }

  MatrixA<In> queries(const Buffers<M>& b, int first) const { return {b.q + int64_t{first} * ld_q, ld_q, 1}; }
  MatrixA<In> weights(const Buffers<M>& b) const { return {b.weights, ld_scores / M::kPair, 1}; }

  // Lays the buffers out from base; used() of the arena is what they need.
  Buffers<M> lay_out(const AttentionParams& p, Arena& arena) const {
    const int64_t padded = round_up_lanes<T>(rows);
    const auto state = [&] {
      return State<T>{arena.take<T>(padded), arena.take<T>(padded), arena.take<T>(int64_t{rows} * ld_dim_v)};
    };
    Buffers<M> b{};
    b.q = arena.take<In>(int64_t{rows} * ld_q);
    b.keys = arena.take<In>(int64_t{div_up(p.head_dim, M::kPair)} * (few_rows(p) ? kFewKeys<In> : tile.keys));
    b.values = arena.take<In>(int64_t{ld_dim_v} * tile.keys / M::kPair);
    b.scores = arena.take<T>(int64_t{tile.rows} * ld_scores);
    if constexpr (M::kPair == 1) {
      b.weights = b.scores;
    } else {
      b.weights = arena.take<In>(int64_t{tile.rows} * ld_scores / M::kPair);
    }
    b.new_max = arena.take<T>(padded);
    b.rescale = arena.take<T>(padded);
    if (has_codes(p)) {
      b.expanded = arena.take<float>(int64_t{tile.keys} * std::max(p.head_dim, p.head_dim_v));
      b.coded = CodedScratch::lay_out(tile.rows, p.pages->page_size, p.head_dim, p.head_dim_v, arena);
    }
    if (rotation.has_value()) b.rotation = KeyRotation<M>::lay_out(*rotation, p.head_dim, arena);
    b.total = state();
    b.span = state();
    return b;
  }
  int64_t scratch(const AttentionParams& p) const {
    Arena measure(nullptr);
    lay_out(p, measure);
    return measure.used();
  }
  // Elements of one span's partial state in the split schedule.
  int64_t partial() const { return 2 * round_up_lanes<T>(rows) + int64_t{rows} * ld_dim_v; }
};

// Query rows of one kv head, and the keys that any of them sees.
struct Item {
  Sequence sequence;
  int64_t row;
  int rows;
  KeyRange keys;
  int64_t spans() const { return keys.begin >= keys.end ? 0 : (keys.end - 1) / kSpan - keys.begin / kSpan + 1; }
};

// The block's scores become weights; b.span's max and sum move on, b.rescale holds what its out is worth.
template <class M>
void weigh(const AttentionParams& p, const Plan<M>& plan, const Block& block, const State<typename M::Out>& state,
           const Buffers<M>& b) {
  using T = typename M::Out;
  const Sequence& s = block.s;
  const T scale = M::kPair == 2 ? static_cast<T>(p.softmax_scale) : T{1};  // widened queries hold it already
  const bool plain = block.whole && scale == T{1} && p.softcap == 0 && p.alibi_slopes == nullptr;
  const auto columns_of = [&](int r) {
    return block.whole ? Columns{0, block.keys} : visible_columns(p, s, block.row + r, block.key, block.keys);
  };
  for (int r = 0; r < block.rows; ++r) {
    T* scores = b.scores + int64_t{r} * plan.ld_scores;
    const Columns columns = columns_of(r);
    if (!plain || columns.end % kLanes<T> != 0) {
      finish_scores(p, s, block.row + r, block.key, columns, scale, scores);
    }
    b.new_max[r] = row_max(vector_span<T>(columns), scores, state.max[r]);
  }
  update_max(block.rows, state.max, b.new_max, b.rescale);
  const Steps all{0, div_up(block.keys, M::kPair)};
  for (int r = 0; r < block.rows; ++r) {
    T* scores = b.scores + int64_t{r} * plan.ld_scores;
    const T sum =
        weigh_row<M>(columns_of(r), all, state.max[r], scores, b.weights + int64_t{r} * plan.ld_scores / M::kPair);
    state.sum[r] = state.sum[r] * b.rescale[r] + sum;
  }
}

// out <- rescale out + weights V with b.values, the panels of the block's keys from `first` on.
template <class M>
void multiply_values(const AttentionParams& p, const Plan<M>& plan, const Block& block, int first, bool finite,
                     const Buffers<M>& b, typename M::Out* out) {
  const int ld = plan.ld_dim_v;
  MatrixA<typename M::In> weights = plan.weights(b);
  weights.data += first / M::kPair;
  if (block.whole) {
    const int depth = div_up(block.keys, M::kPair);
    gemm<M, Accumulate::kScaleAndAdd>(weights, b.values, depth, {0, depth}, out, ld, block.rows, ld, b.rescale);
  } else {
    gemm_masked<M, Accumulate::kScaleAndAdd>(
        weights, b.values, block.keys, finite, out, ld, block.rows, ld,
        [&](int r, int count) { return block.keys_seen(p, r, count); }, b.rescale);
  }
}

// The scores of a block that begins with coded keys.
template <class M>
void score_codes([[maybe_unused]] const Plan<M>& plan, [[maybe_unused]] const Block& block,
                 [[maybe_unused]] const CodedPages& pages, [[maybe_unused]] int at,
                 [[maybe_unused]] const Buffers<M>& b) {
  if constexpr (std::is_same_v<M, Widened<float>>) {
    pages.multiply_keys(block, plan.queries(b, at).data, plan.ld_q, b.coded, b.scores, plan.ld_scores);
  }
}

// out <- rescale out + weights V over the coded keys; the block's others are worth what they are from here on.
template <class M>
void add_codes([[maybe_unused]] const Plan<M>& plan, [[maybe_unused]] const Block& block,
               [[maybe_unused]] const CodedPages& pages, [[maybe_unused]] const Buffers<M>& b,
               [[maybe_unused]] typename M::Out* out) {
  if constexpr (std::is_same_v<M, Widened<float>>) {
    for (int r = 0; r < block.rows; ++r) {
      float* row = out + int64_t{r} * plan.ld_dim_v;
      for (int c = 0; c < plan.ld_dim_v; c += kLanes<float>) store(row + c, load(row + c) * b.rescale[r]);
      b.rescale[r] = 1;
    }
    pages.add_values(block, b.weights, plan.ld_scores, b.coded, out, plan.ld_dim_v, plan.tile.keys);
  }
}

// Adds the block of keys [key, key + keys) to b.span.
template <class M>
void reduce_block(const AttentionParams& p, const Plan<M>& plan, const Item& item, int64_t key, int keys,
                  const Buffers<M>& b) {
  const Sequence& s = item.sequence;
  // Keys that stand in coded pages come first; the rest is packed.
  const CodedPages k_codes{p, s, key, CodedPages::count(p, s, false, key, keys), false};
  const CodedPages v_codes{p, s, key, CodedPages::count(p, s, true, key, keys), true};
  const int k_first = k_codes.keys, v_first = v_codes.keys;
  const bool few = plan.few_rows(p);
  const bool in_place = few && values_in_place<M>(p, keys);
  if (!few) pack_keys_as_columns<M>(p, false, s, key + k_first, keys - k_first, b.keys, b.expanded, b.rotated());
  if (!in_place) pack_keys_as_rows<M>(p, true, s, key + v_first, keys - v_first, b.values, b.expanded);
  std::optional<bool> finite;  // asked for where the mask cuts the block
  for (int first = 0; first < item.rows; first += plan.tile.rows) {
    const Block block(p, s, item.row + first, std::min(plan.tile.rows, item.rows - first), key, keys, true);
    if (block.rows == 0) continue;
    const int at = static_cast<int>(block.row - item.row);
    const State<typename M::Out> state = b.span.at(at, plan.ld_dim_v);
    const FewRows<M> few_rows{p, s, key, keys, plan.tile.keys, block.rows, b.rotated()};
    if (few) {
      few_rows.multiply_keys(plan.queries(b, at), b.keys, b.scores, plan.ld_scores);
    } else {
      if (k_first > 0) score_codes(plan, block, k_codes, at, b);
      const Block rest(p, s, block.row, block.rows, key + k_first, keys - k_first);
      multiply_by_columns<M>(p, rest, plan.queries(b, at), b.keys, div_up(p.head_dim, M::kPair), b.scores + k_first,
                             plan.ld_scores);
    }
    weigh(p, plan, block, state, b);
    if (in_place && block.whole) {
      few_rows.multiply_values(plan.weights(b), b.rescale, state.out, plan.ld_dim_v);
      continue;
    }
    if (in_place) pack_keys_as_rows<M>(p, true, s, key, keys, b.values);
    if (v_first > 0) add_codes(plan, block, v_codes, b, state.out);
    if (v_first == keys) continue;
    if (!block.whole && !finite.has_value()) {
      finite = all_finite(b.values, int64_t{div_up(keys - v_first, M::kPair)} * plan.ld_dim_v);
    }
    const Block rest(p, s, block.row, block.rows, key + v_first, keys - v_first);
    multiply_values(p, plan, rest, v_first, finite.value_or(true), b, state.out);
  }
}

// Adds keys [range.begin, range.end), all in one span, to a fresh b.span. Blocks stand at absolute multiples too: the
// order of a row's sum must not depend on where its item's window begins.
template <class M>
void reduce_span(const AttentionParams& p, const Plan<M>& plan, const Item& item, KeyRange range, const Buffers<M>& b) {
  clear(b.span, item.rows, plan.ld_dim_v);
  const int block = plan.tile.keys;
  for (int64_t key = range.begin / block * block; key < range.end; key += block) {
    const int keys = static_cast<int>(std::min<int64_t>(block, item.sequence.k_len - key));
    const int values = plan.keys_before_codes(p, key, keys);
    if (values > 0) reduce_block(p, plan, item, key, values, b);
    if (values < keys) reduce_block(p, plan, item, key + values, keys - values, b);
  }
}

// Adds the sinks, divides, and writes out and lse.
template <class M>
void finish(const AttentionParams& p, const Plan<M>& plan, const Item& item, const State<typename M::Out>& state) {
  using T = typename M::Out;
  const Sequence& s = item.sequence;
  for (int r = 0; r < item.rows; ++r) {
    const int64_t head = s.head(item.row + r);
    const int64_t position = s.position(item.row + r);
    T max = state.max[r], sum = state.sum[r], scale = T{1};
    const T sink = p.sinks == nullptr ? -kInfinity<T> : static_cast<const T*>(p.sinks)[head];
    if (sink > -kInfinity<T>) {
      max = std::max(state.max[r], sink);
      scale = state.max[r] == max ? T{1} : std::exp(state.max[r] - max);
      sum = sum * scale + (sink == max ? T{1} : std::exp(sink - max));
    }
    T* out = state.out + int64_t{r} * plan.ld_dim_v;
    const T factor = sum > T{0} ? scale / sum : (sum == T{0} ? T{0} : sum);
    // + 0 makes -0 into 0: a sum that underflowed has the sign of its last term, which the mask may have left out.
    for (int c = 0; c < plan.ld_dim_v; c += kLanes<T>) store(out + c, load(out + c) * factor + T{0});
    const int64_t row = s.q_begin + position;
    const int64_t dense_batch = p.cu_seqlens_q == nullptr ? s.batch : 0;
    const int64_t offset = ((dense_batch * p.seq_q + row) * p.heads + head) * p.head_dim_v;
    store_row(out, p.head_dim_v, static_cast<char*>(p.out) + offset * static_cast<int64_t>(size_of(p.type)), p.type);
    static_cast<T*>(p.lse)[s.batch * p.lse_batch + head * p.lse_head + row] =
        sum == T{0} ? -kInfinity<T> : max + std::log(sum);
  }
}

std::vector<Item> list_items(const AttentionParams& p, int item_rows) {
  std::vector<Item> items;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const Sequence s = sequence_of(p, batch, head);
      for (int64_t row = 0; row < s.rows(); row += item_rows) {
        const int rows = static_cast<int>(std::min<int64_t>(item_rows, s.rows() - row));
        items.push_back({s, row, rows, visible(p, s, row, rows)});
      }
    }
  }
  // Longest first, so that the last items to finish are short.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return (a.keys.end - a.keys.begin) * a.rows > (b.keys.end - b.keys.begin) * b.rows;
  });
  return items;
}

KeyRange span_of(const Item& item, int64_t index) {
  const int64_t first = item.keys.begin / kSpan + index;
  return {std::max(item.keys.begin, first * kSpan), std::min(item.keys.end, (first + 1) * kSpan)};
}

template <class M>
void load_query(const AttentionParams& p, const Plan<M>& plan, const Item& item, const Buffers<M>& b) {
  load_query_tile<M>(p.q, p.type, item.sequence, item.row, item.rows, p.head_dim,
                     static_cast<typename M::Out>(p.softmax_scale), b.q, plan.ld_q, b.rotated());
}

// Few items and long keys (decode): every span of every item is a piece of work, partial states are merged at the end.
template <class M>
void run_split(const AttentionParams& p, const Plan<M>& plan, const std::vector<Item>& items, const Scratch& scratch,
               int64_t total_spans, Executor& executor) {
  using T = typename M::Out;
  const Scratch partials(bytes_of<T>(plan.partial() * total_spans), 1);
  struct Piece {
    const Item* item;
    int64_t span;
    State<T> state;
  };
  std::vector<Piece> pieces;
  for (const Item& item : items) {
    for (int64_t span = 0; span < item.spans(); ++span) {
      const int64_t padded = round_up_lanes<T>(plan.rows);
      T* base = partials.of<T>(0) + static_cast<int64_t>(pieces.size()) * plan.partial();
      pieces.push_back({&item, span, {base, base + padded, base + 2 * padded}});
    }
  }
  executor.run(static_cast<int64_t>(pieces.size()), [&](int64_t i, int worker) {
    Arena arena(scratch.of(worker));
    Buffers<M> b = plan.lay_out(p, arena);
    b.span = pieces[i].state;
    load_query(p, plan, *pieces[i].item, b);
    reduce_span(p, plan, *pieces[i].item, span_of(*pieces[i].item, pieces[i].span), b);
  });
  Arena arena(scratch.of(0));
  const Buffers<M> b = plan.lay_out(p, arena);
  size_t next = 0;
  for (const Item& item : items) {
    clear(b.total, item.rows, plan.ld_dim_v);
    for (int64_t span = 0; span < item.spans(); ++span) merge(b.total, pieces[next++].state, item.rows, plan.ld_dim_v);
    finish(p, plan, item, b.total);
  }
}

template <class M>
void run(const AttentionParams& p, Executor& executor) {
  const Plan<M> plan(p, executor.workers());
  if (plan.rows == 0) return;
  const std::vector<Item> items = list_items(p, plan.rows);
  const Scratch scratch(plan.scratch(p), executor.workers());
  int64_t spans = 0;
  for (const Item& item : items) spans += item.spans();
  // Four items a worker balance well; 32 MB bounds what partial states may take.
  const bool few = static_cast<int64_t>(items.size()) < 4 * executor.workers();
  const bool fits = bytes_of<typename M::Out>(spans * plan.partial()) <= (int64_t{32} << 20);
  if (few && fits && spans > static_cast<int64_t>(items.size())) {
    return run_split(p, plan, items, scratch, spans, executor);
  }
  executor.run(static_cast<int64_t>(items.size()), [&](int64_t i, int worker) {
    const Item& item = items[i];
    Arena arena(scratch.of(worker));
    const Buffers<M> b = plan.lay_out(p, arena);
    load_query(p, plan, item, b);
    if (item.spans() == 1) {  // merged into the neutral element it would have the same bits
      reduce_span(p, plan, item, item.keys, b);
      return finish(p, plan, item, b.span);
    }
    clear(b.total, item.rows, plan.ld_dim_v);
    for (int64_t span = 0; span < item.spans(); ++span) {
      reduce_span(p, plan, item, span_of(item, span), b);
      merge(b.total, b.span, item.rows, plan.ld_dim_v);
    }
    finish(p, plan, item, b.total);
  });
}

}  // namespace

void attention_forward(const AttentionParams& p, Executor& executor) {
  if (p.type == DType::kFloat64) return run<Widened<double>>(p, executor);
  if constexpr (kHasBF16Pairs) {
    if (in_bfloat16(p)) return run<BF16Pairs>(p, executor);
  }
  return run<Widened<float>>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
