#include "memory.h"

#include <algorithm>
#include <vector>

#include "block.h"
#include "source.h"

namespace lcore::emulator {
namespace {

std::vector<Allocation> allocations;  // a few; changes only between launches

std::string words(Access kind, size_t bytes, uintptr_t at) {
  const char* verb = kind == Access::kRead ? "reads " : kind == Access::kWrite ? "writes " : "changes atomically ";
  char hex[32];
  std::snprintf(hex, sizeof hex, "0x%zx", static_cast<size_t>(at));
  return verb + std::to_string(bytes) + " bytes at " + hex;
}

struct Place {  // of shared memory
  Shadow* shadow;
  size_t offset, room;  // bytes from here to the end
  const char* name;
};

// Dynamic shared memory is asked for in bytes, so that what follows it is out of bounds.
Place shared_place(Block& b, uintptr_t at) {
  const auto dynamic = at - reinterpret_cast<uintptr_t>(b.dynamic);
  if (dynamic < b.launch.shared_bytes) {
    return {&b.dynamic_shadow, dynamic, b.launch.shared_bytes - dynamic, "dynamic shared memory"};
  }
  const auto fixed = at - b.static_low;
  if (fixed < b.static_bytes) return {&b.static_shadow, fixed, b.static_bytes - fixed, "static shared memory"};
  return {nullptr, 0, 0, nullptr};
}

template <class What>
void access_shared(Block& b, const Place& p, size_t bytes, Access kind, const What& what) {
  if (bytes > p.room) {
    b.fail(what() + ": " + std::to_string(bytes - p.room) + " of them past the end of " + p.name);
  }
  const int warp = b.warp();
  const Clock& clock = b.clocks[warp];
  for (size_t i = 0; i < bytes; ++i) {
    int other = 0;
    Verdict verdict = Verdict::kFine;
    if (kind == Access::kRead) verdict = p.shadow->read(p.offset + i, warp, clock, other);
    if (kind == Access::kWrite) verdict = p.shadow->write(p.offset + i, warp, clock, other);
    if (kind == Access::kAtomic) verdict = p.shadow->atomic(p.offset + i, clock, other);
    if (verdict == Verdict::kFine) continue;
    const std::string where = std::string(p.name) + " + " + std::to_string(p.offset + i);
    if (verdict == Verdict::kUnwritten) b.fail(what() + ": nobody has written " + where);
    if (verdict == Verdict::kInFlight) b.fail(what() + ": the cp.async that fills " + where + " was not waited for");
    b.fail(what() + ": no barrier between warp " + std::to_string(other) + "'s access of " + where +
           " and this of warp " + std::to_string(warp));
  }
}

// Names the memory that an access has just missed.
[[noreturn]] void blame(Block& b, uintptr_t at, const std::string& what) {
  constexpr size_t kNear = 4096;
  const auto low = reinterpret_cast<uintptr_t>(b.dynamic), end = low + b.launch.shared_bytes;
  if (low - at <= kNear || at - end <= kNear) {
    b.fail(what + ": outside the block's " + std::to_string(end - low) + " bytes of dynamic shared memory");
  }
  for (const Allocation& a : allocations) {
    if (at - a.low < a.bytes + kNear) {
      b.fail(what + ": " + std::to_string(at - a.low) + " bytes into " + a.name + ", which has " +
             std::to_string(a.bytes));
    }
    if (a.low - at <= kNear) b.fail(what + ": " + std::to_string(a.low - at) + " bytes before " + a.name);
  }
  b.fail(what + ": no memory of this kernel");
}

}  // namespace

Registered::Registered(const void* memory, size_t bytes, std::string name) : low_(reinterpret_cast<uintptr_t>(memory)) {
  allocations.push_back(Allocation{low_, bytes, std::move(name)});
}

Registered::~Registered() {
  allocations.erase(
      std::find_if(allocations.begin(), allocations.end(), [&](const Allocation& a) { return a.low == low_; }));
}

void access(const volatile void* memory, size_t bytes, Access kind, size_t alignment, const void* code) {
  Block* b = current();
  if (!b) return;
  const auto at = reinterpret_cast<uintptr_t>(memory);
  if (at - b->running().stack_low < kStackBytes) return;
  b->step();
  const auto what = [&] { return words(kind, bytes, at) + source(code); };  // only for errors: it is slow
  if (at % alignment != 0) b->fail(what() + ": not aligned to " + std::to_string(alignment));
  const Place place = shared_place(*b, at);
  if (place.shadow) return access_shared(*b, place, bytes, kind, what);
  for (const Allocation& a : allocations) {
    if (at - a.low < a.bytes && bytes <= a.bytes - (at - a.low)) return;
  }
  if (kind == Access::kRead && is_constant(at)) return;
  blame(*b, at, what());
}

void set_in_flight(void* shared, size_t bytes, bool value) {
  const Place p = shared_place(*current(), reinterpret_cast<uintptr_t>(shared));
  for (size_t i = 0; i < bytes; ++i) p.shadow->set_in_flight(p.offset + i, value);
}

bool is_shared(const void* memory) {
  return shared_place(*current(), reinterpret_cast<uintptr_t>(memory)).shadow != nullptr;
}

}  // namespace lcore::emulator
