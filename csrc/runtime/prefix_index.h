// Which pages hold the beginning of a text that was read before. Texts are cut into runs of page_size tokens, one page
// long; a node is one run behind the runs before it, so that a text is a path from its namespace's root. A run is
// looked up by a hash of the whole path to it and then compared, token by token under the same parent: a collision
// costs a comparison and never gives a wrong page. A namespace is whatever else must be equal for pages to be the same;
// its first insertion fixes its page size and how many pages (layers times kv heads, or parts of them) a run can have.
#pragma once

#include <cstdint>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime/page_allocator.h"

namespace lcore::runtime {

// A matrix of int32 in row-major order: row i is about the i-th run of a text.
struct Rows {
  const int32_t* data = nullptr;
  int64_t count = 0;
  int64_t width = 0;

  std::span<const int32_t> row(int64_t i) const { return {data + i * width, static_cast<size_t>(width)}; }
};

struct PrefixStats {
  int64_t nodes = 0;
  int64_t pages = 0;      // of all nodes
  int64_t hits = 0;       // runs that a match found
  int64_t misses = 0;     // runs that a match asked for and did not find
  int64_t evictions = 0;  // nodes that evict took
};

// Every call takes one mutex and either does all that it says or throws and changes nothing. The index counts no
// references: whoever calls retains the pages of new nodes and releases those that evict and clear return.
class PrefixIndex {
 public:
  // Fewer bits only make collisions; 64 by default.
  explicit PrefixIndex(int hash_bits = 64);

  // The pages of the longest known beginning of a text, in a vector of runs * width, -1 behind those of a run that has
  // fewer; it counts as used now.
  // tokens: (runs, page_size). Throws std::invalid_argument for a page size that is not the namespace's.
  struct Match {
    std::vector<int32_t> pages;
    int64_t runs = 0;
    int64_t width = 0;
  };
  Match match(const std::string& name, const Rows& tokens);

  // Adds the runs of a text that are not known yet, and returns how many were: rows from there on are new in the index,
  // rows before it keep the pages that they had. tokens: (runs, page_size), pages: (runs, width), at least one in each
  // row and -1 where there is none.
  int64_t insert(const std::string& name, const Rows& tokens, const Rows& pages);

  // Takes away runs that no run follows, the longest unused first, until they had `count` pages, and returns the pages.
  // With an allocator only runs whose pages have no other reference than the index's.
  std::vector<int32_t> evict(int64_t count, const PageAllocator* allocator = nullptr);

  // Takes away a namespace, or all of them, and returns the pages.
  std::vector<int32_t> clear(const std::string& name);
  std::vector<int32_t> clear();

  // Pages have moved: page i is now ids[i].
  void renumber(std::span<const int32_t> ids);

  PrefixStats stats() const;

 private:
  struct Tree {
    int32_t root;
    int64_t page_size;
    int64_t width;
  };
  using Trees = std::unordered_map<std::string, Tree>;
  struct Node {
    const Trees::value_type* tree = nullptr;  // nullptr: not in use
    int32_t parent = -1;                      // -1: a root, which has no run
    int32_t children = 0;
    uint64_t hash = 0;            // of all tokens from the root to here
    uint64_t stamp = 0;           // of the last use; a parent's is never older than its child's
    std::vector<int32_t> values;  // page_size tokens, then the pages
  };

  int32_t find(int32_t parent, uint64_t hash, std::span<const int32_t> tokens) const;
  int32_t new_node(const Trees::value_type* tree, int32_t parent, uint64_t hash, std::vector<int32_t>&& values);
  void drop(int32_t id) noexcept;
  void drop_empty(const Trees::value_type* tree) noexcept;
  void unhash(int32_t id) noexcept;
  void give_back(int32_t id) noexcept;
  void touch(int32_t id);
  uint64_t path_hash(uint64_t parent, std::span<const int32_t> tokens) const;
  std::span<const int32_t> tokens_of(const Node& node) const;
  std::span<const int32_t> pages_of(const Node& node) const;

  mutable std::mutex mutex_;
  const uint64_t hash_mask_;
  Trees trees_;
  std::vector<Node> nodes_;
  std::vector<int32_t> free_nodes_;
  std::unordered_multimap<uint64_t, int32_t> by_hash_;
  std::set<std::pair<uint64_t, int32_t>> leaves_;  // (stamp, node): the longest unused first
  uint64_t clock_ = 0;
  PrefixStats stats_;
};

}  // namespace lcore::runtime
