#include "shadow.h"

#include <new>

namespace lcore::emulator {
namespace {

// Zeroed, and in memory only where touched.
template <class T>
T* map(size_t count) {
  void* memory =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(memory);
}

}  // namespace

Shadow::Shadow(size_t bytes) : bytes_(bytes + 1), cells_(map<Cell>(bytes_)), readers_(map<Clock>(bytes_)) {}

Shadow::~Shadow() {
  munmap(cells_, bytes_ * sizeof(Cell));
  munmap(readers_, bytes_ * sizeof(Clock));
}

Verdict Shadow::read(size_t offset, int warp, const Clock& seen, int& other) {
  Cell& c = cells_[offset];
  if (c.write_epoch < first_) return Verdict::kUnwritten;
  other = c.writer;
  if (c.in_flight) return Verdict::kInFlight;
  if (c.write_epoch > seen[c.writer]) return Verdict::kRace;
  note_read(offset, warp, seen[warp], seen);
  return Verdict::kFine;
}

void Shadow::note_read(size_t offset, int reader, uint32_t epoch, const Clock& seen) {
  Cell& c = cells_[offset];
  const bool many = c.read_warp == kMany && c.read_epoch >= first_;
  if (many || (c.read_epoch >= first_ && c.read_warp != reader && c.read_epoch > seen[c.read_warp])) {
    if (!many) {
      readers_[offset].fill(0);
      readers_[offset][c.read_warp] = c.read_epoch;
    }
    readers_[offset][reader] = epoch;
    c.read_warp = kMany;
    c.read_epoch = c.read_epoch > epoch ? c.read_epoch : epoch;
    return;
  }
  c.read_warp = static_cast<uint8_t>(reader);
  c.read_epoch = epoch;
}

Verdict Shadow::write(size_t offset, int writer, uint32_t epoch, const Clock& seen, int& other) {
  Cell& c = cells_[offset];
  if (c.write_epoch >= first_) {
    other = c.writer;
    if (c.in_flight) return Verdict::kInFlight;
    if (c.holders > 0) return Verdict::kHeld;
    if (c.write_epoch > seen[c.writer]) return Verdict::kRace;
  }
  if (c.read_epoch >= first_) {
    const bool many = c.read_warp == kMany;
    for (int w = many ? 0 : c.read_warp, end = many ? kTensor + 1 : w + 1; w < end; ++w) {
      if ((many ? readers_[offset][w] : c.read_epoch) > seen[w]) {
        other = w;
        return Verdict::kRace;
      }
    }
  }
  c = Cell{epoch, 0, 0, static_cast<uint8_t>(writer), 0, false};
  return Verdict::kFine;
}

Verdict Shadow::atomic(size_t offset, const Clock& seen, int& other) const {
  const Cell& c = cells_[offset];
  if (c.write_epoch < first_) return Verdict::kUnwritten;
  other = c.writer;
  return c.write_epoch > seen[c.writer] ? Verdict::kRace : Verdict::kFine;
}

Verdict Shadow::async_read(size_t offset, const Order& order, int& other) const {
  const Cell& c = cells_[offset];
  if (c.write_epoch < first_) return Verdict::kUnwritten;
  other = c.writer;
  if (c.in_flight) return Verdict::kInFlight;
  if (c.write_epoch > order.seen[c.writer]) return Verdict::kRace;
  return async_write(offset, order, other);
}

Verdict Shadow::async_write(size_t offset, const Order& order, int& other) const {
  const Cell& c = cells_[offset];
  if (c.write_epoch < first_ || c.writer == kEngine || c.write_epoch <= order.fenced[c.writer]) return Verdict::kFine;
  other = c.writer;
  return Verdict::kUnfenced;
}

}  // namespace lcore::emulator
