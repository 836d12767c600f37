// Attention forward: out_i = sum_j softmax_j(score(q_i, k_j)) v_j over the keys j that i may see, lse_i = ln sum_j
// exp(score). Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention, Algorithm 1).
// Blocking: a work item is a tile of query rows of one kv head (all heads of its group); it walks over blocks of keys,
// each widened once into L2 and shared by all rows. The surprising idea: keys are reduced in spans cut at absolute
// multiples of kSpan, each from a fresh state, and merged in order. A tile may do its spans one after another or leave
// them to several workers; the bits are the same, for one token as for a whole prompt.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/executor.h"
#include "cpu/attention/scores.h"
#include "cpu/attention/tile.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

// out = sum exp(score - max) v, not yet divided by sum. (-inf, 0, 0) is neutral.
template <class T>
struct State {
  T* max;  // [rows]
  T* sum;  // [rows]
  T* out;  // [rows][ld]
};

template <class T>
struct Buffers {
  T* q;        // [rows][ld_dim]
  T* keys;     // [head_dim][tile.keys]
  T* values;   // [tile.keys][ld_dim_v]
  T* staging;  // [tile.keys][ld_dim]
  T* scores;   // [rows][tile.keys]
  T* rescale;  // [rows]
  State<T> total;
  State<T> span;
};

template <class T>
struct Plan {
  TileSize tile;
  int ld_dim;
  int ld_dim_v;

  explicit Plan(const AttentionParams& p)
      : tile(forward_tile(std::max(p.head_dim, p.head_dim_v))),
        ld_dim(round_up_lanes<T>(p.head_dim)),
        ld_dim_v(round_up_lanes<T>(p.head_dim_v)) {}

  // Lays the buffers out from base; used() of the arena is what they need.
  Buffers<T> lay_out(const AttentionParams& p, Arena<T>& arena) const {
    const int64_t rows = tile.rows, keys = tile.keys;
    const auto state = [&] { return State<T>{arena.take(rows), arena.take(rows), arena.take(rows * ld_dim_v)}; };
    Buffers<T> b{};
    b.q = arena.take(rows * ld_dim);
    b.keys = arena.take(p.head_dim * keys);
    b.values = arena.take(keys * ld_dim_v);
    b.staging = arena.take(keys * ld_dim);
    b.scores = arena.take(rows * keys);
    b.rescale = arena.take(rows);
    b.total = state();
    b.span = state();
    return b;
  }
  int64_t scratch(const AttentionParams& p) const {
    Arena<T> measure(nullptr);
    lay_out(p, measure);
    return measure.used();
  }
  // Elements of one span's partial state in the split schedule.
  int64_t partial() const { return int64_t{tile.rows} * (2 + ld_dim_v); }
};

struct Tile {
  Sequence sequence;
  int64_t row;
  int rows;
  KeyRange keys;
  int64_t spans() const { return keys.begin >= keys.end ? 0 : (keys.end - 1) / kSpan - keys.begin / kSpan + 1; }
};

template <class T>
void clear(const State<T>& state, int rows, int ld) {
  std::fill(state.max, state.max + rows, -kInfinity<T>);
  std::fill(state.sum, state.sum + rows, T{0});
  std::fill(state.out, state.out + int64_t{rows} * ld, T{0});
}

// One row of scores becomes probabilities in place; returns the factor for what was summed before.
template <class T>
T softmax_row(Columns columns, int keys_padded, T* scores, T& max_seen, T& sum) {
  const Columns span = vector_span<T>(columns);
  Vec<T> best = splat(-kInfinity<T>);
  for (int c = span.begin; c < span.end; c += kLanes<T>) best = max<T>(load(scores + c), best);
  const T new_max = std::max(max_seen, reduce_max<T>(best));
  // A row whose every score is -inf keeps its neutral state: subtracting 0 makes each weight exp(-inf) = 0.
  const T reference = new_max == -kInfinity<T> ? T{0} : new_max;
  Vec<T> total{};
  for (int c = span.begin; c < span.end; c += kLanes<T>) {
    const Vec<T> weight = exp(load(scores + c) - reference);
    store(scores + c, weight);
    total += weight;
  }
  std::fill(scores, scores + span.begin, T{0});
  std::fill(scores + span.end, scores + keys_padded, T{0});
  const T rescale = exp(splat(max_seen - reference))[0];
  sum = sum * rescale + reduce_add<T>(total);
  max_seen = new_max;
  return rescale;
}

