// What the choice of the best pages of each kv head is told.
#pragma once

#include <cstdint>

namespace lcore {

struct SelectPagesParams {
  const float* scores;    // (batch, heads, pages) contiguous; heads is a multiple of kv_heads; NaN counts as +inf
  const int32_t* ranked;  // (batch, kv_heads): pages of each head that take part, the first ones
  const int32_t* read;    // (batch, kv_heads): how many of them are chosen
  int64_t sinks;          // first pages that come before all others
  int32_t* chosen;        // (batch, kv_heads, width): their indices, rising, then -1
  float* unread;          // (batch, heads): log of the sum of exp(score) over ranked pages that are not chosen
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t pages;
  int64_t width;
};

}  // namespace lcore
