// A few query rows (one token of a group of heads) against a block of keys: packing the block would cost more than its
// products. K is packed a panel at a time, which stays in L1; V is read where it lies. What the next block will read is
// asked for from memory meanwhile, a line every few steps: in bursts it would stop the products, and out of the order
// of its addresses memory is a third slower. Sums run in the order of the packed kernels, so the bits are the same.
#pragma once

#include "cpu/attention/operands.h"
#include "cpu/gemm.h"

namespace lcore::cpu::LCORE_ISA {

// Keys whose panels stand in L1 at once; one or two rows take two panels, or the latency of their sums shows.
template <class In>
inline constexpr int kFewKeys = 2 * kPanel<In>;

// gemm() with B from loader_at(j), which loads the vectors from column j on; cols are whole vectors.
template <class M, Accumulate kMode, class LoaderAt>
inline void gemm_loaded(MatrixA<typename M::In> a, const LoaderAt& loader_at, typename M::Out* c, int64_t ldc, int rows,
                        int cols, int depth, const typename M::Out* row_scale = nullptr) {
  constexpr int kLane = kLanes<typename M::In>;
  int j = 0;
  const auto columns = [&]<int kVectors>() {
    for (; j + kVectors * kLane <= cols; j += kVectors * kLane) {
      gemm_rows<M, kVectors, kMode>(a, loader_at(j), row_scale, c + j, ldc, rows, depth);
    }
  };
  if (rows <= 2) columns.template operator()<2 * kTileVectors<typename M::In>>();
  columns.template operator()<kTileVectors<typename M::In>>();
  columns.template operator()<1>();
}

// A loader of B that also asks for memory: `stride` bytes further with every step.
template <class Loader>
struct Ahead {
  Loader loader;
  const char* data;
  int64_t stride;
  auto operator()(int64_t k, int j) const {
    if (j == 0) __builtin_prefetch(data + k * stride);
    return loader(k, j);
  }
};

// Whether a few rows may read V in place: whole vectors of contiguous columns, and pairs that no page cuts.
template <class M>
bool values_in_place(const AttentionParams& p, int keys) {
  if constexpr (std::is_same_v<M, Widened<double>>) return false;  // for gradient checks, not for speed
  const bool vectors = p.head_dim_v % kLanes<typename M::In> == 0 && (p.pages != nullptr || p.v.dim == 1);
  return vectors && keys % M::kPair == 0 && (p.pages == nullptr || p.pages->page_size / p.pages->parts % M::kPair == 0);
}

template <class M>
struct FewRows {
  using In = typename M::In;
  using Out = typename M::Out;
  const AttentionParams& p;
  const Sequence& s;
  int64_t key;
  int keys;
  int block;  // keys from this block to the next
  int rows;
  const KeyRotation<M>* rotation;  // of keys, or nullptr

  // The bytes of `count` keys from `begin` on as if they were contiguous, for `steps` steps to ask for.
  struct Bytes {
    const char* data;
    int64_t stride;
  };
  Bytes next(bool value, int64_t begin, int count, int64_t steps) const {
    if (begin >= s.k_len) return {static_cast<const char*>(p.q.data), 0};
    const Run run = run_at(p, value, s, begin);
    const int64_t row = run.rows.row_stride * static_cast<int64_t>(size_of(run.rows.type));
    return {static_cast<const char*>(run.rows.data), count * row / std::max<int64_t>(1, steps)};
  }

  // scores = Q K^T; `panels` has room for kFewKeys.
  void multiply_keys(const MatrixA<In>& queries, In* panels, Out* scores, int64_t ld_scores) const {
    const int depth = div_up(p.head_dim, M::kPair);
    const int most = rows <= 2 ? kFewKeys<In> : kPanel<In>;
    for (int begin = 0; begin < keys; begin += most) {
      const int count = std::min(most, keys - begin);
      const int cols = round_up_lanes<In>(count);
      pack_keys_as_columns<M>(p, false, s, key + begin, count, panels, nullptr, rotation);
      const Bytes bytes = next(false, key + block + begin, count, depth);
      const auto ahead = [&](int c) {
        return Ahead<Panels<In>>{{panels + c * depth, kPanel<In>, depth * kPanel<In>}, bytes.data, bytes.stride};
      };
      // The widths of gemm(): whole panels, then one as narrow as its columns.
      const int whole = cols / kPanel<In> * kPanel<In>;
      gemm_loaded<M, Accumulate::kOverwrite>(queries, ahead, scores + begin, ld_scores, rows, whole, depth);
      if (whole < cols) {
        gemm<M, Accumulate::kOverwrite>(queries, panels + whole * depth, depth, {0, depth}, scores + begin + whole,
                                        ld_scores, rows, cols - whole);
      }
    }
  }

  // out <- rescale out + weights V, a run of keys after another.
  void multiply_values(const MatrixA<In>& weights, const Out* rescale, Out* out, int ld) const {
    for_each_run(p, true, s, key, keys, nullptr, [&](const RowsIn& run, int offset, int count) {
      with_type(run.data, run.type, [&](const auto* data) {
        using Element = std::remove_cvref_t<decltype(*data)>;
        constexpr bool kReads = std::is_same_v<M, BF16Pairs> ? std::is_same_v<Element, BFloat16>
                                                             : kLoadsVectors<In, Element> && sizeof(In) == 4;
        if constexpr (kReads) {
          const MatrixA<In> a{weights.data + offset / M::kPair, weights.row, 1};
          const int steps = count / M::kPair;
          const Bytes bytes = next(true, key + block + offset, count, int64_t{steps} * ld / kPanel<In>);
          const auto ahead = [&](int c) {
            const char* from = bytes.data + c / kPanel<In> * steps * bytes.stride;
            return Ahead<RowsInPlace<M, Element>>{{data + c, run.row_stride}, from, bytes.stride};
          };
          if (offset == 0) {
            gemm_loaded<M, Accumulate::kScaleAndAdd>(a, ahead, out, ld, rows, ld, steps, rescale);
          } else {
            gemm_loaded<M, Accumulate::kAdd>(a, ahead, out, ld, rows, ld, steps);
          }
        }
      });
    });
  }
};

}  // namespace lcore::cpu::LCORE_ISA
