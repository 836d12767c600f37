// Tensor copies: the box is walked row by row, 16 bytes of shared memory at a time.
#include "cuda/ptx/tma.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "block.h"
#include "bulk.h"
#include "intrinsics.h"
#include "memory.h"
#include "tensor_map.h"

namespace lcore::emulator {
namespace {

constexpr int kChunk = 16;

const TensorMap& decoded(const char* what, const CUtensorMap& map, int rank) {
  const auto& found = reinterpret_cast<const TensorMap&>(map);
  const auto refuse = [&](const std::string& why) { current()->fail(std::string(what) + ": " + why); };
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) refuse("the tensor map is not aligned to 64");
  if (found.mark != kMark) refuse("this is no tensor map");
  if (rank != 0 && found.rank != rank) {
    refuse(std::to_string(rank) + " indices for a tensor of " + std::to_string(found.rank) + " dimensions");
  }
  return found;
}

void require_aligned(const char* what, const void* box) {
  if (reinterpret_cast<uintptr_t>(box) % 128 == 0) return;
  current()->fail(std::string(what) + ": a box in shared memory is not aligned to 128");
}

// The tensor lies in memory that the kernel may touch, as far as the box reaches.
void check_global(const TensorMap& map, const int* at, Access kind) {
  for (size_t r = 0; r < map.box_rows(); ++r) {
    const BoxRow row = box_row(map, at, r);
    if (row.count > 0) access(row.global, static_cast<size_t>(row.count) * map.element_bytes, kind, 1, nullptr);
  }
}

// f(offset in shared memory, global memory, bytes) for every piece of at most 16 bytes that lies in the tensor.
// `shared` gives the address bits that the swizzle mixes.
template <class F>
void for_pieces(const TensorMap& map, const int* at, const void* shared, F&& f) {
  const auto base = reinterpret_cast<uintptr_t>(shared);
  const int size = map.element_bytes;
  const size_t pitch = static_cast<size_t>(map.box[0]) * size;
  for (size_t r = 0; r < map.box_rows(); ++r) {
    const BoxRow row = box_row(map, at, r);
    const int end = (row.first + row.count) * size;
    for (int from = row.first * size; from < end;) {
      const int bytes = std::min(end - from, kChunk - from % kChunk);
      const uintptr_t place = base + r * pitch + static_cast<size_t>(from);
      f(cuda::swizzled(map.swizzle, place) - base, row.global + (from - row.first * size), static_cast<size_t>(bytes));
      from += bytes;
    }
  }
}

template <class T>
void add_all(std::byte* global, const std::byte* content, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T x;
    std::memcpy(&x, content + i, sizeof x);
    atomicAdd(reinterpret_cast<T*>(global + i), x);
  }
}

void add(const TensorMap& map, std::byte* global, const std::byte* content, size_t bytes) {
  switch (map.type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return add_all<float>(global, content, bytes);
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      return add_all<__half>(global, content, bytes);
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return add_all<__nv_bfloat16>(global, content, bytes);
    default:
      return add_all<int32_t>(global, content, bytes);
  }
}

}  // namespace

void tensor_load(void* to, const CUtensorMap& encoded, uint64_t* barrier, const int* at, int rank) {
  const TensorMap map = decoded("tma_load", encoded, rank);
  require_aligned("tma_load", to);
  check_global(map, at, Access::kRead);
  std::array<int, kMaxRank> corner{};
  std::copy(at, at + rank, corner.begin());
  const auto move = [=] {
    std::memset(to, 0, map.box_bytes());
    for_pieces(map, corner.data(), to, [&](size_t offset, const std::byte* global, size_t bytes) {
      std::memcpy(static_cast<std::byte*>(to) + offset, global, bytes);
    });
  };
  issue("tma_load", BulkLoad{to, map.box_bytes(), barrier, 0, move});
}

void tensor_store(const CUtensorMap& encoded, const int* at, int rank, const void* from, bool adds) {
  const char* what = adds ? "tma_add" : "tma_store";
  const TensorMap map = decoded(what, encoded, rank);
  require_aligned(what, from);
  check_global(map, at, Access::kWrite);
  if (adds && map.type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32 && map.type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
      map.type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && map.type != CU_TENSOR_MAP_DATA_TYPE_INT32) {
    current()->fail("tma_add: adds float32, float16, bfloat16 and int32 alone");
  }
  std::array<int, kMaxRank> corner{};
  std::copy(at, at + rank, corner.begin());
  const auto write = [=](const std::byte* content) {
    for_pieces(map, corner.data(), from, [&](size_t offset, std::byte* global, size_t bytes) {
      if (adds)
        add(map, global, content + offset, bytes);
      else
        std::memcpy(global, content + offset, bytes);
    });
  };
  issue(what, BulkStore{static_cast<const std::byte*>(from), map.box_bytes(), write, {}});
}

void tensor_prefetch(const CUtensorMap& map, int rank) { decoded("tma_prefetch", map, rank); }

}  // namespace lcore::emulator
