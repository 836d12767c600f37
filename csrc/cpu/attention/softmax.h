// The online softmax of a tile of rows against a block of keys, and the algebra of its states.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/attention/scores.h"
#include "cpu/pack_rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {

// out = sum exp(score - max) v, not yet divided by sum. (-inf, 0, 0) is neutral.
template <class T>
struct State {
  T* max;  // [rows]
  T* sum;  // [rows]
  T* out;  // [rows][ld]

  State at(int64_t row, int ld) const { return {max + row, sum + row, out + row * ld}; }
};

template <class T>
void clear(const State<T>& state, int rows, int ld) {
  std::fill(state.max, state.max + rows, -kInfinity<T>);
  std::fill(state.sum, state.sum + rows, T{0});
  std::fill(state.out, state.out + int64_t{rows} * ld, T{0});
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

// A row whose every score is -inf keeps its neutral state: subtracting 0 makes each weight exp(-inf) = 0.
template <class T>
Vec<T> reference(Vec<T> max) {
  return max == -kInfinity<T> ? Vec<T>{} : max;
}

template <class T>
T row_max(Columns span, const T* scores, T seen) {
  Vec<T> best = splat(seen);
  for (int c = span.begin; c < span.end; c += kLanes<T>) best = max<T>(load(scores + c), best);
  return reduce_max<T>(best);
}

// The new maxima take the place of the old, and rescale = exp(old - new): what was summed under the old is worth now.
// new_max and rescale are padded to vectors; of max, `rows` are written.
template <class T>
void update_max(int rows, T* max, const T* new_max, T* rescale) {
  for (int r = 0; r < rows; r += kLanes<T>) {
    store(rescale + r, exp(load(max + r) - reference<T>(load(new_max + r))));
  }
  std::copy(new_max, new_max + rows, max);
}

// Scores of a row become weights exp(score - max): in place, or rounded to pairs of bfloat16. Returns their sum; zeros
// stand in `steps` (of M) outside the visible columns.
template <class M>
typename M::Out weigh_row(Columns columns, Steps steps, typename M::Out max, typename M::Out* scores,
                          typename M::In* weights) {
  using T = typename M::Out;
  const Columns span = vector_span<T>(columns);
  const T shift = reference<T>(splat(max))[0];
  Vec<T> total{};
  for (int c = span.begin; c < span.end; c += kLanes<T>) {
    const Vec<T> weight = exp(load(scores + c) - shift);
    store_weights(weights + c / M::kPair, weight);
    total += weight;
  }
  const auto clear = [&](int begin, int end) {
    for (int k = begin; k < end; ++k) weights[k] = {};
  };
  clear(steps.begin, span.begin / M::kPair);
  clear(div_up(span.end, M::kPair), steps.end);
  return reduce_add<T>(total);
}

}  // namespace lcore::cpu::LCORE_ISA