// Adds keys [range.begin, range.end), all in one span, to b.span.
template <class T>
void reduce_span(const AttentionParams& p, const Plan<T>& plan, const Tile& tile, KeyRange range, const Buffers<T>& b) {
  const Sequence& s = tile.sequence;
  const int block = plan.tile.keys;
  clear(b.span, tile.rows, plan.ld_dim_v);
  // Blocks stand at absolute multiples too: the order of a row's sum must not depend on where its tile's window begins.
  for (int64_t key = range.begin / block * block; key < range.end; key += block) {
    const int keys = static_cast<int>(std::min<int64_t>(block, s.k_len - key));
    const int keys_padded = round_up_lanes<T>(keys);
    // Rows that see nothing of the block (above the diagonal, left of the window) are left out of both products.
    const RowRange seeing = seeing_rows(p, s, key, keys);
    const int first = static_cast<int>(std::clamp<int64_t>(seeing.begin - tile.row, 0, tile.rows));
    const int last = static_cast<int>(std::clamp<int64_t>(seeing.end - tile.row, first, tile.rows));
    if (first == last) continue;
    load_keys_transposed(p, false, s, key, keys, b.staging, plan.ld_dim, b.keys, keys_padded);
    load_keys(p, true, s, key, keys, b.values, plan.ld_dim_v);
    T* block_scores = b.scores + int64_t{first} * keys_padded;
    gemm<T, Accumulate::kOverwrite>({b.q + int64_t{first} * plan.ld_dim, plan.ld_dim, 1}, b.keys, keys_padded,
                                    block_scores, keys_padded, last - first, keys_padded, p.head_dim);
    for (int r = first; r < last; ++r) {
      T* scores = b.scores + int64_t{r} * keys_padded;
      const Columns columns = visible_columns(p, s, tile.row + r, key, keys);
      if (columns.empty()) {
        std::fill(scores, scores + keys_padded, T{0});
        b.rescale[r] = T{1};
        continue;
      }
      finish_scores(p, s, tile.row + r, key, columns, scores);
      b.rescale[r] = softmax_row(columns, keys_padded, scores, b.span.max[r], b.span.sum[r]);
    }
    gemm<T, Accumulate::kScaleAndAdd>({block_scores, keys_padded, 1}, b.values, plan.ld_dim_v,
                                      b.span.out + int64_t{first} * plan.ld_dim_v, plan.ld_dim_v, last - first,
                                      plan.ld_dim_v, keys, b.rescale + first);
  }
}

// into <- into + from, in the algebra of states.
template <class T>
void merge(const State<T>& into, const State<T>& from, int rows, int ld) {
  for (int r = 0; r < rows; ++r) {
    const T both = std::max(into.max[r], from.max[r]);
    if (both == -kInfinity<T>) {
      into.sum[r] += from.sum[r];  // nothing on either side, or NaN where every score was
      continue;
    }
    const T keep = exp(splat(into.max[r] - both))[0];
    const T add = exp(splat(from.max[r] - both))[0];
    into.max[r] = both;
    into.sum[r] = into.sum[r] * keep + from.sum[r] * add;
    for (int c = 0; c < ld; c += kLanes<T>) {
      T* out = into.out + int64_t{r} * ld + c;
      store(out, load(out) * keep + load(from.out + int64_t{r} * ld + c) * add);
    }
  }
}

// Adds the sinks, divides, and writes out and lse.
template <class T>
void finish(const AttentionParams& p, const Plan<T>& plan, const Tile& tile, const State<T>& state) {
  const Sequence& s = tile.sequence;
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t head = s.head(tile.row + r);
    const int64_t position = s.position(tile.row + r);
    T max = state.max[r], sum = state.sum[r], scale = T{1};
    const T sink = p.sinks == nullptr ? -kInfinity<T> : static_cast<const T*>(p.sinks)[head];
    if (sink > -kInfinity<T>) {
      max = std::max(state.max[r], sink);
      scale = state.max[r] == max ? T{1} : std::exp(state.max[r] - max);
      sum = sum * scale + (sink == max ? T{1} : std::exp(sink - max));
    }
    T* out = state.out + int64_t{r} * plan.ld_dim_v;
    const T factor = sum > T{0} ? scale / sum : (sum == T{0} ? T{0} : sum);
    for (int c = 0; c < plan.ld_dim_v; c += kLanes<T>) store(out + c, load(out + c) * factor);
    const int64_t row = s.q_begin + position;
    const int64_t dense_batch = p.cu_seqlens_q == nullptr ? s.batch : 0;
    const int64_t offset = ((dense_batch * p.seq_q + row) * p.heads + head) * p.head_dim_v;
    store_row(out, p.head_dim_v, static_cast<char*>(p.out) + offset * static_cast<int64_t>(size_of(p.type)), p.type);
    static_cast<T*>(p.lse)[s.batch * p.lse_batch + head * p.lse_head + row] =
        sum == T{0} ? -kInfinity<T> : max + std::log(sum);
  }
}

