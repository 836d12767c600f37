// c = a b by one warpgroup, in every way in which wgmma takes its operands, and the mistakes that it allows.
#include <map>
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx/bulk.h"
#include "cuda/ptx/wgmma.h"
#include "entry.h"

using namespace lcore::cuda;

enum WgmmaMistake {
  kNone,
  kNoFence,
  kReadsEarly,
  kWritesEarly,
  kNoProxyFence,
  kOverwrites,
  kLeaves,
  kThreeWarps,
  kOneWarpLess,
  kOddStart
};

struct Operands {
  const void* a;  // (64, k) or, major in m, (k, 64)
  const void* b;  // (n, k) or, major in n, (k, n)
  void* c;        // (64, n), float or int32
  int k;
  WgmmaMistake mistake;
};

// Rows of `row` bytes in global memory, cut into panels of row_bytes(swizzle) in shared memory.
template <Swizzle kSwizzle>
__device__ void fill_panels(unsigned char* to, const void* from, int rows, int row) {
  constexpr int kSpan = row_bytes(kSwizzle);
  const auto* bytes = static_cast<const unsigned char*>(from);
  for (int i = 4 * threadIdx.x; i < rows * row; i += 4 * blockDim.x) {
    const int at = i / row * kSpan + i % row % kSpan, panel = i % row / kSpan;
    *reinterpret_cast<uint32_t*>(to + panel * rows * kSpan + swizzled(kSwizzle, at)) =
        *reinterpret_cast<const uint32_t*>(bytes + i);
  }
}

// The operand's part of step `step`; `extent` is its m or n, `depth` bytes or rows of k.
template <Swizzle kSwizzle, Major kMajor>
__device__ uint64_t step_of(const unsigned char* panels, int extent, int depth, int step) {
  constexpr int kSpan = row_bytes(kSwizzle), kStep = 32;  // bytes of k
  if constexpr (kMajor == Major::kMn) {
    const auto* rows = panels + kStep / 2 * step * kSpan;
    if constexpr (kSwizzle == Swizzle::kNone) return descriptor(rows, kSwizzle, 8 * kSpan, depth * kSpan);
    return mn_major(rows, kSwizzle, depth * kSpan);
  }
  const auto* panel = panels + kStep * step / kSpan * extent * kSpan;
  if constexpr (kSwizzle == Swizzle::kNone) return descriptor(panel, kSwizzle, extent * kSpan, 8 * kSpan);
  return advance(k_major(panel, kSwizzle), kStep * step % kSpan);
}

template <Product kType, int kN, Swizzle kSwizzle, Major kA, Major kB, bool kInRegisters>
__global__ void __launch_bounds__(128, 1) products(Operands p) {
  constexpr int kBytes = kType == Product::kTf32 ? 4 : kType <= Product::kFp16 ? 2 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  auto* a_panels = dynamic_shared<unsigned char>();
  auto* b_panels = a_panels + 64 * p.k * kBytes;
  const auto is = [&](WgmmaMistake mistake) { return p.mistake == mistake; };
  const auto fill = [&]<Major kMajor>(unsigned char* to, const void* from, int extent) {
    const bool by_k = kMajor == Major::kK;
    fill_panels<kSwizzle>(to, from, by_k ? extent : p.k, (by_k ? p.k : extent) * kBytes);
  };
  fill.template operator()<kA>(a_panels, p.a, 64);
  fill.template operator()<kB>(b_panels, p.b, kN);
  if (!is(kNoProxyFence)) fence_proxy_async();
  __syncthreads();
  if (is(kOneWarpLess) && warp == 1) return;
  SumOf<kType> d[kN / 2] = {};
  if (!is(kNoFence)) wgmma_fence();
  const int steps = p.k * kBytes / 32;
  for (int step = 0; step < steps; ++step) {
    if (is(kThreeWarps) && step == 1 && warp == 3) continue;
    uint64_t b = step_of<kSwizzle, kB>(b_panels, kN, p.k, step);
    if (is(kOddStart)) b = advance(b, row_bytes(kSwizzle));
    if constexpr (kInRegisters) {
      const auto* words = static_cast<const uint32_t*>(p.a) + (16 * warp + g) * p.k * kBytes / 4 + 8 * step + t;
      const int eight_rows = 2 * p.k * kBytes;
      const uint32_t a[4] = {words[0], words[eight_rows], words[4], words[eight_rows + 4]};
      wgmma<kType, kB>(d, a, b, step > 0);
    } else {
      wgmma<kType, kA, kB>(d, step_of<kSwizzle, kA>(a_panels, 64, p.k, step), b, step > 0);
    }
    if constexpr (kInRegisters) {  // its registers are filled again
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_fence();
    }
  }
  wgmma_commit();
  if (is(kWritesEarly)) d[0] = 1;
  if (is(kOverwrites)) b_panels[0] = 1;
  if (!is(kReadsEarly) && !is(kLeaves)) wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) {
    const int row = 16 * warp + g + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * t + i % 2;
    static_cast<SumOf<kType>*>(p.c)[row * kN + column] = d[i];
  }
  if (is(kReadsEarly)) wgmma_wait<0>();
}

