#include "runtime/page_allocator.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>

namespace lcore::runtime {

namespace {

constexpr int64_t kBits = 64;

std::invalid_argument not_in_use(int32_t id) {
  return std::invalid_argument("ids must be pages in use, got " + std::to_string(id));
}

}  // namespace

PageAllocator::PageAllocator(int64_t num_pages) { grow(num_pages); }

std::vector<int32_t> PageAllocator::allocate(int64_t count) {
  const std::lock_guard lock(mutex_);
  if (count < 0) throw std::invalid_argument("count must be >= 0, got " + std::to_string(count));
  if (count > free_count_) {
    throw OutOfPages(std::to_string(count) + " pages needed, " + std::to_string(free_count_) + " free");
  }
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) {
    while (free_bits_[first_free_word_] == 0) ++first_free_word_;
    uint64_t& word = free_bits_[first_free_word_];
    id = static_cast<int32_t>(first_free_word_ * kBits + std::countr_zero(word));
    word &= word - 1;  // clears the lowest set bit
    references_[id] = 1;
  }
  free_count_ -= count;
  return ids;
}

bool PageAllocator::in_use(int32_t id) const {
  return id >= 0 && id < static_cast<int64_t>(references_.size()) && references_[id] > 0;
}

void PageAllocator::retain(std::span<const int32_t> ids) {
  const std::lock_guard lock(mutex_);
  for (const int32_t id : ids) {
    if (!in_use(id)) throw not_in_use(id);
  }
  for (const int32_t id : ids) ++references_[id];
}

int64_t PageAllocator::release(std::span<const int32_t> ids) {
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!in_use(ids[i])) {
      for (const int32_t id : ids.first(i)) ++references_[id];
      throw not_in_use(ids[i]);
    }
    --references_[ids[i]];
  }
  const int64_t free_before = free_count_;
  for (const int32_t id : ids) {
    const int64_t word = id / kBits;
    const uint64_t bit = uint64_t{1} << (id % kBits);
    if (references_[id] > 0 || (free_bits_[word] & bit) != 0) continue;  // the bit is set by an earlier copy of id
    free_bits_[word] |= bit;
    first_free_word_ = std::min(first_free_word_, word);
    ++free_count_;
  }
  return free_count_ - free_before;
}

void PageAllocator::grow(int64_t num_pages) {
  const std::lock_guard lock(mutex_);
  const auto old = static_cast<int64_t>(references_.size());
  if (num_pages < old || num_pages > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("num_pages must lie in [" + std::to_string(old) + ", 2^31), got " +
                                std::to_string(num_pages));
  }
  references_.reserve(num_pages);
  free_bits_.resize((num_pages + kBits - 1) / kBits, 0);
  references_.resize(num_pages, 0);
  for (int64_t id = old; id < num_pages; ++id) free_bits_[id / kBits] |= uint64_t{1} << (id % kBits);
  first_free_word_ = std::min(first_free_word_, old / kBits);
  free_count_ += num_pages - old;
}

std::vector<int32_t> PageAllocator::packed_ids() const {
  const auto total = static_cast<int32_t>(references_.size());
  const int32_t used = total - static_cast<int32_t>(free_count_);
  std::vector<int32_t> ids(total, -1);
  int32_t hole = 0;
  for (int32_t id = 0; id < total; ++id) {
    if (references_[id] == 0) continue;
    if (id < used) {
      ids[id] = id;
      continue;
    }
    while (references_[hole] > 0) ++hole;
    ids[id] = hole++;
  }
  return ids;
}

std::vector<int32_t> PageAllocator::packed() const {
  const std::lock_guard lock(mutex_);
  return packed_ids();
}

void PageAllocator::pack() {
  const std::lock_guard lock(mutex_);
  const std::vector<int32_t> ids = packed_ids();
  const size_t used = references_.size() - free_count_;
  for (size_t id = used; id < ids.size(); ++id) {
    if (ids[id] >= 0) references_[ids[id]] = references_[id];
  }
  references_.resize(used);
  references_.shrink_to_fit();
  free_bits_.assign((used + kBits - 1) / kBits, 0);
  free_bits_.shrink_to_fit();
  first_free_word_ = static_cast<int64_t>(free_bits_.size());
  free_count_ = 0;
}

int64_t PageAllocator::num_pages() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(references_.size());
}

int64_t PageAllocator::free_count() const {
  const std::lock_guard lock(mutex_);
  return free_count_;
}

int64_t PageAllocator::refcount(int32_t id) const {
  const std::lock_guard lock(mutex_);
  if (id < 0 || id >= static_cast<int64_t>(references_.size())) {
    throw std::invalid_argument("id must lie in [0, " + std::to_string(references_.size()) + "), got " +
                                std::to_string(id));
  }
  return references_[id];
}

std::vector<int32_t> PageAllocator::refcounts(std::span<const int32_t> ids) const {
  const std::lock_guard lock(mutex_);
  std::vector<int32_t> counts(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!in_use(ids[i])) throw not_in_use(ids[i]);
    counts[i] = references_[ids[i]];
  }
  return counts;
}

bool PageAllocator::held_once(std::span<const int32_t> ids) const {
  const std::lock_guard lock(mutex_);
  return std::ranges::all_of(ids, [this](int32_t id) { return in_use(id) && references_[id] == 1; });
}

}  // namespace lcore::runtime
