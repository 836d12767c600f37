// Upper bounds of the scores in a page (Tang et al. 2024, Quest): with m and M the page's least and greatest key
// channels, u = softmax_scale sum_c max(q_c m_c, q_c M_c) >= softmax_scale q . k for each k of the page; the largest
// over the queries and the heads that share the kv head, for a page is read for all of them or for none. max(q m, q M)
// is q+ M + q- m with q+ = max(q, 0) and q- = min(q, 0): a dot product of length 2 head_dim, in float32. The surprising
// idea: all of it rounds upward, so the result is not below the exact sum, and no error has to be estimated and added.
// What is not a number (a NaN key, 0 times infinity) becomes +inf: such a page must be read.
#include <algorithm>
#include <vector>

#include "core/executor.h"
#include "core/page_bounds.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/pack_rows.h"
#include "cpu/rounding.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr int64_t kPages = 256;  // of an item: 25 microseconds for a token of 4 heads of 128
constexpr int kRows = 16;        // query rows beside a page's bounds in L1

// Query rows [first, first + rows) of one kv head; row f is position f / group, head f % group of the group's.
struct Tile {
  int64_t first;
  int rows;
};

// Pages [first, first + count) of one (sequence, kv head).
struct Item {
  int64_t batch;
  int64_t kv_head;
  int64_t first;
  int64_t count;
};

struct Buffers {
  float* q;     // [kRows][2][padded head_dim]: q+, then q-
  float* best;  // [group][kPages]
};

Buffers lay_out(const PageScoresParams& p, Arena& arena) {
  const int64_t padded = round_up_lanes<float>(p.head_dim);
  return {arena.take<float>(kRows * 2 * padded), arena.take<float>(p.heads / p.kv_heads * kPages)};
}

// A NaN is in both parts.
void load_queries(const PageScoresParams& p, const Item& item, Tile tile, float sign, float* q) {
  const int padded = round_up_lanes<float>(p.head_dim);
  const int64_t group = p.heads / p.kv_heads;
  std::fill(q, q + int64_t{tile.rows} * 2 * padded, 0.0f);
  with_type(p.q.data, p.type, [&](const auto* data) {
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.first + r;
      const auto* from =
          data + item.batch * p.q.batch + row / group * p.q.seq + (item.kv_head * group + row % group) * p.q.head;
      for (int c = 0; c < p.head_dim; ++c) {
        const float x = sign * static_cast<float>(widen(from[c * p.q.dim]));
        q[c] = x < 0.0f ? 0.0f : x;
        q[padded + c] = x > 0.0f ? 0.0f : x;
      }
      q += 2 * padded;
    }
  });
}

// *best[r] <- max(*best[r], the page's bound of row r) for kCount rows from q on.
template <int kCount, class Element>
void score_rows(const float* q, const Element* bounds, int head_dim, float* const* best) {
  constexpr int kLane = kLanes<float>;
  const int padded = round_up_lanes<float>(head_dim);
  Vec<float> above[kCount]{}, below[kCount]{};
  for (int c = 0; c < head_dim; c += kLane) {
    const Vec<float> least = load_columns<float>(bounds, 1, c, head_dim);
    const Vec<float> most = load_columns<float>(bounds + head_dim, 1, c, head_dim);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      above[r] += load(q + r * 2 * padded + c) * most;
      below[r] += load(q + (r * 2 + 1) * padded + c) * least;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
    const float bound = reduce_add<float>(above[r] + below[r]);
    *best[r] = bound <= *best[r] ? *best[r] : (bound != bound ? kInfinity<float> : bound);
  }
}

// Raises the maxima of an item's pages by a tile of rows. Rounds as the caller has set.
[[gnu::noinline]] void score_pages(const PageScoresParams& p, const Item& item, Tile tile, const Buffers& b) {
  const int padded = round_up_lanes<float>(p.head_dim);
  const int64_t group = p.heads / p.kv_heads;
  with_type(p.bounds.data, p.bounds_type, [&](const auto* data) {
    const auto* bounds = data + item.batch * p.bounds.batch + item.kv_head * p.bounds.head + item.first * p.bounds.seq;
    for (int64_t page = 0; page < item.count; ++page) {
      for (int r = 0; r < tile.rows;) {
        float* best[4];
        const int count = tile.rows - r >= 4 ? 4 : (tile.rows - r >= 2 ? 2 : 1);
        for (int i = 0; i < count; ++i) best[i] = b.best + (tile.first + r + i) % group * kPages + page;
        const float* q = b.q + int64_t{r} * 2 * padded;
        if (count == 4) {
          score_rows<4>(q, bounds, p.head_dim, best);
        } else if (count == 2) {
          score_rows<2>(q, bounds, p.head_dim, best);
        } else {
          score_rows<1>(q, bounds, p.head_dim, best);
        }
        r += count;
      }
      bounds += p.bounds.seq;
    }
  });
}

// scores = max * scale, upward; a page that no query looks at keeps -inf.
[[gnu::noinline]] void write_scores(const float* best, int64_t count, double scale, float* scores) {
  for (int64_t i = 0; i < count; ++i) {
    const auto score = static_cast<float>(best[i] * scale);
    scores[i] = best[i] == -kInfinity<float> ? best[i] : (score != score ? kInfinity<float> : score);
  }
}

void score(const PageScoresParams& p, const Item& item, const Buffers& b) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t rows = (p.q_lengths == nullptr ? p.seq_q : p.q_lengths[item.batch]) * group;
  const int64_t held = p.page_counts == nullptr ? p.pages : p.page_counts[item.batch * p.kv_heads + item.kv_head];
  Item real = item;
  real.count = std::clamp<int64_t>(held - item.first, 0, item.count);
  std::fill(b.best, b.best + group * kPages, -kInfinity<float>);
  // A negative scale turns the greatest score into the least: turn the queries instead.
  const float sign = p.softmax_scale < 0 ? -1.0f : 1.0f;
  const RoundUpward upward;
  for (int64_t first = 0; first < rows && real.count > 0; first += kRows) {
    const Tile tile{first, static_cast<int>(std::min<int64_t>(kRows, rows - first))};
    load_queries(p, item, tile, sign, b.q);
    score_pages(p, real, tile, b);
  }
  for (int64_t h = 0; h < group; ++h) {
    float* best = b.best + h * kPages;
    if (p.per_head) {
      const int64_t at = (item.batch * p.heads + item.kv_head * group + h) * p.pages + item.first;
      write_scores(best, item.count, sign * p.softmax_scale, p.scores + at);
    } else if (h > 0) {
      for (int64_t i = 0; i < item.count; ++i) b.best[i] = std::max(b.best[i], best[i]);
    }
  }
  if (p.per_head) return;
  const int64_t at = (item.batch * p.kv_heads + item.kv_head) * p.pages + item.first;
  write_scores(b.best, item.count, sign * p.softmax_scale, p.scores + at);
}

}  // namespace

void page_scores(const PageScoresParams& p, Executor& executor) {
  Arena measure(nullptr);
  lay_out(p, measure);
  const Scratch scratch(measure.used(), executor.workers());
  const int64_t parts = (p.pages + kPages - 1) / kPages;
  executor.run(p.batch * p.kv_heads * parts, [&](int64_t i, int worker) {
    Arena arena(scratch.of(worker));
    const int64_t slot = i / parts, first = i % parts * kPages;
    score(p, {slot / p.kv_heads, slot % p.kv_heads, first, std::min(kPages, p.pages - first)}, lay_out(p, arena));
  });
}

}  // namespace lcore::cpu::LCORE_ISA
