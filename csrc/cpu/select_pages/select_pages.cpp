// The pages that a kv head reads (Tang et al. 2024, Quest): of its first `ranked` pages the `read` ones whose score,
// the largest over the heads that share the kv head, is greatest; of equal ones the first, so that the choice has one
// value. And what the rest can weigh: log sum exp of the scores not chosen, for every head. A work item is one kv head:
// a partial sort of page indices, then one pass of exp over each head's scores.
#include "core/select_pages.h"

#include <algorithm>
#include <cmath>

#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

struct Buffers {
  float* best;     // [padded pages]: the largest score of a page over the group
  float* rest;     // [padded pages]: one head's scores, -inf where nothing is left out
  int32_t* order;  // [pages]
};

int padded(const SelectPagesParams& p) { return round_up_lanes<float>(static_cast<int>(p.pages)); }

Buffers lay_out(const SelectPagesParams& p, Arena& arena) {
  return {arena.take<float>(padded(p)), arena.take<float>(padded(p)), arena.take<int32_t>(p.pages)};
}

float known(float score) { return score != score ? kInfinity<float> : score; }

// log sum exp of padded values, whole vectors of them.
float log_sum_exp(const float* x, int count) {
  Vec<float> top = splat(-kInfinity<float>);
  for (int i = 0; i < count; i += kLanes<float>) top = max<float>(top, load(x + i));
  const float most = reduce_max<float>(top);
  if (std::isinf(most)) return most;
  Vec<float> sum{};
  for (int i = 0; i < count; i += kLanes<float>) sum += exp(load(x + i) - most);
  return most + std::log(reduce_add<float>(sum));
}

void select(const SelectPagesParams& p, int64_t slot, const Buffers& b) {
  const int64_t group = p.heads / p.kv_heads, ranked = p.ranked[slot], read = p.read[slot];
  const float* scores = p.scores + slot * group * p.pages;
  for (int64_t i = 0; i < ranked; ++i) {
    float best = known(scores[i]);
    for (int64_t h = 1; h < group; ++h) best = std::max(best, known(scores[h * p.pages + i]));
    b.best[i] = best;
    b.order[i] = static_cast<int32_t>(i);
  }
  const auto before = [&](int32_t x, int32_t y) {
    const bool sink_x = x < p.sinks, sink_y = y < p.sinks;
    if (sink_x != sink_y) return sink_x;
    return b.best[x] != b.best[y] ? b.best[x] > b.best[y] : x < y;
  };
  if (read < ranked) std::nth_element(b.order, b.order + read, b.order + ranked, before);
  std::sort(b.order, b.order + read);
  int32_t* chosen = p.chosen + slot * p.width;
  std::fill(std::copy(b.order, b.order + read, chosen), chosen + p.width, -1);
  for (int64_t h = 0; h < group; ++h) {
    std::fill(b.rest, b.rest + padded(p), -kInfinity<float>);
    for (int64_t i = 0; i < ranked; ++i) b.rest[i] = known(scores[h * p.pages + i]);
    for (int64_t i = 0; i < read; ++i) b.rest[b.order[i]] = -kInfinity<float>;
    p.unread[slot * group + h] = log_sum_exp(b.rest, padded(p));
  }
}

}  // namespace

void select_pages(const SelectPagesParams& p, Executor& executor) {
  Arena measure(nullptr);
  lay_out(p, measure);
  const Scratch scratch(measure.used(), executor.workers());
  executor.run(p.batch * p.kv_heads, [&](int64_t slot, int worker) {
    Arena arena(scratch.of(worker));
    select(p, slot, lay_out(p, arena));
  });
}

}  // namespace lcore::cpu::LCORE_ISA