std::vector<Tile> list_tiles(const AttentionParams& p, int tile_rows) {
  std::vector<Tile> tiles;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const Sequence s = sequence_of(p, batch, head);
      for (int64_t row = 0; row < s.rows(); row += tile_rows) {
        const int rows = static_cast<int>(std::min<int64_t>(tile_rows, s.rows() - row));
        tiles.push_back({s, row, rows, visible(p, s, row, rows)});
      }
    }
  }
  // Longest first, so that the last items to finish are short.
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
    return (a.keys.end - a.keys.begin) * a.rows > (b.keys.end - b.keys.begin) * b.rows;
  });
  return tiles;
}

KeyRange span_of(const Tile& tile, int64_t index) {
  const int64_t first = tile.keys.begin / kSpan + index;
  return {std::max(tile.keys.begin, first * kSpan), std::min(tile.keys.end, (first + 1) * kSpan)};
}

template <class T>
void load_query(const AttentionParams& p, const Plan<T>& plan, const Tile& tile, const Buffers<T>& b) {
  load_query_tile(p.q, p.type, tile.sequence, tile.row, tile.rows, p.head_dim, static_cast<T>(p.softmax_scale), b.q,
                  plan.ld_dim);
}

// Few tiles and long keys (decode): every span of every tile is an item, partial states are merged at the end.
template <class T>
void run_split(const AttentionParams& p, const Plan<T>& plan, const std::vector<Tile>& tiles, const Scratch<T>& scratch,
               int64_t total_spans, Executor& executor) {
  const Scratch<T> partials(plan.partial() * total_spans, 1);
  struct Item {
    const Tile* tile;
    int64_t span;
    T* partial;
  };
  const auto state_at = [&](T* base) {
    return State<T>{base, base + plan.tile.rows, base + 2 * int64_t{plan.tile.rows}};
  };
  std::vector<Item> items;
  for (const Tile& tile : tiles) {
    for (int64_t span = 0; span < tile.spans(); ++span) {
      items.push_back({&tile, span, partials.of(0) + static_cast<int64_t>(items.size()) * plan.partial()});
    }
  }
  executor.run(static_cast<int64_t>(items.size()), [&](int64_t i, int worker) {
    Arena<T> arena(scratch.of(worker));
    Buffers<T> b = plan.lay_out(p, arena);
    b.span = state_at(items[i].partial);
    load_query(p, plan, *items[i].tile, b);
    reduce_span(p, plan, *items[i].tile, span_of(*items[i].tile, items[i].span), b);
  });
  Arena<T> arena(scratch.of(0));
  const Buffers<T> b = plan.lay_out(p, arena);
  size_t next = 0;
  for (const Tile& tile : tiles) {
    clear(b.total, tile.rows, plan.ld_dim_v);
    for (int64_t span = 0; span < tile.spans(); ++span) {
      merge(b.total, state_at(items[next++].partial), tile.rows, plan.ld_dim_v);
    }
    finish(p, plan, tile, b.total);
  }
}

template <class T>
void run(const AttentionParams& p, Executor& executor) {
  const Plan<T> plan(p);
  const std::vector<Tile> tiles = list_tiles(p, plan.tile.rows);
  const Scratch<T> scratch(plan.scratch(p), executor.workers());
  int64_t spans = 0;
  for (const Tile& tile : tiles) spans += tile.spans();
  // Four items a worker balance well; 32 MB bounds what partial states may take.
  const bool few = static_cast<int64_t>(tiles.size()) < 4 * executor.workers();
  const bool fits = spans * plan.partial() * static_cast<int64_t>(sizeof(T)) <= (int64_t{32} << 20);
  if (few && fits && spans > static_cast<int64_t>(tiles.size())) {
    return run_split(p, plan, tiles, scratch, spans, executor);
  }
  executor.run(static_cast<int64_t>(tiles.size()), [&](int64_t i, int worker) {
    const Tile& tile = tiles[i];
    Arena<T> arena(scratch.of(worker));
    const Buffers<T> b = plan.lay_out(p, arena);
    load_query(p, plan, tile, b);
    clear(b.total, tile.rows, plan.ld_dim_v);
    for (int64_t span = 0; span < tile.spans(); ++span) {
      reduce_span(p, plan, tile, span_of(tile, span), b);
      merge(b.total, b.span, tile.rows, plan.ld_dim_v);
    }
    finish(p, plan, tile, b.total);
  });
}

}  // namespace

void attention_forward(const AttentionParams& p, Executor& executor) {
  if (p.type == DType::kFloat64) return run<double>(p, executor);
  return run<float>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
