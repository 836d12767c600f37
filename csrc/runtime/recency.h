// The numbers 0 .. n-1 in the order of their last use, as far as they are in the list: O(1) a call.
#pragma once

#include <cstdint>
#include <vector>

namespace lcore::runtime {

class Recency {
 public:
  Recency() : links_{{0, 0}} {}

  // Adds numbers up to n - 1, none of which is in the list.
  void grow(int32_t n) { links_.resize(n + 1, {kOut, kOut}); }

  bool contains(int32_t i) const { return links_[i + 1].newer != kOut; }
  int64_t size() const { return size_; }

  // Makes i the newest.
  void touch(int32_t i) {
    remove(i);
    const int32_t node = i + 1, newest = links_[kEnds].older;
    links_[node] = {.older = newest, .newer = kEnds};
    links_[newest].newer = node;
    links_[kEnds].older = node;
    ++size_;
  }

  void remove(int32_t i) {
    Link& link = links_[i + 1];
    if (link.newer == kOut) return;
    links_[link.older].newer = link.newer;
    links_[link.newer].older = link.older;
    link = {kOut, kOut};
    --size_;
  }

  // The count <= size() that were used longest ago, the oldest first.
  std::vector<int32_t> oldest(int64_t count) const {
    std::vector<int32_t> found(count);
    int32_t node = kEnds;
    for (int32_t& i : found) {
      node = links_[node].newer;
      i = node - 1;
    }
    return found;
  }

 private:
  struct Link {
    int32_t older, newer;
  };
  static constexpr int32_t kEnds = 0;  // the node before the oldest and behind the newest; number i is node i + 1
  static constexpr int32_t kOut = -1;

  std::vector<Link> links_;
  int64_t size_ = 0;
};

}  // namespace lcore::runtime
