// Boxes of tensors through the copy engine, each rank and swizzle; and one exchange of data with every mistake in turn.
#include <map>
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx/bulk.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/registers.h"
#include "cuda/ptx/tma.h"
#include "cuda/tensor_map.h"
#include "entry.h"

using namespace lcore;
using namespace lcore::cuda;

struct Tensor {
  const void* data;
  DType type;
  int rank;
  int64_t sizes[5], strides[4];  // innermost first
  int box[5], at[5];
  Swizzle swizzle;
  unsigned char* content;  // of the box, dense
  int action;              // 0 reads the box, 1 writes it, 2 adds to it
};

struct Box {
  CUtensorMap map;
  int at[5], bytes, action;
  Swizzle swizzle;
  unsigned char* content;
};

template <int kRank>
__global__ void move_box(const __grid_constant__ Box p) {
  __shared__ uint64_t full;
  auto* tile = dynamic_shared<unsigned char>();
  int at[kRank];
  for (int i = 0; i < kRank; ++i) at[i] = p.at[i];
  if (threadIdx.x == 0) {
    tma_prefetch_map(p.map);
    mbarrier_init(&full, 1);
    fence_proxy_async();
  }
  __syncthreads();
  if (p.action == 0) {
    if (threadIdx.x == 0) {
      tma_prefetch(p.map, at);
      mbarrier_arrive_expect(&full, p.bytes);
      tma_load(tile, p.map, &full, at, L2::kEvictFirst);
    }
    mbarrier_wait(&full, 0);
    for (int i = threadIdx.x; i < p.bytes; i += blockDim.x) p.content[i] = tile[swizzled(p.swizzle, i)];
    return;
  }
  for (int i = threadIdx.x; i < p.bytes; i += blockDim.x) tile[swizzled(p.swizzle, i)] = p.content[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (p.action == 1) tma_store(p.map, at, tile);
    if (p.action == 2) tma_add(p.map, at, tile);
    bulk_commit();
    bulk_wait<0>();
  }
}

template <int kRank>
void launch_box(const Tensor& t) {
  int64_t sizes[kRank], strides[kRank - 1];
  int box[kRank], bytes = static_cast<int>(size_of(t.type));
  Box p{};
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = t.sizes[i];
    if (i > 0) strides[i - 1] = t.strides[i - 1];
    box[i] = t.box[i];
    bytes *= box[i];
    p.at[i] = t.at[i];
  }
  p.map = tensor_map(t.type, t.data, sizes, strides, box, t.swizzle);
  p.bytes = bytes;
  p.action = t.action;
  p.swizzle = t.swizzle;
  p.content = t.content;
  launch(move_box<kRank>, dim3(1), dim3(64), static_cast<size_t>(bytes), emulator::no_stream(), p);
}

// Contiguous bytes to shared memory, and from there twice: stored and added.
struct ByteCopies {
  const float* from;
  float *to, *sum;
  int count;
};

__global__ void move_bytes(ByteCopies p) {
  __shared__ uint64_t full;
  auto* tile = dynamic_shared<float>();
  const int bytes = p.count * static_cast<int>(sizeof(float));
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    fence_proxy_async();
    mbarrier_arrive_expect(&full, bytes);
    bulk_load(tile, p.from, bytes, &full);
    mbarrier_wait(&full, 0);
    bulk_store(p.to, tile, bytes);
    bulk_add(p.sum, tile, bytes);
    bulk_commit();
    bulk_wait<0>();
  }
}

enum TmaMistake {
  kNone,
  kReadsEarly,
  kReadsUnordered,
  kBarrierUnfenced,
  kTooFewBytes,
  kTooManyBytes,
  kMisaligned,
  kWrongRank,
  kNoMap,
  kReloads,
  kStoreUnfenced,
  kFencedByOneLane,
  kStoreUnordered,
  kOverwrites,
  kLeavesStore,
  kLeavesUncommitted,
  kLeavesLoad,
  kRegisters,
  kOddBytes,
};

struct Exchange {
  CUtensorMap map;  // (64, 64) floats, boxes of 8 rows of 32
  float* data;
  TmaMistake mistake;
};

