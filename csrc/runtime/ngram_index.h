// Where the last n tokens of a sequence have occurred before, for every n of a range, and what followed them there.
// Speculative decoding drafts with it: text that quotes itself goes on as it did the last time.
//
// For each n a hash table maps an n-gram to the position where its latest occurrence ends, and `previous` holds, for
// every position, where the occurrence before that one ends. Adding a token is one look-up in each table, and the match
// of the last tokens is then known without another. Cells are compared with the tokens themselves, so a collision of
// hashes costs a step and never gives a wrong match.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace lcore::runtime {

// One sequence; not for several threads at once.
class NgramIndex {
 public:
  struct Match {
    int64_t length = 0;  // tokens that agree, 0 when no n-gram of the range has occurred before
    int64_t end = -1;    // position of the earlier occurrence's last token
  };

  // 1 <= n_min <= n_max <= kLongest.
  NgramIndex(int64_t n_min, int64_t n_max);

  // Adds tokens, each in [0, 2^31), at the end: O(n_max) each, amortised. Throws std::invalid_argument before any is
  // added, std::bad_alloc when those before the one that finds no memory have been added.
  void extend(std::span<const int64_t> tokens);
  // Keeps the first `size` tokens: all is as if the others had never been added.
  void truncate(int64_t size);
  // The latest earlier occurrence of the last n tokens, for the largest n that has one.
  Match match() const;
  // The `count` tokens that followed the match, none without a match. An occurrence that lies fewer tokens back than
  // `count` goes on into the proposal itself, so a loop is proposed for as long as asked.
  std::vector<int64_t> propose(int64_t count) const;

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }

  static constexpr int64_t kLongest = 64;

 private:
  struct Cell {
    int32_t end = kNone;  // of the latest occurrence
    uint32_t tag = 0;     // bits of the hash that do not choose the cell: most other n-grams are told apart by these
  };

  struct Table {
    int64_t n;
    std::vector<Cell> cells;        // linear probing; the size is a power of two
    std::vector<int32_t> previous;  // of each position; kNone at the first occurrence
    int64_t used = 0;
  };

  void add(int32_t token);
  void enter(Table& table, uint64_t hash, int32_t end);
  void remove_last();
  void grow(Table& table);
  // Calls visit(table, hash) for the n-gram of each table that ends at `end`, where there are so many tokens.
  template <class Visit>
  void for_each_ngram(int32_t end, const Visit& visit);
  bool same(int32_t a, int32_t b, int64_t n) const;

  static constexpr int32_t kNone = -1;

  std::vector<int32_t> tokens_;
  std::vector<Table> tables_;  // of n_min, ..., n_max
};

}  // namespace lcore::runtime