namespace {

constexpr auto kK = Major::kK, kMn = Major::kMn;
using P = Product;
using S = Swizzle;

struct Way {
  void (*kernel)(Operands);
  int n, element_bytes;
};

const std::map<std::string, Way>& ways() {
  static const std::map<std::string, Way> all{
      {"bf16", {products<P::kBf16, 64, S::k128, kK, kK, false>, 64, 2}},
      {"bf16 n256", {products<P::kBf16, 256, S::k128, kK, kK, false>, 256, 2}},
      {"bf16 rows of 64", {products<P::kBf16, 8, S::k64, kK, kK, false>, 8, 2}},
      {"bf16 rows of 32", {products<P::kBf16, 16, S::k32, kK, kK, false>, 16, 2}},
      {"bf16 no swizzle", {products<P::kBf16, 48, S::kNone, kK, kK, false>, 48, 2}},
      {"bf16 b by n", {products<P::kBf16, 128, S::k128, kK, kMn, false>, 128, 2}},
      {"bf16 both by mn", {products<P::kBf16, 64, S::k64, kMn, kMn, false>, 64, 2}},
      {"fp16 both by mn, rows of 32", {products<P::kFp16, 32, S::k32, kMn, kMn, false>, 32, 2}},
      {"fp16 both by mn, no swizzle", {products<P::kFp16, 32, S::kNone, kMn, kMn, false>, 32, 2}},
      {"bf16 a in registers", {products<P::kBf16, 80, S::k128, kK, kK, true>, 80, 2}},
      {"fp16 a in registers, b by n", {products<P::kFp16, 64, S::k128, kK, kMn, true>, 64, 2}},
      {"tf32", {products<P::kTf32, 64, S::k128, kK, kK, false>, 64, 4}},
      {"tf32 a in registers", {products<P::kTf32, 96, S::k64, kK, kK, true>, 96, 4}},
      {"e4m3", {products<P::kE4m3, 128, S::k128, kK, kK, false>, 128, 1}},
      {"e4m3 a in registers", {products<P::kE4m3, 16, S::k32, kK, kK, true>, 16, 1}},
      {"s8", {products<P::kS8, 192, S::k64, kK, kK, false>, 192, 1}},
      {"s8 a in registers", {products<P::kS8, 64, S::k128, kK, kK, true>, 64, 1}},
  };
  return all;
}

const std::map<std::string, WgmmaMistake>& mistakes() {
  static const std::map<std::string, WgmmaMistake> all{
      {"none", kNone},
      {"no_fence", kNoFence},
      {"reads_early", kReadsEarly},
      {"writes_early", kWritesEarly},
      {"no_proxy_fence", kNoProxyFence},
      {"overwrites", kOverwrites},
      {"leaves", kLeaves},
      {"three_warps", kThreeWarps},
      {"one_warp_less", kOneWarpLess},
      {"odd_start", kOddStart},
  };
  return all;
}

}  // namespace

extern "C" {

int lcore_emulator_wgmma_size(const char* way) { return ways().at(way).n; }

const char* lcore_emulator_wgmma(const char* way, const char* mistake, const void* a, const void* b, void* c, int k,
                                 int threads) {
  return lcore::emulator::guarded([=] {
    const Way& w = ways().at(way);
    const auto bytes = static_cast<size_t>((64 + w.n) * k * w.element_bytes);
    launch(w.kernel, dim3(1), dim3(threads), bytes, lcore::emulator::no_stream(),
           Operands{a, b, c, k, mistakes().at(mistake)});
  });
}

}  // extern "C"
