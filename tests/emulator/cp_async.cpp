// cp.async: the target counts as written and may not be read from the issue on; the bytes move at the wait, the latest
// moment that hardware may choose.
#include <cstring>

#include "block.h"
#include "memory.h"

namespace lcore::emulator {

void cp_async(void* to, const void* from, int bytes, int filled) {
  Block& b = *current();
  const auto size = static_cast<size_t>(bytes);
  if (filled < 0 || filled > bytes)
    b.fail("cp.async: fills " + std::to_string(filled) + " of " + std::to_string(bytes));
  if (!is_shared(to)) b.fail("cp.async: its target is not shared memory");
  if (filled > 0) access(from, static_cast<size_t>(filled), Access::kRead, size, nullptr);
  access(to, size, Access::kWrite, size, nullptr);
  set_in_flight(to, size, true);
  b.running().copies.push_back({to, from, bytes, filled});
}

void cp_async_commit() {
  Thread& thread = current()->running();
  size_t committed = 0;
  for (size_t n : thread.groups) committed += n;
  thread.groups.push_back(thread.copies.size() - committed);
}

void cp_async_wait(int pending) {
  Thread& thread = current()->running();
  while (thread.groups.size() > static_cast<size_t>(pending)) {
    const auto end = thread.copies.begin() + static_cast<std::ptrdiff_t>(thread.groups.front());
    for (auto copy = thread.copies.begin(); copy != end; ++copy) {
      std::memset(copy->to, 0, static_cast<size_t>(copy->bytes));
      std::memcpy(copy->to, copy->from, static_cast<size_t>(copy->filled));
      set_in_flight(copy->to, static_cast<size_t>(copy->bytes), false);
    }
    thread.copies.erase(thread.copies.begin(), end);
    thread.groups.erase(thread.groups.begin());
  }
}

}  // namespace lcore::emulator
