#include "runtime/page_file.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#ifdef __linux__
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE  // glibc 2.35
#define MADV_POPULATE_WRITE 23
#endif

namespace lcore::runtime {

namespace {

// Of the limit, what is dropped beyond it: few long writes, and few calls, instead of one for each span.
constexpr int64_t kBatch = 16;
constexpr int kTries = 3;

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// A call that a signal may interrupt.
template <class Call>
int retry(Call call) {
  int result;
  do result = call();
  while (result != 0 && errno == EINTR);
  return result;
}

template <class Run>
void append_to(std::vector<Run>& runs, int64_t begin, int64_t end) {
  if (!runs.empty() && runs.back().end == begin) {
    runs.back().end = end;
  } else {
    runs.push_back({begin, end});
  }
}

}  // namespace

Mapping::Mapping(int descriptor, int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) fail("mmap");
  data_ = static_cast<uint8_t*>(memory);
  // Reads come one page of a head after the other and are announced: what the kernel would guess beside them is waste.
  madvise(memory, bytes, MADV_RANDOM);
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

void Mapping::advise(int64_t begin, int64_t end, int advice) const {
  end = std::min(end, bytes_);
  if (begin < end) madvise(data_ + begin, end - begin, advice);
}

PageFile::PageFile(int descriptor, int64_t page_bytes)
    : descriptor_(fcntl(descriptor, F_DUPFD_CLOEXEC, 0)), owner_(getpid()), page_bytes_(page_bytes) {
  if (descriptor_ < 0) fail("dup");
  system_page_ = sysconf(_SC_PAGESIZE);
  span_bytes_ = page_bytes % system_page_ == 0 ? page_bytes : system_page_;
  mapping_ = std::make_shared<Mapping>(descriptor_, 0);
}

PageFile::~PageFile() { close(descriptor_); }

void PageFile::require_owner() const {
  if (getpid() != owner_) {
    throw std::runtime_error("the pages are in a file of process " + std::to_string(owner_) +
                             ", from which this one was forked: make the cache after the fork");
  }
}

std::shared_ptr<Mapping> PageFile::map(int64_t num_pages) {
  const std::lock_guard lock(mutex_);
  require_owner();
  const int64_t spans = (num_pages * page_bytes_ + span_bytes_ - 1) / span_bytes_;
  if (num_pages < num_pages_ || spans >= std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("num_pages must be >= " + std::to_string(num_pages_) +
                                " and take less than 2^31 spans of " + std::to_string(span_bytes_) + " bytes, got " +
                                std::to_string(num_pages));
  }
  auto mapping = std::make_shared<Mapping>(descriptor_, num_pages * page_bytes_);
  states_.resize(spans);
  recency_.grow(static_cast<int32_t>(spans));
  num_pages_ = num_pages;
  std::erase_if(older_, [](const auto& older) { return older.expired(); });
  older_.push_back(std::exchange(mapping_, mapping));
  return mapping;
}

PageFile::Run PageFile::spans_of(int32_t id) const {
  if (id < 0 || id >= num_pages_) {
    throw std::invalid_argument("ids must lie in [0, " + std::to_string(num_pages_) + "), got " + std::to_string(id));
  }
  return {id * page_bytes_ / span_bytes_, ((id + 1) * page_bytes_ - 1) / span_bytes_ + 1};
}

std::vector<PageFile::Run> PageFile::pages_as_bytes(std::span<const int32_t> ids) const {
  std::vector<Run> runs;
  for (const int32_t id : ids) append_to(runs, id * page_bytes_, (id + 1) * page_bytes_);
  return runs;
}

void PageFile::back(std::span<const int32_t> ids) {
  const std::lock_guard lock(mutex_);
  require_owner();
  const std::vector<Run> runs = pages_as_bytes(ids);
  for (size_t i = 0; i < runs.size(); ++i) {
    const auto [begin, end] = runs[i];
    if (retry([&] { return fallocate(descriptor_, 0, begin, end - begin); }) == 0) continue;
    const std::system_error error(errno, std::generic_category(), "fallocate");
    punch(std::span(runs).first(i + 1));
    throw error;
  }
}

void PageFile::discard(std::span<const int32_t> ids) {
  const std::lock_guard lock(mutex_);
  require_owner();
  const std::vector<Run> runs = pages_as_bytes(ids);
  punch(runs);
  for (const auto [begin, end] : runs) {
    // Spans that a page beside these shares stay.
    for (int64_t span = (begin + span_bytes_ - 1) / span_bytes_; span < end / span_bytes_; ++span) {
      recency_.remove(static_cast<int32_t>(span));
      states_[span].dirty = false;
    }
  }
}

void PageFile::punch(std::span<const Run> bytes) {
  for (const auto [begin, end] : bytes) {
    retry([&] { return fallocate(descriptor_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, begin, end - begin); });
  }
}

int64_t PageFile::touch(std::span<const int32_t> ids, int64_t most_bytes, bool writes) {
  const std::lock_guard lock(mutex_);
  require_owner();
  ++call_;
  std::vector<Run> used, missing;
  int64_t untouchable = 0;
  for (const int32_t id : ids) {
    const auto [begin, end] = spans_of(id);
    append_to(used, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      const auto span = static_cast<int32_t>(i);
      State& state = states_[i];
      if (!recency_.contains(span)) append_to(missing, i, i + 1);
      recency_.touch(span);
      untouchable += state.call != call_;
      state = {.call = call_, .dirty = state.dirty || writes};
    }
  }
  drop_oldest(most_bytes / span_bytes_, untouchable);
  // One call makes all page faults of what will be written. A kernel before 5.14 refuses it: then they come one by one.
  for (const auto [begin, end] : writes ? used : missing) {
    mapping_->advise(begin * span_bytes_, end * span_bytes_, writes ? MADV_POPULATE_WRITE : MADV_WILLNEED);
  }
  return drops_;
}

void PageFile::drop_oldest(int64_t most, int64_t untouchable) {
  // The system keeps a page that something of its own holds at that moment. It is still counted, and tried again.
  for (int tries = 0; tries < kTries && recency_.size() > most; ++tries) {
    std::vector<int32_t> spans = recency_.oldest(recency_.size() - std::max(most - most / kBatch, untouchable));
    std::ranges::sort(spans);
    std::vector<Run> runs, dirty;
    for (const int32_t span : spans) {
      append_to(runs, span, span + 1);
      if (states_[span].dirty) append_to(dirty, span, span + 1);
    }
    write_back(dirty);
    ++drops_;
    for (const Run run : runs) drop(run);
  }
}

void PageFile::write_back(std::span<const Run> runs) const {
  // All are on their way before the first is waited for.
  for (const int flags : {SYNC_FILE_RANGE_WRITE, SYNC_FILE_RANGE_WRITE_AND_WAIT}) {
    for (const auto [begin, end] : runs) {
      const int64_t bytes = (end - begin) * span_bytes_;
      if (retry([&] { return sync_file_range(descriptor_, begin * span_bytes_, bytes, flags); }) != 0) {
        fail("sync_file_range");
      }
    }
  }
}

void PageFile::drop(Run run) {
  const int64_t begin = run.begin * span_bytes_, end = run.end * span_bytes_;
  mapping_->advise(begin, end, MADV_DONTNEED);
  // The system's page cache keeps what any mapping shows.
  for (const auto& older : older_) {
    if (const auto held = older.lock()) held->advise(begin, end, MADV_DONTNEED);
  }
  posix_fadvise(descriptor_, begin, end - begin, POSIX_FADV_DONTNEED);
  std::vector<unsigned char> resident((end - begin) / system_page_);
  mincore(mapping_->data() + begin, std::min(end, num_pages_ * page_bytes_) - begin, resident.data());
  const int64_t step = span_bytes_ / system_page_;
  for (int64_t span = run.begin; span < run.end; ++span) {
    const auto first = resident.begin() + (span - run.begin) * step;
    if (std::any_of(first, first + step, [](unsigned char page) { return (page & 1) != 0; })) continue;
    recency_.remove(static_cast<int32_t>(span));
    states_[span].dirty = false;
  }
}

bool PageFile::contains(int32_t id) const {
  const std::lock_guard lock(mutex_);
  const auto [begin, end] = spans_of(id);
  for (int64_t i = begin; i < end; ++i) {
    if (!recency_.contains(static_cast<int32_t>(i))) return false;
  }
  return true;
}

int64_t PageFile::drops() const {
  const std::lock_guard lock(mutex_);
  return drops_;
}

int64_t PageFile::resident_bytes() const {
  const std::lock_guard lock(mutex_);
  return recency_.size() * span_bytes_;
}

int64_t PageFile::file_bytes() const {
  struct stat status;
  if (fstat(descriptor_, &status) != 0) fail("fstat");
  return status.st_blocks * 512;  // whatever the file system's own block
}

bool PageFile::in_memory() const {
  struct statfs status;
  if (fstatfs(descriptor_, &status) != 0) fail("fstatfs");
  return status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC;
}

}  // namespace lcore::runtime

#endif  // __linux__
