#include "runtime/prefix_index.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <stdexcept>

namespace lcore::runtime {

namespace {

std::string shape(const Rows& rows) {
  return "(" + std::to_string(rows.count) + ", " + std::to_string(rows.width) + ")";
}

uint64_t mask_of(int bits) {
  if (bits < 0 || bits > 64) {
    throw std::invalid_argument("hash_bits must lie in [0, 64], got " + std::to_string(bits));
  }
  return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
}

}  // namespace

PrefixIndex::PrefixIndex(int hash_bits) : hash_mask_(mask_of(hash_bits)) {}

PrefixIndex::Match PrefixIndex::match(const std::string& name, const Rows& tokens) {
  const std::lock_guard lock(mutex_);
  Match found;
  const auto tree = trees_.find(name);
  if (tree == trees_.end()) {
    stats_.misses += tokens.count;
    return found;
  }
  const auto [root, page_size, width] = tree->second;
  if (tokens.width != page_size) {
    throw std::invalid_argument("tokens must have shape (*, " + std::to_string(page_size) + "), got " + shape(tokens));
  }
  found.width = width;
  found.pages.reserve(tokens.count * width);
  ++clock_;
  for (int32_t at = root; found.runs < tokens.count; ++found.runs) {
    const std::span run = tokens.row(found.runs);
    at = find(at, path_hash(nodes_[at].hash, run), run);
    if (at < 0) break;
    touch(at);
    const std::span pages = pages_of(nodes_[at]);
    found.pages.insert(found.pages.end(), pages.begin(), pages.end());
    found.pages.insert(found.pages.end(), width - static_cast<int64_t>(pages.size()), -1);
  }
  stats_.hits += found.runs;
  stats_.misses += tokens.count - found.runs;
  return found;
}

int64_t PrefixIndex::insert(const std::string& name, const Rows& tokens, const Rows& pages) {
  const std::lock_guard lock(mutex_);
  if (tokens.width < 1) throw std::invalid_argument("tokens must have shape (*, >= 1), got " + shape(tokens));
  if (pages.count != tokens.count || pages.width < 1) {
    throw std::invalid_argument("pages must have shape (" + std::to_string(tokens.count) + ", >= 1), got " +
                                shape(pages));
  }
  for (int64_t i = 0; i < pages.count; ++i) {
    const std::span row = pages.row(i);
    const int32_t least = *std::ranges::min_element(row);
    if (least < -1) throw std::invalid_argument("pages must be >= 0, or -1 for none, got " + std::to_string(least));
    if (*std::ranges::max_element(row) < 0) throw std::invalid_argument("pages must be at least one in each row");
  }
  auto tree = trees_.find(name);
  if (tree != trees_.end() && (tree->second.page_size != tokens.width || tree->second.width != pages.width)) {
    throw std::invalid_argument("tokens and pages must have " + std::to_string(tree->second.page_size) + " and " +
                                std::to_string(tree->second.width) + " columns, got " + shape(tokens) + " and " +
                                shape(pages));
  }
  if (tokens.count == 0) return 0;

  ++clock_;
  if (tree == trees_.end()) {
    tree = trees_.emplace(name, Tree{-1, tokens.width, pages.width}).first;
    try {
      tree->second.root = new_node(&*tree, -1, std::hash<std::string>{}(name), {});
    } catch (...) {
      trees_.erase(tree);
      throw;
    }
  }
  int32_t at = tree->second.root;
  int64_t known = 0;
  for (; known < tokens.count; ++known) {
    const std::span run = tokens.row(known);
    const int32_t child = find(at, path_hash(nodes_[at].hash, run), run);
    if (child < 0) break;
    at = child;
    touch(at);
  }
  const int32_t fork = at;
  try {
    for (int64_t i = known; i < tokens.count; ++i) {
      const std::span run = tokens.row(i), held = pages.row(i);
      std::vector<int32_t> values;
      values.reserve(run.size() + held.size());
      values.insert(values.end(), run.begin(), run.end());
      std::ranges::copy_if(held, std::back_inserter(values), [](int32_t page) { return page >= 0; });
      at = new_node(&*tree, at, path_hash(nodes_[at].hash, run), std::move(values));
    }
  } catch (...) {
    if (nodes_[tree->second.root].children == 0) drop_empty(&*tree);
    while (at != fork) drop(std::exchange(at, nodes_[at].parent));
    throw;
  }
  return known;
}

std::vector<int32_t> PrefixIndex::evict(int64_t count, const PageAllocator* allocator) {
  const std::lock_guard lock(mutex_);
  if (count < 0) throw std::invalid_argument("count must be >= 0, got " + std::to_string(count));
  int64_t widest = 0;
  for (const auto& [name, tree] : trees_) widest = std::max(widest, tree.width);
  std::vector<int32_t> taken;
  taken.reserve(std::min(count, stats_.pages) + widest);  // nothing may throw once a node is gone
  auto leaf = leaves_.begin();
  while (static_cast<int64_t>(taken.size()) < count && leaf != leaves_.end()) {
    const auto key = *leaf;
    const Node& node = nodes_[key.second];
    const std::span pages = pages_of(node);
    if (allocator != nullptr && !allocator->held_once(pages)) {
      ++leaf;
      continue;
    }
    taken.insert(taken.end(), pages.begin(), pages.end());
    // The parent may be a leaf now. Of one stamp the smaller node comes first, so it may stand before its child.
    const int32_t parent = node.parent;
    const bool root = nodes_[parent].parent < 0;
    const auto next = root ? key : std::min(key, {nodes_[parent].stamp, parent});
    drop(key.second);
    ++stats_.evictions;
    leaf = leaves_.lower_bound(next);
  }
  return taken;
}

std::vector<int32_t> PrefixIndex::clear(const std::string& name) {
  const std::lock_guard lock(mutex_);
  std::vector<int32_t> taken;
  const auto tree = trees_.find(name);
  if (tree == trees_.end()) return taken;
  taken.reserve(stats_.pages);
  for (size_t id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (node.tree != &*tree || node.parent < 0) continue;
    const std::span pages = pages_of(node);
    taken.insert(taken.end(), pages.begin(), pages.end());
    unhash(static_cast<int32_t>(id));
    leaves_.erase({node.stamp, static_cast<int32_t>(id)});
    give_back(static_cast<int32_t>(id));
  }
  drop_empty(&*tree);
  return taken;
}

std::vector<int32_t> PrefixIndex::clear() {
  const std::lock_guard lock(mutex_);
  std::vector<int32_t> taken;
  taken.reserve(stats_.pages);
  for (const Node& node : nodes_) {
    if (node.parent < 0) continue;
    const std::span pages = pages_of(node);
    taken.insert(taken.end(), pages.begin(), pages.end());
  }
  leaves_.clear();
  by_hash_.clear();
  free_nodes_.clear();
  nodes_.clear();
  trees_.clear();
  stats_.nodes = stats_.pages = 0;
  return taken;
}

void PrefixIndex::renumber(std::span<const int32_t> ids) {
  const std::lock_guard lock(mutex_);
  const auto known = [&](int32_t page) { return page < static_cast<int64_t>(ids.size()) && ids[page] >= 0; };
  for (const Node& node : nodes_) {
    if (node.parent >= 0 && !std::ranges::all_of(pages_of(node), known)) {
      throw std::invalid_argument("ids must name a new place for every page of the index");
    }
  }
  for (Node& node : nodes_) {
    if (node.parent < 0) continue;
    for (auto page = node.values.begin() + node.tree->second.page_size; page != node.values.end(); ++page) {
      *page = ids[*page];
    }
  }
}

PrefixStats PrefixIndex::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

int32_t PrefixIndex::find(int32_t parent, uint64_t hash, std::span<const int32_t> tokens) const {
  const auto [first, last] = by_hash_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    const Node& node = nodes_[it->second];
    if (node.parent == parent && std::ranges::equal(tokens_of(node), tokens)) return it->second;
  }
  return -1;
}

