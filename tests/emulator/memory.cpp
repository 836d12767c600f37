#include "memory.h"

#include <algorithm>
#include <string>
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

std::string words(Verdict verdict, int other, const Place& p, size_t i, int warp) {
  const std::string where = std::string(p.name) + " + " + std::to_string(p.offset + i);
  switch (verdict) {
    case Verdict::kUnwritten:
      return ": nobody has written " + where;
    case Verdict::kInFlight:
      return ": the " + std::string(other == kEngine ? "bulk load" : "cp.async") + " that fills " + where +
             " was not waited for";
    case Verdict::kHeld:
      return ": an asynchronous operation that reads " + where + " was not waited for";
    case Verdict::kUnfenced:
      return ": no fence.proxy.async after warp " + std::to_string(other) + " wrote " + where;
    default:
      return ": no barrier between " +
             (other == kEngine ? std::string("the bulk load that filled ")
                               : "warp " + std::to_string(other) + "'s access of ") +
             where + " and this of warp " + std::to_string(warp);
  }
}

// check(byte, other) gives a verdict for each of them; `what` begins the words of an error.
template <class What, class Check>
void check_shared(Block& b, const Place& p, size_t bytes, const What& what, Check&& check) {
  if (bytes > p.room) {
    b.fail(what() + ": " + std::to_string(bytes - p.room) + " of them past the end of " + p.name);
  }
  for (size_t i = 0; i < bytes; ++i) {
    int other = 0;
    const Verdict verdict = check(p.offset + i, other);
    if (verdict != Verdict::kFine) b.fail(what() + words(verdict, other, p, i, b.warp()));
  }
}

template <class What>
void access_shared(Block& b, const Place& p, size_t bytes, Access kind, const What& what) {
  const int warp = b.warp();
  const Clock& seen = b.orders[warp].seen;
  Shadow& s = *p.shadow;
  check_shared(b, p, bytes, what, [&](size_t at, int& other) {
    if (kind == Access::kRead) return s.read(at, warp, seen, other);
    return kind == Access::kWrite ? s.write(at, warp, seen[warp], seen, other) : s.atomic(at, seen, other);
  });
}

// As check_shared, for an asynchronous operation.
template <class Check>
void check_async(const char* what, const char* verb, const void* shared, size_t bytes, Check&& check) {
  Block& b = *current();
  const Place p = shared_place(b, reinterpret_cast<uintptr_t>(shared));
  if (!p.shadow) b.fail(std::string(what) + ": it " + verb + " what is not shared memory");
  const auto words = [&] { return std::string(what) + " " + verb + " " + std::to_string(bytes) + " bytes"; };
  check_shared(b, p, bytes, words,
               [&](size_t at, int& other) { return check(*p.shadow, b.orders[b.warp()], at, other); });
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

void claim(const char* what, void* shared, size_t bytes, uint32_t engine_epoch) {
  check_async(what, "writes", shared, bytes, [&](Shadow& s, const Order& order, size_t at, int& other) {
    Verdict verdict = s.async_write(at, order, other);
    if (verdict == Verdict::kFine) verdict = s.write(at, kEngine, engine_epoch, order.seen, other);
    if (verdict == Verdict::kFine) s.set_in_flight(at, true);
    return verdict;
  });
}

void set_arrived(Block& b, void* shared, size_t bytes) {
  const Place p = shared_place(b, reinterpret_cast<uintptr_t>(shared));
  for (size_t i = 0; i < bytes; ++i) p.shadow->set_in_flight(p.offset + i, false);
}

void hold(const char* what, const void* shared, size_t bytes) {
  check_async(what, "reads", shared, bytes, [&](Shadow& s, const Order& order, size_t at, int& other) {
    const Verdict verdict = s.async_read(at, order, other);
    if (verdict == Verdict::kFine) s.hold(at);
    return verdict;
  });
}

void let_go(const void* shared, size_t bytes) {
  Block& b = *current();
  const Place p = shared_place(b, reinterpret_cast<uintptr_t>(shared));
  const int warp = b.warp();
  const Clock& seen = b.orders[warp].seen;
  for (size_t i = p.offset; i < p.offset + bytes; ++i) {
    p.shadow->let_go(i);
    p.shadow->note_read(i, warp, seen[warp], seen);
  }
}

void let_go_of_product(const void* shared, size_t bytes, uint32_t tensor_epoch) {
  Block& b = *current();
  const Place p = shared_place(b, reinterpret_cast<uintptr_t>(shared));
  for (size_t i = p.offset; i < p.offset + bytes; ++i) {
    p.shadow->let_go(i);
    p.shadow->note_read(i, kTensor, tensor_epoch, b.orders[b.warp()].seen);
  }
}

void require_fenced(const char* what, const void* shared, size_t bytes) {
  check_async(what, "uses", shared, bytes,
              [](Shadow& s, const Order& order, size_t at, int& other) { return s.async_read(at, order, other); });
}

bool is_shared(const void* memory) {
  return shared_place(*current(), reinterpret_cast<uintptr_t>(memory)).shadow != nullptr;
}

}  // namespace lcore::emulator
