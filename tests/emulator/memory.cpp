#include "memory.h"

#include <algorithm>
#include <vector>

#include "block.h"
#include "source.h"

namespace lcore::emulator {
namespace {

std::vector<Allocation> allocations;  // by address; changes only between launches

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

void access_global(Block& b, uintptr_t at, size_t bytes, const std::string& what, Access kind) {
  const auto after = std::upper_bound(allocations.begin(), allocations.end(), at,
                                      [](uintptr_t x, const Allocation& a) { return x < a.low; });
  if (after != allocations.begin()) {
    const Allocation& a = after[-1];
    if (at - a.low + bytes <= a.bytes) return;
    if (at - a.low < a.bytes + 4096) {
      b.fail(what + ": " + std::to_string(at - a.low) + " bytes into " + a.name + ", which has " +
             std::to_string(a.bytes));
    }
  }
  if (kind == Access::kRead && is_constant(at)) return;
  const auto below_dynamic = reinterpret_cast<uintptr_t>(b.dynamic) - at;
  const auto above_dynamic = at - reinterpret_cast<uintptr_t>(b.dynamic) - b.launch.shared_bytes;
  if (below_dynamic <= 4096 || above_dynamic <= 4096) {
    b.fail(what + ": outside the block's " + std::to_string(b.launch.shared_bytes) + " bytes of dynamic shared memory");
  }
  if (after != allocations.end() && after->low - at <= 4096) {
    b.fail(what + ": " + std::to_string(after->low - at) + " bytes before " + after->name);
  }
  b.fail(what + ": no memory of this kernel");
}

}  // namespace

Registered::Registered(const void* memory, size_t bytes, std::string name) : low_(reinterpret_cast<uintptr_t>(memory)) {
  const auto after = std::upper_bound(allocations.begin(), allocations.end(), low_,
                                      [](uintptr_t x, const Allocation& a) { return x < a.low; });
  allocations.insert(after, Allocation{low_, bytes, std::move(name)});
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
  if (at % alignment != 0) {
    b->fail(words(kind, bytes, at) + source(code) + ": not aligned to " + std::to_string(alignment));
  }
  const Place place = shared_place(*b, at);
  const auto what = [&] { return words(kind, bytes, at) + source(code); };
  if (!place.shadow) {
    // The usual case first: no words are made for an access that is fine.
    for (const Allocation& a : allocations) {
      if (at - a.low < a.bytes && at - a.low + bytes <= a.bytes) return;
    }
    return access_global(*b, at, bytes, what(), kind);
  }
  return access_shared(*b, place, bytes, kind, what);
}

void set_in_flight(void* shared, size_t bytes, bool value) {
  const Place p = shared_place(*current(), reinterpret_cast<uintptr_t>(shared));
  for (size_t i = 0; i < bytes; ++i) p.shadow->set_in_flight(p.offset + i, value);
}

bool is_shared(const void* memory) {
  return shared_place(*current(), reinterpret_cast<uintptr_t>(memory)).shadow != nullptr;
}

}  // namespace lcore::emulator
