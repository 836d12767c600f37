// ldmatrix and stmatrix: each lane moves the row that it names, and the warp deals the values out.
#include "block.h"
#include "memory.h"
#include "warp.h"

namespace lcore::emulator {
namespace {

constexpr int kSide = 8;

struct Row {
  uint16_t values[kSide];
};
struct Dealt {
  uint32_t registers[4];
};

struct Loading {
  Row row;
  int count;
  bool transposed;
};
struct Storing {
  uint32_t registers[4];
  int count;
  bool transposed;
};

// The lane whose register holds the value at (row, column) of a matrix, in its half column % 2.
int lane_of(int row, int column) { return row * 4 + column / 2; }

uint8_t* shared_row(const void* row, Access kind) {
  access(row, sizeof(Row), kind, sizeof(Row), nullptr);
  if (!is_shared(row)) current()->fail("ldmatrix or stmatrix: a row is not in shared memory");
  return static_cast<uint8_t*>(const_cast<void*>(row));
}

}  // namespace

void load_matrices(uint32_t* out, const void* row, int count, bool transposed) {
  Loading mine{{}, count, transposed};
  // Lanes beyond the last row give an address that is not used.
  if (current()->running().id % kLanes < kSide * count)
    std::memcpy(&mine.row, shared_row(row, Access::kRead), sizeof(Row));
  const auto dealt = meet<Dealt>("ldmatrix", 0xffffffff, mine, [](const Lanes& lanes) {
    const auto [unused, count, transposed] = lanes.get<Loading>(0);
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t registers[4] = {};
      for (int m = 0; m < count; ++m) {
        for (int half = 0; half < 2; ++half) {
          const int row = lane / 4, column = 2 * (lane % 4) + half;
          const auto source = lanes.get<Row>(kSide * m + (transposed ? column : row));
          registers[m] |= uint32_t{source.values[transposed ? row : column]} << 16 * half;
        }
      }
      for (int m = 0; m < 4; ++m) lanes.set(lane, registers[m], m);
    }
  });
  for (int m = 0; m < count; ++m) out[m] = dealt.registers[m];
}

void store_matrices(void* row, const uint32_t* in, int count, bool transposed) {
  Storing mine{{}, count, transposed};
  for (int m = 0; m < count; ++m) mine.registers[m] = in[m];
  const Row dealt = meet<Row>("stmatrix", 0xffffffff, mine, [](const Lanes& lanes) {
    const auto [unused, count, transposed] = lanes.get<Storing>(0);
    for (int lane = 0; lane < kSide * count; ++lane) {
      Row out{};
      for (int i = 0; i < kSide; ++i) {
        const int row = transposed ? i : lane % kSide, column = transposed ? lane % kSide : i;
        const uint32_t pair = lanes.get<Storing>(lane_of(row, column)).registers[lane / kSide];
        out.values[i] = static_cast<uint16_t>(pair >> 16 * (column % 2));
      }
      lanes.set(lane, out);
    }
  });
  if (current()->running().id % kLanes < kSide * count)
    std::memcpy(shared_row(row, Access::kWrite), &dealt, sizeof dealt);
}

}  // namespace lcore::emulator