int32_t PrefixIndex::new_node(const Trees::value_type* tree, int32_t parent, uint64_t hash,
                              std::vector<int32_t>&& values) {
  if (free_nodes_.empty()) {
    // Room for every node that there is: giving one back never allocates.
    if (free_nodes_.capacity() <= nodes_.size()) free_nodes_.reserve(2 * nodes_.size() + 1);
    nodes_.emplace_back();
    free_nodes_.push_back(static_cast<int32_t>(nodes_.size() - 1));
  }
  const int32_t id = free_nodes_.back();  // free until nothing can throw any more
  if (parent >= 0) {
    const auto hashed = by_hash_.emplace(hash, id);
    try {
      leaves_.emplace(clock_, id);
    } catch (...) {
      by_hash_.erase(hashed);
      throw;
    }
    Node& above = nodes_[parent];
    if (above.children++ == 0) leaves_.erase({above.stamp, parent});
    ++stats_.nodes;
    stats_.pages += static_cast<int64_t>(values.size()) - tree->second.page_size;
  }
  free_nodes_.pop_back();
  nodes_[id] = Node{tree, parent, 0, hash, clock_, std::move(values)};
  return id;
}

// A leaf, and with the last leaf of a tree the tree.
void PrefixIndex::drop(int32_t id) noexcept {
  const Node& node = nodes_[id];
  const Trees::value_type* tree = node.tree;
  const int32_t parent = node.parent;
  unhash(id);
  auto leaf = leaves_.extract({node.stamp, id});
  give_back(id);
  Node& above = nodes_[parent];
  if (--above.children > 0) return;
  if (above.parent < 0) return drop_empty(tree);
  leaf.value() = {above.stamp, parent};  // the same set element again: nothing is allocated
  leaves_.insert(std::move(leaf));
}

