// Pages of a pool in a file, mapped, of which those used last are in memory. The kernel moves them; this class decides
// which, because only it knows what a step will read: the pages that are named are read ahead all at once, and beyond a
// limit those used longest ago are written back and dropped, from the mapping and from the system's page cache.
//
// What is counted and moved is a span: a page, where pages are whole pages of the system, else one of the system's.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "runtime/recency.h"

namespace lcore::runtime {

// Memory of a file from its beginning, unmapped with the last who holds it.
class Mapping {
 public:
  Mapping(int descriptor, int64_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint8_t* data() const { return data_; }
  // madvise of the bytes in it; 0 or the error.
  int advise(int64_t begin, int64_t end, int advice) const;

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_;
};

// Every call takes one mutex. System calls that fail throw std::system_error; a process that was forked off may do
// nothing here, since it would write into its parent's file: std::runtime_error.
class PageFile {
 public:
  // An empty file, open for reading and writing; this object has its own descriptor of it.
  PageFile(int descriptor, int64_t page_bytes);
  ~PageFile();
  PageFile(const PageFile&) = delete;
  PageFile& operator=(const PageFile&) = delete;

  // Addresses of num_pages pages, not fewer than before; those without disk space must not be used yet. Mappings made
  // earlier stay valid and show the same bytes.
  std::shared_ptr<Mapping> map(int64_t num_pages);
  // Disk space under pages, so that writing them cannot fail later: all of it, or none is left to them.
  void back(std::span<const int32_t> ids);
  // Gives the disk space, and the memory, of pages back; their bytes are 0 once there is space again.
  void discard(std::span<const int32_t> ids);
  // Brings pages into memory, to be read or, writes, to be written; starts to read those of `ahead` too. Where more
  // than most_bytes would be there, first drops those used longest ago, none of these. Returns how many drops there
  // have been: a greater number later means that some of these may be among them.
  int64_t touch(std::span<const int32_t> ids, std::span<const int32_t> ahead, int64_t most_bytes, bool writes);
  // Counts pages as in memory, which were dropped while somebody still read them, and drops what exceeds most_bytes.
  void recount(std::span<const int32_t> ids, int64_t most_bytes);

  int64_t page_bytes() const { return page_bytes_; }
  bool contains(int32_t id) const;  // whether all of a page is in memory
  int64_t drops() const;
  int64_t resident_bytes() const;
  int64_t file_bytes() const;  // that the file takes of the disk
  bool in_memory() const;      // the file system has no disk: nothing would be won

 private:
  struct Run {
    int64_t begin, end;  // spans
  };
  struct State {
    uint32_t call = 0;     // that touched it last
    bool dirty = false;    // may have to be written back
    bool reading = false;  // on its way, and not waited for yet
  };

  struct Marked {
    std::vector<Run> used, missing;
    int64_t spans = 0;
  };

  void require_owner() const;
  Marked mark(std::span<const int32_t> ids, bool ahead, bool writes);
  Run spans_of(int32_t id) const;
  std::vector<Run> pages_as_bytes(std::span<const int32_t> ids) const;
  bool punch(Run bytes);
  void drop_oldest(int64_t most, int64_t untouchable);
  void write_back(std::span<const Run> runs) const;
  void drop(Run run);

  mutable std::mutex mutex_;
  int descriptor_;
  int64_t owner_;  // process
  int64_t page_bytes_, span_bytes_, system_page_;
  int64_t num_pages_ = 0;
  std::shared_ptr<Mapping> mapping_;
  std::vector<std::weak_ptr<Mapping>> older_;
  Recency recency_;  // of the spans that are in memory
  std::vector<State> states_;
  uint32_t call_ = 0;
  int64_t drops_ = 0;
};

}  // namespace lcore::runtime
