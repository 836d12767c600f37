#include "warp.h"

#include <bit>

#include "block.h"

namespace lcore::emulator {

void meet(const char* what, uint32_t mask, const void* in, size_t in_bytes, void* out, size_t out_bytes,
          Combine combine) {
  Block& b = *current();
  Thread& self = b.running();
  const int lane = self.id % kLanes;
  const auto refuse = [&](const std::string& why) { b.fail(std::string(what) + ": " + why); };
  if (!(mask >> lane & 1)) refuse("the mask lacks the calling lane " + std::to_string(lane));
  Meeting& meeting = b.meetings[b.warp()][std::countr_zero(mask)];
  if (meeting.arrived == 0) meeting = Meeting{what, mask, 0};
  if (meeting.mask != mask || meeting.what != what) {
    refuse("other lanes are in " + std::string(meeting.what) + " or have another mask");
  }
  std::memcpy(self.in, in, in_bytes);
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) {
    b.wait({what, {}});
  } else {
    meeting.arrived = 0;
    Lanes lanes{mask, {}, {}};
    for (int i = 0; i < kLanes; ++i) {
      if (!(mask >> i & 1)) continue;
      Thread& thread = b.lane(i);
      lanes.in[i] = thread.in;
      lanes.out[i] = thread.out;
      thread.state = State::kReady;
    }
    combine(lanes);
  }
  std::memcpy(out, self.out, out_bytes);
}

}  // namespace lcore::emulator
