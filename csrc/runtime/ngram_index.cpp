#include "runtime/ngram_index.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace lcore::runtime {

namespace {

constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
constexpr int64_t kFirstCells = 64;

// Taken from the last token backwards, the hash of an n-gram is one step from that of the (n - 1)-gram.
uint64_t hash_step(uint64_t hash, int32_t token) {
  hash = (hash + static_cast<uint64_t>(token) + 1) * kMultiplier;
  return hash ^ (hash >> 32);
}

}  // namespace

NgramIndex::NgramIndex(int64_t n_min, int64_t n_max) {
  if (n_min < 1 || n_min > n_max || n_max > kLongest) {
    throw std::invalid_argument("n_min and n_max must satisfy 1 <= n_min <= n_max <= " + std::to_string(kLongest) +
                                ", got " + std::to_string(n_min) + " and " + std::to_string(n_max));
  }
  for (int64_t n = n_min; n <= n_max; ++n) tables_.push_back({n, std::vector<Cell>(kFirstCells), {}});
}

template <class Visit>
void NgramIndex::for_each_ngram(int32_t end, const Visit& visit) {
  uint64_t hash = 0;
  int64_t n = 0;
  for (Table& table : tables_) {
    if (table.n > int64_t{end} + 1) return;
    for (; n < table.n; ++n) hash = hash_step(hash, tokens_[end - n]);
    visit(table, hash);
  }
}

bool NgramIndex::same(int32_t a, int32_t b, int64_t n) const {
  const auto last = tokens_.begin() + 1;  // behind the end of an n-gram that ends at 0
  return std::equal(last + a - n, last + a, last + b - n);
}

void NgramIndex::enter(Table& table, uint64_t hash, int32_t end) {
  const auto tag = static_cast<uint32_t>(hash >> 32);
  const uint64_t mask = table.cells.size() - 1;
  for (uint64_t i = hash & mask;; i = (i + 1) & mask) {
    Cell& cell = table.cells[i];
    if (cell.end == kNone) {
      cell = {end, tag};
      ++table.used;
      return;
    }
    if (cell.tag == tag && same(cell.end, end, table.n)) {
      table.previous[end] = cell.end;
      cell.end = end;
      return;
    }
  }
}

void NgramIndex::grow(Table& table) {
  // Three quarters full at most: a search for an absent n-gram then looks at eight cells on average.
  if (4 * (table.used + 1) <= 3 * static_cast<int64_t>(table.cells.size())) return;
  Table larger{table.n, std::vector<Cell>(2 * table.cells.size()), std::vector<int32_t>(table.previous.size(), kNone)};
  larger.previous.reserve(table.previous.capacity());
  // In the order of the text: remove_last relies on it.
  for (auto end = static_cast<int32_t>(table.n - 1); end < static_cast<int32_t>(tokens_.size()); ++end) {
    uint64_t hash = 0;
    for (int64_t n = 0; n < table.n; ++n) hash = hash_step(hash, tokens_[end - n]);
    enter(larger, hash, end);
  }
  table = std::move(larger);
}

void NgramIndex::add(int32_t token) {
  // All memory first, so that nothing has changed when there is none.
  for (Table& table : tables_) {
    grow(table);
    if (table.previous.size() == table.previous.capacity()) table.previous.reserve(2 * table.previous.size() + 1);
  }
  tokens_.push_back(token);
  for (Table& table : tables_) table.previous.push_back(kNone);
  const auto end = static_cast<int32_t>(tokens_.size() - 1);
  for_each_ngram(end, [&](Table& table, uint64_t hash) { enter(table, hash, end); });
}

void NgramIndex::extend(std::span<const int64_t> tokens) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  for (const int64_t token : tokens) {
    if (token < 0 || token > kLimit) {
      throw std::invalid_argument("tokens must lie in [0, 2^31), got " + std::to_string(token));
    }
  }
  if (static_cast<int64_t>(tokens.size()) > kLimit - size()) {
    throw std::invalid_argument("tokens must be fewer than 2^31 together, got " + std::to_string(tokens.size()) +
                                " on top of " + std::to_string(size()));
  }
  for (const int64_t token : tokens) add(static_cast<int32_t>(token));
}

void NgramIndex::remove_last() {
  const auto end = static_cast<int32_t>(tokens_.size() - 1);
  for_each_ngram(end, [&](Table& table, uint64_t hash) {
    const uint64_t mask = table.cells.size() - 1;
    uint64_t i = hash & mask;
    while (table.cells[i].end != end) i = (i + 1) & mask;
    // Cells were taken in the order of the text, and those taken after this one are empty again: no search for
    // another n-gram has gone past this cell, so that it can simply be emptied.
    table.cells[i].end = table.previous[end];
    if (table.previous[end] == kNone) --table.used;
  });
  for (Table& table : tables_) table.previous.pop_back();
  tokens_.pop_back();
}

void NgramIndex::truncate(int64_t size) {
  if (size < 0 || size > this->size()) {
    throw std::invalid_argument("size must lie in [0, " + std::to_string(this->size()) + "], got " +
                                std::to_string(size));
  }
  while (this->size() > size) remove_last();
}

NgramIndex::Match NgramIndex::match() const {
  for (auto table = tables_.rbegin(); table != tables_.rend(); ++table) {
    if (!table->previous.empty() && table->previous.back() != kNone) return {table->n, table->previous.back()};
  }
  return {};
}

std::vector<int64_t> NgramIndex::propose(int64_t count) const {
  if (count < 0) throw std::invalid_argument("count must be >= 0, got " + std::to_string(count));
  const Match found = match();
  if (found.length == 0) return {};
  std::vector<int64_t> proposal(count);
  const int64_t period = size() - 1 - found.end;
  for (int64_t i = 0; i < count; ++i) proposal[i] = i < period ? tokens_[found.end + 1 + i] : proposal[i - period];
  return proposal;
}

}  // namespace lcore::runtime
