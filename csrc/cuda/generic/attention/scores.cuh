// What happens to a score between the two products: scale, soft cap, ALiBi. The 16-bit kernels count scores in units of
// log2(e), so that exp2 takes them; the others in their own.
#pragma once

#include "cuda/generic/attention/sequence.cuh"
#include "cuda/numeric.cuh"

namespace lcore::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <class X>
struct Scores {
  X scale;        // of a product
  X inverse_cap;  // 0: no cap
  X cap;
  X slope;
  int shift;

  // `unit`: what a score of 1 counts for.
  __device__ Scores(const AttentionParams& p, const Sequence& s, int head, double unit)
      : scale(static_cast<X>(p.softmax_scale * (p.softcap > 0 ? 1.0 : unit))),
        inverse_cap(p.softcap > 0 ? static_cast<X>(1.0 / p.softcap) : X{0}),
        cap(static_cast<X>(p.softcap * unit)),
        slope(p.alibi_slopes == nullptr
                  ? X{0}
                  : static_cast<X>(p.alibi_slopes[s.batch * p.alibi_batch + head]) * static_cast<X>(unit)),
        shift(s.k_len - s.q_len) {}

  // Whether a score is its product times the scale and nothing else, in an order that the scale does not turn round.
  __device__ bool plain() const { return inverse_cap == X{0} && slope == X{0} && scale > X{0}; }

  // The finished score; `slope_of_cap` is its derivative by the product times the scale.
  __device__ X finish(X product, int row, int key, X& slope_of_cap) const {
    X score = product * scale;
    slope_of_cap = X{1};
    if (inverse_cap != X{0}) {
      const X ratio = tanh(score * inverse_cap);
      score = cap * ratio;
      slope_of_cap = X{1} - ratio * ratio;
    }
    if (slope != X{0}) score -= slope * static_cast<X>(abs(row + shift - key));
    return score;
  }
};

// A row's sink joins its state: `lse` of the keys becomes that of keys and sink; returns the share that the keys keep.
template <class X>
__device__ X add_sink(X& lse, X sink) {
  if (lse == -INFINITY && sink == -INFINITY) return X{0};
  const X keep = X{1} / (X{1} + exp(sink - lse));
  const X top = lse > sink || isnan(lse) ? lse : sink, distance = lse == sink ? X{0} : -fabs(lse - sink);
  lse = top + log1p(exp(distance));
  return keep;
}

}  // namespace lcore::cuda
