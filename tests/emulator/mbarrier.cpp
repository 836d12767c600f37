// mbarriers: the counts lie in the object in shared memory, who waits and in which order in the block.
#include "cuda/ptx/mbarrier.h"

#include <algorithm>

#include "block.h"
#include "memory.h"

namespace lcore::emulator {
namespace {

struct Counts {
  uint64_t phase : 1;     // parity of the phase that has not ended
  uint64_t count : 20;    // arrivals of a phase
  uint64_t pending : 20;  // arrivals still to come
  int64_t bytes : 23;     // announced and not yet come
};
static_assert(sizeof(Counts) == sizeof(uint64_t));

Counts& counts(uint64_t* barrier, Access kind) {
  if (!is_shared(barrier)) current()->fail("mbarrier: it is not in shared memory");
  access(barrier, sizeof(Counts), kind, sizeof(Counts), nullptr);
  return *reinterpret_cast<Counts*>(barrier);
}

Mbarrier& record(uint64_t* barrier) { return current()->mbarriers[reinterpret_cast<uintptr_t>(barrier)]; }

void end_phase_if_due(Block& b, uint64_t* barrier, Counts& c) {
  if (c.pending != 0 || c.bytes != 0) return;
  c.phase ^= 1;
  c.pending = c.count;
  Mbarrier& r = b.mbarriers[reinterpret_cast<uintptr_t>(barrier)];
  r.ended = r.arriving;
  for (Thread* thread : r.waiting) {
    thread->state = State::kReady;
    join(b.orders[thread->id / kLanes], r.ended);
  }
  r.waiting.clear();
}

void arrive_and_expect(uint64_t* barrier, int bytes) {
  Block& b = *current();
  Counts& c = counts(barrier, Access::kAtomic);
  if (c.pending == 0) b.fail("mbarrier: more than " + std::to_string(c.count) + " arrivals in a phase");
  b.release(record(barrier).arriving);
  --c.pending;
  c.bytes += bytes;
  end_phase_if_due(b, barrier, c);
}

}  // namespace

void complete_bytes(Block& b, uint64_t* barrier, int bytes, uint32_t engine_epoch) {
  auto& c = *reinterpret_cast<Counts*>(barrier);
  uint32_t& arriving = b.mbarriers[reinterpret_cast<uintptr_t>(barrier)].arriving.seen[kEngine];
  arriving = std::max(arriving, engine_epoch);
  c.bytes -= bytes;
  end_phase_if_due(b, barrier, c);
}

}  // namespace lcore::emulator

namespace lcore::cuda {

using namespace emulator;

void mbarrier_init(uint64_t* barrier, int count) {
  if (count < 1 || count >= 1 << 20)
    current()->fail("mbarrier: initialised for " + std::to_string(count) + " arrivals");
  counts(barrier, Access::kWrite) = Counts{0, static_cast<uint64_t>(count), static_cast<uint64_t>(count), 0};
}

void mbarrier_arrive(uint64_t* barrier) { arrive_and_expect(barrier, 0); }

void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { arrive_and_expect(barrier, bytes); }

void mbarrier_complete(uint64_t* barrier, int bytes) {
  Counts& c = counts(barrier, Access::kAtomic);
  current()->release(record(barrier).arriving);
  c.bytes -= bytes;
  end_phase_if_due(*current(), barrier, c);
}

void mbarrier_wait(uint64_t* barrier, int parity) {
  Block& b = *current();
  const Counts& c = counts(barrier, Access::kAtomic);
  Mbarrier& r = record(barrier);
  if (static_cast<int>(c.phase) != parity) return b.acquire(r.ended);
  r.waiting.push_back(&b.running());
  b.wait({"an mbarrier, phase of parity %d, %d arrivals and %d bytes short as it began to wait",
          {parity, static_cast<int>(c.pending), static_cast<int>(c.bytes)}});
}

}  // namespace lcore::cuda
