// The pages that a kv head reads (Tang et al. 2024, Quest): of its first `ranked` pages the `read` ones whose score,
// the largest over the heads of the group, is greatest; of equal ones the first; sinks before all. And log sum exp of
// the scores not chosen, for every head. A block a kv head: scores become integers of the same order, once, in scratch;
// four passes over them find the smallest chosen one, 8 bits each; one pass in order writes the indices, rising.
// Nothing depends on which thread comes first.
#include "core/select_pages.h"

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr uint32_t kSink = 0xffffffffu;  // above the key of +inf

struct SelectParams {
  SelectPagesParams p;
  uint32_t* keys;  // [batch kv_heads][pages]
};

__device__ float known(float score) { return isnan(score) ? INFINITY : score; }

// Integers in the order of the scores; 0 and -0 are equal.
__device__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// Of all threads' x, the sum; `before` becomes that of the threads before this one.
__device__ int sum_in_order(int x, int& before) {
  __shared__ int sums[kWarps];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  int running = x;
  for (int step = 1; step < kWarpLanes; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, running, step);
    if (lane >= step) running += left;
  }
  __syncthreads();
  if (lane == kWarpLanes - 1) sums[warp] = running;
  __syncthreads();
  int all = 0;
  before = running - x;
  for (int i = 0; i < kWarps; ++i) {
    before += i < warp ? sums[i] : 0;
    all += sums[i];
  }
  return all;
}

// Over the block, in a fixed order.
template <class F>
__device__ float reduce(float x, F&& join) {
  __shared__ float parts[kWarps];
  for (int step = kWarpLanes / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, step));
  __syncthreads();
  if (threadIdx.x % kWarpLanes == 0) parts[threadIdx.x / kWarpLanes] = x;
  __syncthreads();
  x = parts[0];
  for (int i = 1; i < kWarps; ++i) x = join(x, parts[i]);
  return x;
}

// The smallest chosen key, and how many of the pages with that key are chosen.
__device__ uint32_t threshold(const uint32_t* keys, int64_t ranked, int64_t read, int64_t& equal) {
  __shared__ int counts[256];
  __shared__ uint32_t found;
  __shared__ int above;  // pages whose key is greater in the bits found so far
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) counts[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < ranked; i += kThreads) {
      if (shift == 24 || keys[i] >> (shift + 8) == prefix) atomicAdd(&counts[keys[i] >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255, greater = 0;
      while (digit > 0 && greater + counts[digit] < read) greater += counts[digit--];
      found = prefix << 8 | static_cast<uint32_t>(digit);
      above = greater;
    }
    __syncthreads();
    prefix = found;
    read -= above;
  }
  equal = read;
  return prefix;
}

// Grid: kv heads.
__global__ void __launch_bounds__(kThreads) select_pages_kernel(SelectParams s) {
  const SelectPagesParams& p = s.p;
  const int64_t slot = blockIdx.x, group = p.heads / p.kv_heads, ranked = p.ranked[slot], read = p.read[slot];
  const float* scores = p.scores + slot * group * p.pages;
  uint32_t* keys = s.keys + slot * p.pages;
  int32_t* chosen = p.chosen + slot * p.width;
  for (int64_t i = threadIdx.x; i < ranked; i += kThreads) {
    float best = known(scores[i]);
    for (int64_t h = 1; h < group; ++h) best = fmaxf(best, known(scores[h * p.pages + i]));
    keys[i] = i < p.sinks ? kSink : key_of(best);
  }
  __syncthreads();
  int64_t equal = 0;
  const uint32_t least = read > 0 ? threshold(keys, ranked, read, equal) : 0;
  int64_t taken = 0, met = 0;  // chosen, and equal to the least, so far
  for (int64_t begin = 0; begin < ranked; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const bool real = i < ranked && read > 0, tied = real && keys[i] == least;
    int tied_before, before;
    const int tied_now = sum_in_order(tied, tied_before);
    const bool take = real && (keys[i] > least || (tied && met + tied_before < equal));
    const int now = sum_in_order(take, before);
    if (take) chosen[taken + before] = static_cast<int32_t>(i);
    if (i < ranked) keys[i] = take ? 1 : 0;
    met += tied_now;
    taken += now;
  }
  for (int64_t i = taken + threadIdx.x; i < p.width; i += kThreads) chosen[i] = -1;
  for (int64_t h = 0; h < group; ++h) {
    const auto rest = [&](int64_t i) { return keys[i] == 1 ? -INFINITY : known(scores[h * p.pages + i]); };
    float most = -INFINITY, sum = 0;
    for (int64_t i = threadIdx.x; i < ranked; i += kThreads) most = fmaxf(most, rest(i));
    most = reduce(most, [](float x, float y) { return fmaxf(x, y); });
    if (!isinf(most)) {
      for (int64_t i = threadIdx.x; i < ranked; i += kThreads) sum += expf(rest(i) - most);
      sum = reduce(sum, [](float x, float y) { return x + y; });
    }
    if (threadIdx.x == 0) p.unread[slot * group + h] = isinf(most) ? most : most + logf(sum);
  }
}

}  // namespace

void select_pages(const SelectPagesParams& p, Stream& stream) {
  const int64_t slots = p.batch * p.kv_heads;
  if (slots == 0) return;
  const SelectParams params{p, stream.scratch_of<uint32_t>(static_cast<size_t>(slots * p.pages + 1))};
  launch(select_pages_kernel, dim3(static_cast<unsigned>(slots)), dim3(kThreads), 0, stream, params);
}

}  // namespace lcore::cuda::generic
