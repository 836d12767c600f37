// R(0), R(1), ... of the keys that a cache stores before RoPE, and where each key stands: what all workers share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/attention/sequence.h"
#include "cpu/panels.h"
#include "cpu/rope/turns.h"

namespace lcore::cpu::LCORE_ISA {

template <class M>
struct RotationTable {
  using T = typename M::Out;
  static constexpr int kSteps = std::max(32, kPanel<typename M::In>);  // 16 KB at head_dim 128: in L1 beside a panel

  const KvPages* pages;
  int64_t kv_heads;
  Rotation rotation;
  Turns<T> turns;
  std::vector<T> steps;  // [half][cosines, sines][kSteps] of R(0), R(1), ...

  explicit RotationTable(const AttentionParams& p)
      : pages(p.pages),
        kv_heads(p.kv_heads),
        rotation(pages->rope),
        turns(rotation),
        steps(2 * kSteps * rotation.half) {
    std::vector<T> turn(2 * turns.padded());
    for (int i = 0; i < kSteps; ++i) {
      turns.fill(i, T{1}, T{1}, turn.data(), turn.data() + turns.padded());
      for (int m = 0; m < rotation.half; ++m) {
        steps[2 * m * kSteps + i] = turn[m];
        steps[(2 * m + 1) * kSteps + i] = turn[turns.padded() + m];
      }
    }
  }
  static std::optional<RotationTable> of(const AttentionParams& p) {
    if (p.pages == nullptr || !p.pages->before_rope()) return std::nullopt;
    return RotationTable(p);
  }
  int64_t position(const Sequence& s, int64_t key) const {
    return pages->position(s.batch * kv_heads + s.kv_head, key);
  }
};

}  // namespace lcore::cpu::LCORE_ISA