// Two warps: a box comes, is doubled in place, and goes back where it came from.
__global__ void exchange(const __grid_constant__ Exchange p) {
  constexpr int kBytes = 8 * 32 * sizeof(float);
  __shared__ uint64_t full;
  auto* tile = dynamic_shared<unsigned char>() + (p.mistake == kMisaligned ? 64 : 0);
  const auto is = [&](TmaMistake mistake) { return p.mistake == mistake; };
  const int thread = threadIdx.x;
  if (is(kRegisters)) registers_raise<256>();
  if (thread == 0) {
    mbarrier_init(&full, 1);
    if (!is(kBarrierUnfenced)) fence_proxy_async();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect(&full, is(kTooFewBytes) ? kBytes / 2 : is(kTooManyBytes) ? 2 * kBytes : kBytes);
    if (is(kOddBytes)) bulk_load(tile, p.data, 24, &full);
    if (is(kWrongRank)) tma_load(tile, p.map, &full, {0, 0, 0});
    const CUtensorMap nothing{};
    tma_load(tile, is(kNoMap) ? nothing : p.map, &full, {0, 0});
    if (is(kReloads)) tma_load(tile, p.map, &full, {0, 0});
  }
  if (is(kReadsEarly)) __syncthreads();
  if (is(kLeavesLoad)) return;
  if (is(kReadsUnordered) && thread < 32) mbarrier_wait(&full, 0);
  if (!is(kReadsEarly) && !is(kReadsUnordered)) mbarrier_wait(&full, 0);
  if (is(kReadsUnordered)) __syncwarp();
  for (int i = thread; i < kBytes / 4; i += 64) {
    auto* x = reinterpret_cast<float*>(tile + swizzled(Swizzle::k128, 4 * i));
    *x = 2 * *x;
  }
  if (!is(kStoreUnfenced) && !(is(kFencedByOneLane) && thread > 0)) fence_proxy_async();
  if (!is(kStoreUnordered)) __syncthreads();
  if (thread == 0) {
    tma_store(p.map, {0, 0}, tile);
    if (!is(kLeavesUncommitted)) bulk_commit();
    if (!is(kOverwrites) && !is(kLeavesStore)) bulk_wait_read<0>();
    tile[0] = 1;
  }
}

namespace {

const std::map<std::string, TmaMistake>& mistakes() {
  static const std::map<std::string, TmaMistake> all{
      {"none", kNone},
      {"reads_early", kReadsEarly},
      {"reads_unordered", kReadsUnordered},
      {"barrier_unfenced", kBarrierUnfenced},
      {"too_few_bytes", kTooFewBytes},
      {"too_many_bytes", kTooManyBytes},
      {"misaligned", kMisaligned},
      {"wrong_rank", kWrongRank},
      {"no_map", kNoMap},
      {"reloads", kReloads},
      {"store_unfenced", kStoreUnfenced},
      {"fenced_by_one_lane", kFencedByOneLane},
      {"store_unordered", kStoreUnordered},
      {"overwrites", kOverwrites},
      {"leaves_store", kLeavesStore},
      {"leaves_uncommitted", kLeavesUncommitted},
      {"leaves_load", kLeavesLoad},
      {"registers", kRegisters},
      {"odd_bytes", kOddBytes},
  };
  return all;
}

}  // namespace

extern "C" {

const char* lcore_emulator_move_box(const Tensor* t) {
  return emulator::guarded([=] {
    if (t->rank == 2) launch_box<2>(*t);
    if (t->rank == 3) launch_box<3>(*t);
    if (t->rank == 4) launch_box<4>(*t);
    if (t->rank == 5) launch_box<5>(*t);
  });
}

const char* lcore_emulator_move_bytes(const float* from, float* to, float* sum, int count) {
  return emulator::guarded([=] {
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    launch(move_bytes, dim3(1), dim3(32), bytes, emulator::no_stream(), ByteCopies{from, to, sum, count});
  });
}

// rows: of the tensor map; the tensor has 64.
const char* lcore_emulator_exchange(const char* name, float* data, int64_t rows) {
  return emulator::guarded([=] {
    const CUtensorMap map = tensor_map(DType::kFloat32, data, {64, rows}, {64}, {32, 8}, Swizzle::k128);
    const TmaMistake mistake = mistakes().at(name);
    launch(exchange, dim3(1), dim3(mistake == kRegisters ? 512 : 64), 2048, emulator::no_stream(),
           Exchange{map, data, mistake});
  });
}

}  // extern "C"
