// Rotary position embedding (Su et al. 2021, RoFormer): each pair (x, y) of a head at position p turns by the angle
// p inv_freq[m]:  x' = x cos - y sin,  y' = y cos + x sin, both times attention_scaling.
// A block takes a few tokens: their cosines and sines (cuda/turns.cuh) are made once, in shared memory, and used by all
// heads; then its threads walk over the heads' pairs of packs, 16 bytes of x and 16 of y, so that every byte is read
// and written once. Bound by memory; sines in double would bound it if every head made its own.
#include "core/rope.h"

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/packs.cuh"
#include "cuda/ptx/shared.h"
#include "cuda/turns.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kThreads = 256;            // eight blocks fill an SM's 2048 threads
constexpr int kTokens = 4;               // 8 KV heads of 128 in bf16: two packs a thread
constexpr size_t kTurnBytes = 24 << 10;  // of a block: eight blocks fit into an SM's 227 KB

struct RopeTiles {
  RopeParams p;
  int tokens;  // a block
  bool packed;
};

// kCount pairs a step: a pack, or 1 where packs do not fit.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeTiles tiles) {
  using X = Wide<T>;
  const RopeParams& p = tiles.p;
  X* turns = dynamic_shared<X>();  // [tokens][half]: cosine, sine
  const int half = p.rotation.half;
  const int64_t first = int64_t{blockIdx.x} * tiles.tokens, left = p.batch * p.seq - first;
  const int count = left < tiles.tokens ? static_cast<int>(left) : tiles.tokens;
  for (int i = threadIdx.x; i < count * half; i += kThreads) {
    const int64_t batch = (first + i / half) / p.seq, row = (first + i / half) % p.seq;
    const int64_t at = batch * p.positions_batch + row * p.positions_seq;
    X cosine, sine;
    turn(p.rotation, i % half, read_number(p.positions, p.positions_type, at), cosine, sine);
    const X scale = static_cast<X>(p.rotation.attention_scaling);
    turns[2 * i] = cosine * scale;
    turns[2 * i + 1] = sine * (p.inverse ? -scale : scale);
  }
  __syncthreads();

  const int pairs = half / kCount, passing = (p.head_dim - 2 * half) / kCount, pieces = pairs + passing;
  const int heads = static_cast<int>(p.heads);
  for (int i = threadIdx.x; i < count * heads * pieces; i += kThreads) {
    const int piece = i % pieces, head = i / pieces % heads, token = i / pieces / heads;
    const int64_t batch = (first + token) / p.seq, row = (first + token) % p.seq;
    const T* x = static_cast<const T*>(p.x.data) + batch * p.x.batch + row * p.x.seq + head * p.x.head;
    T* out = static_cast<T*>(p.out) + ((first + token) * p.heads + head) * p.head_dim;
    X a[kCount], b[kCount];
    if (piece >= pairs) {
      const int c = 2 * half + (piece - pairs) * kCount;
      load_row(x + c * p.x.dim, p.x.dim, tiles.packed, a);
      store_row(out + c, tiles.packed, a);
      continue;
    }
    const int m = piece * kCount;
    const int c = p.rotation.interleaved ? 2 * m : m, d = p.rotation.interleaved ? c + kCount : c + half;
    load_row(x + c * p.x.dim, p.x.dim, tiles.packed, a);
    load_row(x + d * p.x.dim, p.x.dim, tiles.packed, b);
    const X* turn = turns + 2 * (token * half + m);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (!p.rotation.interleaved) {
        rotate(turn[2 * j], turn[2 * j + 1], a[j], b[j]);
      } else if (kCount == 1) {
        rotate(turn[0], turn[1], a[0], b[0]);
      } else if (j % 2 == 0) {  // neighbours in the two packs: pair j / 2 of each
        rotate(turn[j], turn[j + 1], a[j], a[j + 1]);
        rotate(turn[kCount + j], turn[kCount + j + 1], b[j], b[j + 1]);
      }
    }
    store_row(out + c, tiles.packed, a);
    store_row(out + d, tiles.packed, b);
  }
}

}  // namespace

void rope(const RopeParams& p, Stream& stream) {
  if (p.batch * p.seq * p.heads == 0 || p.head_dim == 0) return;
  for_float_type(p.type, "rope", [&](auto zero) {
    using T = decltype(zero);
    const size_t turn_bytes = 2 * p.rotation.half * sizeof(Wide<T>);
    const int tokens = static_cast<int>(std::clamp<size_t>(kTurnBytes / std::max<size_t>(turn_bytes, 1), 1, kTokens));
    const int rest = p.head_dim - 2 * p.rotation.half;
    const bool packed = is_aligned(p.x, p.type) && is_aligned(p.out) && p.head_dim % kPack<T> == 0 &&
                        p.rotation.half % kPack<T> == 0 && rest % kPack<T> == 0;
    const dim3 grid(static_cast<unsigned>((p.batch * p.seq + tokens - 1) / tokens));
    launch(packed ? rope_kernel<T, kPack<T>> : rope_kernel<T, 1>, grid, dim3(kThreads), tokens * turn_bytes, stream,
           RopeTiles{p, tokens, packed});
  });
}

}  // namespace lcore::cuda::generic
