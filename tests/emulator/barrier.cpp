// Barriers of a block: each counts threads, and passes on what they did before.
#include "block.h"

namespace lcore::emulator {

void Block::release(Order& into) {
  Order& order = orders[warp()];
  join(into, order);
  ++order.seen[warp()];
}

Barrier& Block::arrived(int barrier, int expected) {
  const auto refuse = [&](const std::string& what) { fail("barrier " + std::to_string(barrier) + ": " + what); };
  if (barrier < 0 || barrier >= kNamedBarriers) refuse("a block has barriers 0 to 15");
  if (expected % kLanes != 0 && barrier != 0) {
    refuse("waits for " + std::to_string(expected) + " threads, which is no multiple of 32");
  }
  Barrier& b = barriers_[barrier];
  if (b.arrived > 0 && b.expected != expected) {
    refuse("one thread waits for " + std::to_string(b.expected) + " threads, another for " + std::to_string(expected));
  }
  b.expected = expected;
  ++b.arrived;
  release(b.order);
  return b;
}

void Block::complete(Barrier& b) {
  int last = -1;
  for (Thread* thread : b.waiting) {
    thread->state = State::kReady;
    thread->vote = b.votes;
    const int warp = thread->id / kLanes;
    if (warp != last) join(orders[warp], b.order);
    last = warp;
  }
  b = Barrier{};
}

int Block::synchronize(int barrier, int expected, bool vote) {
  Barrier& b = arrived(barrier, expected);
  b.votes += vote;
  b.waiting.push_back(running_);
  if (b.arrived == expected) {
    complete(b);
    return running_->vote;
  }
  wait({"barrier %d for %d threads", {barrier, expected, 0}});
  return running_->vote;
}

void Block::arrive(int barrier, int expected) {
  Barrier& b = arrived(barrier, expected);
  if (b.arrived == expected) complete(b);
}

}  // namespace lcore::emulator
