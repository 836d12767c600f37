// Which pages of a pool are free, and how many caches hold each of the others. Host memory only: the pages' bytes are a
// tensor's business. Ids are handed out lowest first, so that the same calls give the same layout.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <stdexcept>
#include <vector>

namespace lcore::runtime {

class OutOfPages : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Every call takes one mutex and either does all that it says or throws and changes nothing.
class PageAllocator {
 public:
  explicit PageAllocator(int64_t num_pages);

  // The lowest `count` free pages, each with one reference. Throws OutOfPages when there are fewer.
  std::vector<int32_t> allocate(int64_t count);
  // One reference more, or less, for each id; an id may come twice. Pages without references are free again, and
  // release returns how many became so. Throws std::invalid_argument for a reference that nobody holds.
  void retain(std::span<const int32_t> ids);
  int64_t release(std::span<const int32_t> ids);
  // Adds pages behind the last; num_pages is the new total.
  void grow(int64_t num_pages);
  // The id that each page gets when the highest in use move to the lowest free ones until none is free below them;
  // -1 for a free page. pack() renumbers the pages so and drops the free ones.
  std::vector<int32_t> packed() const;
  void pack();

  int64_t num_pages() const;
  int64_t free_count() const;
  int64_t refcount(int32_t id) const;
  // The references of each id.
  std::vector<int32_t> refcounts(std::span<const int32_t> ids) const;
  // Whether each of these pages has one reference.
  bool held_once(std::span<const int32_t> ids) const;

 private:
  bool in_use(int32_t id) const;
  std::vector<int32_t> packed_ids() const;

  mutable std::mutex mutex_;
  std::vector<int32_t> references_;
  std::vector<uint64_t> free_bits_;  // one bit a page: a million pages are 2048 cache lines to scan at worst
  int64_t first_free_word_ = 0;      // no bit is set in the words before it
  int64_t free_count_ = 0;
};

}  // namespace lcore::runtime
