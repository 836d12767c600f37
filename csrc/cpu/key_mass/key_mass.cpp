// Attention mass of keys: mass_j = sum over queries i of all heads of a group of exp(score(q_i, k_j) - lse_i), from the
// lse that attention returned, or the largest of these weights. H2O's column sums (Zhang et al. 2023), SnapKV's and
// TOVA's for a window of queries, KVzip's maximum: without a second softmax and without anything of size S x S.
// Blocking: a work item is a block of keys of one kv head, packed once; all tiles of query rows that see any of it pass
// by. Nothing is ever merged: each key has one owner, which adds its rows in order. The surprising idea is in the sum:
// a million weights do not fit a float, so those of a tile of rows, cut at absolute multiples, are added in float and
// the tiles in double. Scores come from the forward's own products, so a row's weights sum to 1 as its lse says.
#include "core/key_mass.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "core/executor.h"
#include "cpu/attention/block.h"
#include "cpu/attention/few_rows.h"
#include "cpu/attention/operands.h"
#include "cpu/attention/scores.h"
#include "cpu/attention/tile.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class M>
struct Buffers {
  using T = typename M::Out;
  typename M::In* q;     // [tile.rows][ld_q]
  typename M::In* keys;  // panels of the block
  T* scores;             // [tile.rows][ld_scores]
  T* tile;               // [ld_scores] what a tile of rows adds to the columns
  double* sums;          // [ld_scores]
  float* expanded;       // rows of K of a block whose pages are coded
  std::optional<KeyRotation<M>> rotation;

  const KeyRotation<M>* rotated() const { return rotation.has_value() ? &*rotation : nullptr; }
};

bool has_codes(const AttentionParams& p) { return p.pages != nullptr && !is_plain(p.pages->k_format); }

template <class M>
struct Plan {
  using T = typename M::Out;
  using In = typename M::In;
  TileSize tile;
  int ld_q;
  int ld_scores;
  std::optional<RotationTable<M>> rotation;

  explicit Plan(const AttentionParams& p)
      : tile(forward_tile(p.head_dim)),
        ld_q(round_up_lanes<In>(div_up(p.head_dim, M::kPair))),
        ld_scores(odd_lines<T>(tile.keys)),
        rotation(RotationTable<M>::of(p)) {}

  Buffers<M> lay_out(const AttentionParams& p, Arena& arena) const {
    Buffers<M> b{};
    b.q = arena.take<In>(int64_t{tile.rows} * ld_q);
    b.keys = arena.take<In>(int64_t{div_up(p.head_dim, M::kPair)} * std::max(tile.keys, kFewKeys<In>));
    b.scores = arena.take<T>(int64_t{tile.rows} * ld_scores);
    b.tile = arena.take<T>(ld_scores);
    b.sums = arena.take<double>(ld_scores);
    if (has_codes(p)) b.expanded = arena.take<float>(int64_t{tile.keys} * p.head_dim);
    if (rotation.has_value()) b.rotation = KeyRotation<M>::lay_out(*rotation, p.head_dim, arena);
    return b;
  }
  int64_t scratch(const AttentionParams& p) const {
    Arena measure(nullptr);
    lay_out(p, measure);
    return measure.used();
  }
};

// Keys of one kv head, and the query rows that see any of them.
struct Item {
  Sequence sequence;
  KeyRange keys;
  RowRange rows;
  bool few;  // whether keys are read in place, few_rows.h
};

// exp that overflows to infinity: an lse may come from fewer keys than these.
template <class T>
Vec<T> weight_of(Vec<T> exponent) {
  if constexpr (std::is_same_v<T, double>) {
    return exp(exponent);
  } else {
    return exp(exponent > 89.0f ? splat(89.0f) : exponent);
  }
}

// sums[c] <- fold(sums[c], map(scores[c] - lse)) for the vectors of a row that hold a visible column; in columns that
// are not visible map gives way to `hidden`, whatever the score and the lse are.
template <class T, class Map, class Fold>
void fold_row(Columns columns, const T* scores, T lse, T* sums, T hidden, const Map& map, const Fold& fold) {
  const Columns span = vector_span<T>(columns);
  for (int c = span.begin; c < span.end; c += kLanes<T>) {
    Vec<T> v = map(load(scores + c) - lse);
    if (c < columns.begin || c + kLanes<T> > columns.end) {
      const Vec<T> at = iota<T>() + static_cast<T>(c);
      v = (at >= static_cast<T>(columns.begin)) & (at < static_cast<T>(columns.end)) ? v : splat(hidden);
    }
    store(sums + c, fold(load(sums + c), v));
  }
}

template <class T>
void add_weights(Columns columns, const T* scores, T lse, T* sums) {
  fold_row(
      columns, scores, lse, sums, T{0}, [](Vec<T> x) { return weight_of<T>(x); },
      [](Vec<T> sum, Vec<T> weight) { return sum + weight; });
}

// Of exponents only the largest counts: one exp a key is enough. A NaN stays.
template <class T>
void raise_exponents(Columns columns, const T* scores, T lse, T* largest) {
  fold_row(
      columns, scores, lse, largest, -kInfinity<T>, [](Vec<T> x) { return x; },
      [](Vec<T> seen, Vec<T> x) { return (x > seen) | (x != x) ? x : seen; });
}

template <class T>
T lse_of(const AttentionParams& p, const Sequence& s, int64_t row) {
  const int64_t at = s.batch * p.lse_batch + s.head(row) * p.lse_head + s.q_begin + s.position(row);
  return static_cast<const T*>(p.lse)[at];
}

