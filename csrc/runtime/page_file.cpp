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

#ifndef MADV_POPULATE_READ  // glibc 2.35
#define MADV_POPULATE_READ 22
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

int Mapping::advise(int64_t begin, int64_t end, int advice) const {
  end = std::min(end, bytes_);
  return begin >= end || madvise(data_ + begin, end - begin, advice) == 0 ? 0 : errno;
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
    for (const Run done : std::span(runs).first(i + 1)) punch(done);
    throw error;
  }
}

void PageFile::discard(std::span<const int32_t> ids) {
  const std::lock_guard lock(mutex_);
  require_owner();
  for (const Run run : pages_as_bytes(ids)) {
    if (!punch(run)) fail("fallocate");
  }
}

bool PageFile::punch(Run bytes) {
  const auto [begin, end] = bytes;
  constexpr int kHole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  if (retry([&] { return fallocate(descriptor_, kHole, begin, end - begin); }) != 0) return false;
  for (int64_t i = begin / span_bytes_; i * span_bytes_ < end; ++i) {
    const auto span = static_cast<int32_t>(i);
    const bool whole = i * span_bytes_ >= begin && (i + 1) * span_bytes_ <= end;
    // What a span shares with a page beside these is still there, and the zeros next to it have been written in memory.
    whole ? recency_.remove(span) : recency_.touch(span);
    states_[i].dirty = !whole;
  }
  return true;
}

PageFile::Marked PageFile::mark(std::span<const int32_t> ids, bool ahead, bool writes) {
  Marked marked;
  for (const int32_t id : ids) {
    const auto [begin, end] = spans_of(id);
    append_to(marked.used, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      const auto span = static_cast<int32_t>(i);
      State& state = states_[i];
      const bool missing = !recency_.contains(span);
      if (missing || (state.reading && !ahead)) append_to(marked.missing, i, i + 1);
      recency_.touch(span);
      marked.spans += state.call != call_;
      state = {.call = call_, .dirty = state.dirty || writes, .reading = ahead && (missing || state.reading)};
    }
  }
  return marked;
}

int64_t PageFile::touch(std::span<const int32_t> ids, std::span<const int32_t> ahead, int64_t most_bytes, bool writes) {
  const std::lock_guard lock(mutex_);
  require_owner();
  ++call_;
  const Marked now = mark(ids, false, writes), later = mark(ahead, true, false);
  drop_oldest(most_bytes / span_bytes_, now.spans + later.spans);
  const auto advise = [this](const std::vector<Run>& runs, int advice) {
    for (const auto [begin, end] : runs) {
      if (mapping_->advise(begin * span_bytes_, end * span_bytes_, advice) == EFAULT) {
        throw std::system_error(EIO, std::generic_category(), "madvise");
      }
    }
  };
  // All reads are on their way before the first is waited for. Waiting here makes of a disk that fails an error, not
  // the end of the process, and nothing that is still being read is ever dropped, which the system would not do. A
  // kernel before 5.14 refuses to wait: pages then come by faults.
  advise(now.missing, MADV_WILLNEED);
  advise(later.missing, MADV_WILLNEED);
  advise(writes ? now.used : now.missing, writes ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
  return drops_;
}

void PageFile::recount(std::span<const int32_t> ids, int64_t most_bytes) {
  const std::lock_guard lock(mutex_);
  require_owner();
  ++call_;
  mark(ids, false, false);
  drop_oldest(most_bytes / span_bytes_, 0);
}

void PageFile::drop_oldest(int64_t most, int64_t untouchable) {
  // The system keeps a page that something of its own holds at that moment. It is still counted, and tried again.
  for (int tries = 0; tries < kTries && recency_.size() > most; ++tries) {
    std::vector<int32_t> spans = recency_.oldest(recency_.size() - std::max(most - most / kBatch, untouchable));
    if (spans.empty()) return;
    std::ranges::sort(spans);
    std::vector<Run> runs, dirty;
    for (const int32_t span : spans) {
      append_to(runs, span, span + 1);
      if (states_[span].dirty) append_to(dirty, span, span + 1);
    }
    if (tries == 0) {
      write_back(dirty);
    } else if (retry([&] { return fdatasync(descriptor_); }) != 0) {  // all that a union file system passes on
      fail("fdatasync");
    }
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