void PrefixIndex::drop_empty(const Trees::value_type* tree) noexcept {
  nodes_[tree->second.root] = Node{};
  free_nodes_.push_back(tree->second.root);
  trees_.erase(trees_.find(tree->first));
}

void PrefixIndex::unhash(int32_t id) noexcept {
  const auto [first, last] = by_hash_.equal_range(nodes_[id].hash);
  by_hash_.erase(std::find_if(first, last, [id](const auto& entry) { return entry.second == id; }));
}

void PrefixIndex::give_back(int32_t id) noexcept {
  --stats_.nodes;
  stats_.pages -= static_cast<int64_t>(pages_of(nodes_[id]).size());
  nodes_[id] = Node{};
  free_nodes_.push_back(id);
}

void PrefixIndex::touch(int32_t id) {
  Node& node = nodes_[id];
  if (node.children == 0) {
    auto leaf = leaves_.extract({node.stamp, id});
    leaf.value().first = clock_;
    leaves_.insert(std::move(leaf));
  }
  node.stamp = clock_;
}

// Chained, so that one lookup stands for the whole path. The constant is 2^64 over the golden ratio, which spreads the
// low bits of a token over the high ones; the shift brings them back down.
uint64_t PrefixIndex::path_hash(uint64_t parent, std::span<const int32_t> tokens) const {
  uint64_t hash = parent;
  for (const int32_t token : tokens) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  }
  return hash & hash_mask_;
}

std::span<const int32_t> PrefixIndex::tokens_of(const Node& node) const {
  return std::span(node.values).first(node.tree->second.page_size);
}

std::span<const int32_t> PrefixIndex::pages_of(const Node& node) const {
  return std::span(node.values).subspan(node.tree->second.page_size);
}

}  // namespace lcore::runtime