// Adds the weights of a tile of rows to b.tile.
template <class M>
void add_tile(const KeyMassParams& params, const Plan<M>& plan, const Block& block, bool few, const Buffers<M>& b) {
  using T = typename M::Out;
  const AttentionParams& p = params.attention;
  const Sequence& s = block.s;
  const T scale = static_cast<T>(p.softmax_scale);
  load_query_tile<M>(p.q, p.type, s, block.row, block.rows, p.head_dim, scale, b.q, plan.ld_q, b.rotated());
  const MatrixA<typename M::In> queries{b.q, plan.ld_q, 1};
  if (few) {
    const FewRows<M> few_rows{p, s, block.key, block.keys, plan.tile.keys, block.rows, b.rotated()};
    few_rows.multiply_keys(queries, b.keys, b.scores, plan.ld_scores);
  } else {
    multiply_by_columns<M>(p, block, queries, b.keys, div_up(p.head_dim, M::kPair), b.scores, plan.ld_scores);
  }
  const T left = M::kPair == 2 ? scale : T{1};  // widened queries hold it already
  const bool plain = left == T{1} && p.softcap == 0 && p.alibi_slopes == nullptr;
  for (int r = 0; r < block.rows; ++r) {
    const T lse = lse_of<T>(p, s, block.row + r);
    if (lse == -kInfinity<T>) continue;
    T* scores = b.scores + int64_t{r} * plan.ld_scores;
    const Columns columns =
        block.whole ? Columns{0, block.keys} : visible_columns(p, s, block.row + r, block.key, block.keys);
    if (!plain) finish_scores(p, s, block.row + r, block.key, columns, left, scores);
    if (params.largest) {
      raise_exponents(columns, scores, lse, b.tile);
    } else {
      add_weights(columns, scores, lse, b.tile);
    }
  }
}

template <class M>
void reduce_block(const KeyMassParams& params, const Plan<M>& plan, const Item& item, int64_t key, int keys,
                  const Buffers<M>& b) {
  using T = typename M::Out;
  const AttentionParams& p = params.attention;
  const Sequence& s = item.sequence;
  if (!item.few && item.rows.begin < item.rows.end) {
    pack_keys_as_columns<M>(p, false, s, key, keys, b.keys, b.expanded, b.rotated());
  }
  std::fill(b.sums, b.sums + keys, 0.0);
  std::fill(b.tile, b.tile + plan.ld_scores, params.largest ? -kInfinity<T> : T{0});
  const int rows = plan.tile.rows;
  for (int64_t first = item.rows.begin / rows * rows; first < item.rows.end; first += rows) {
    const int count = static_cast<int>(std::min<int64_t>(rows, s.rows() - first));
    const Block block(p, s, first, count, key, keys, true);
    if (block.rows == 0) continue;
    add_tile(params, plan, block, item.few, b);
    if (params.largest) continue;
    for (int c = 0; c < keys; ++c) b.sums[c] += b.tile[c];
    std::fill(b.tile, b.tile + keys, T{0});
  }
  T* mass = static_cast<T*>(params.mass) + s.batch * params.mass_batch + s.kv_head * params.mass_head + s.k_begin + key;
  if (params.largest) {
    for (int c = 0; c < keys; c += kLanes<T>) store(b.tile + c, weight_of<T>(load(b.tile + c)));
    std::copy(b.tile, b.tile + keys, mass);
  } else {
    std::transform(b.sums, b.sums + keys, mass, [](double sum) { return static_cast<T>(sum); });
  }
}

std::vector<Item> list_items(const AttentionParams& p, int block) {
  std::vector<Item> items;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const Sequence s = sequence_of(p, batch, head);
      // A few rows only read keys: one worker stays with a stretch of them, so that it can ask for what comes next.
      const bool few = s.rows() <= kTileRows && !has_codes(p);
      const int64_t most = few ? 4 * block : block;
      for (int64_t key = 0; key < s.k_len; key += most) {
        const int64_t keys = std::min(most, s.k_len - key);
        items.push_back({s, {key, key + keys}, seeing_rows(p, s, key, keys), few});
      }
    }
  }
  const auto work = [](const Item& item) {
    return (item.rows.end - item.rows.begin) * (item.keys.end - item.keys.begin);
  };
  // Most work first, so that the last items to finish are short.
  std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) { return work(a) > work(b); });
  return items;
}

template <class M>
void run(const KeyMassParams& params, Executor& executor) {
  const AttentionParams& p = params.attention;
  const Plan<M> plan(p);
  const std::vector<Item> items = list_items(p, plan.tile.keys);
  const Scratch scratch(plan.scratch(p), executor.workers());
  executor.run(static_cast<int64_t>(items.size()), [&](int64_t i, int worker) {
    Arena arena(scratch.of(worker));
    const Buffers<M> b = plan.lay_out(p, arena);
    const Item& item = items[i];
    for (int64_t key = item.keys.begin; key < item.keys.end; key += plan.tile.keys) {
      const int keys = static_cast<int>(std::min<int64_t>(plan.tile.keys, item.keys.end - key));
      reduce_block(params, plan, item, key, keys, b);
    }
  });
}

}  // namespace

void key_mass(const KeyMassParams& p, Executor& executor) {
  if (p.attention.type == DType::kFloat64) return run<Widened<double>>(p, executor);
  if constexpr (kHasBF16Pairs) {
    if (in_bfloat16(p.attention)) return run<BF16Pairs>(p, executor);
  }
  return run<Widened<float>>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
