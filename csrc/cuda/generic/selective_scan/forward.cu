// Selective scan, forward: h_t = e^(delta_t A) h_(t-1) + delta_t u_t B_t, y_t = <C_t, h_t> + D u_t, out = y silu(z)
// (Gu & Dao 2023, Mamba, eq. 2). A block takes 32 channels of a sequence through time, chunk by chunk: u, delta, B and
// C come to shared memory coalesced and widened, then every lane walks through the chunk's steps with its four states
// in registers. The scan is sequential in time, not a tree of pairs: half the multiplications, the B and C of a step
// read once for 32 channels, and one order of operations, so neither a cut into calls nor an update changes a bit. What
// bounds it are exponentials, 16 an element of 16 states and 16 a clock and SM. An update is a scan of one step.
#include "cuda/generic/selective_scan/scan.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace lcore::cuda::generic {
namespace {

// Shared memory of a block; with 16 floats 38 KB, so that six blocks, 768 threads, share an SM.
template <class X>
struct ForwardTiles {
  X *b, *c, *delta, *u, *y, *states;

  __host__ __device__ explicit ForwardTiles(X* base) {
    b = base;
    c = b + kSteps * kStateRow<X>;
    states = c + kSteps * kStateRow<X>;  // [pass][thread][kPerLane]: between chunks
    delta = states;
  }
  __device__ void place(int passes) {
    delta = states + passes * kScanThreads * kPerLane;
    u = delta + kTileSize;
    y = u + kTileSize;
  }
  static size_t bytes(int passes) {
    return sizeof(X) * (2 * kSteps * kStateRow<X> + passes * kScanThreads * kPerLane + 3 * kTileSize);
  }
};

// The steps of a chunk for a pass's states; the first pass sets y, the others add to it.
template <class X>
__device__ void advance(const SelectiveScanParams& p, const ScanPlace& place, const ForwardTiles<X>& tiles, int steps,
                        int pass, X* h) {
  X rates[kPerLane];
  load_rates(p, place, pass, kLog2E<X>, rates);
  const int states = place.states(p, pass);
  const X skip = pass == 0 && p.d != nullptr ? static_cast<const X*>(p.d)[place.channel()] : X{0};
  const X *delta = tiles.delta + place.column, *u = tiles.u + place.column;
  const X *b_row = tiles.b + place.lane * kPerLane, *c_row = tiles.c + place.lane * kPerLane;
  X* y = tiles.y + place.column;
#pragma unroll 4
  for (int t = 0; t < steps; ++t) {
    States4<X> b, c;
    b.load(b_row + t * kStateRow<X>);
    c.load(c_row + t * kStateRow<X>);
    const X step = delta[t * kRow], own = u[t * kRow], input = step * own;
    X sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i >= states) continue;  // an infinite input must not meet a state that is none
      h[i] = fma(power_of_two(step * rates[i]), h[i], input * b[i]);
      sum = fma(h[i], c[i], sum);
    }
    sum = reduce_add<kLanes>(sum);
    if (place.lane == 0) y[t * kRow] = pass > 0 ? y[t * kRow] + sum : p.d != nullptr ? fma(skip, own, sum) : sum;
  }
}

template <class X>
__global__ void __launch_bounds__(kScanThreads, sizeof(X) == 8 ? 2 : 6) scan_forward_kernel(SelectiveScanParams p) {
  const int64_t blocks = blocks_a_group(p), group = blockIdx.x / blocks % p.groups;
  const int64_t sequence = blockIdx.x / blocks / p.groups, slot = slot_of(p.initial, sequence);
  if (slot < 0) return;
  const ScanPlace place(p, group, blockIdx.x % blocks);
  const Span span = span_of(p.sequences, sequence);
  const int passes = passes_of(p);
  ForwardTiles<X> tiles(dynamic_shared<X>());
  tiles.place(passes);
  const int64_t chunks = chunks_of(span), kept = first_slot(p.sequences, sequence, span);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = span.begin + chunk * kChunk;
    const int steps = static_cast<int>(min(kChunk, span.end - begin));
    __syncthreads();
    load_channels<X>(p.u, span, begin, steps, place, tiles.u, [](X u, int) { return u; });
    load_channels<X>(p.delta, span, begin, steps, place, tiles.delta,
                     [&](X delta, int c) { return step_size<X>(p, place.first + c, delta, nullptr); });
    for (int pass = 0; pass < passes; ++pass) {
      if (pass > 0) __syncthreads();
      load_projection<X>(p.b, group * p.b_group, span, begin, steps, pass, p.states, tiles.b);
      load_projection<X>(p.c, group * p.c_group, span, begin, steps, pass, p.states, tiles.c);
      __syncthreads();
      const int states = place.here() ? place.states(p, pass) : 0;
      const int64_t index = states_index(p, slot, place, pass);
      X h[kPerLane], *between = tiles.states + (pass * kScanThreads + threadIdx.x) * kPerLane;
      if (chunk == 0) {
        read_states<X>(p.initial, index, states, h);
      } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) h[i] = between[i];
      }
      if (p.checkpoints != nullptr) {
        X* to = static_cast<X*>(p.checkpoints) + (kept + chunk) * p.states * p.dim + place.channel();
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i < states) to[(pass * kStates + place.lane * kPerLane + i) * p.dim] = h[i];
        }
      }
      advance(p, place, tiles, steps, pass, h);
      if (chunk + 1 == chunks && p.final.data != nullptr) write_states<X>(p.final, index, states, h);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) between[i] = h[i];
    }
    __syncthreads();
    const int64_t out = index_of(p.out, span.row, place.first, begin), z = index_of(p.z, span.row, place.first, begin);
    for_each_element(p.out, steps, place.count, [&](int t, int c) {
      X y = tiles.y[t * kRow + c];
      if (p.z.data != nullptr) y *= silu(read<X>(p.z.data, p.z.type, z + t * p.z.step + c * p.z.channel));
      write<X>(p.out, out + t * p.out.step + c * p.out.channel, y);
    });
  }
}

}  // namespace

void selective_scan(const SelectiveScanParams& p, Stream& stream) {
  const int64_t blocks = p.sequences.count * p.groups * blocks_a_group(p);
  if (blocks == 0) return;
  const auto run = [&](auto zero) {
    using X = decltype(zero);
    launch(scan_forward_kernel<X>, dim3(blocks), dim3(kScanThreads), ForwardTiles<X>::bytes(passes_of(p)), stream, p);
  };
  p.is_double ? run(double{}) : run(float{});
}

}  // namespace lcore::cuda::generic
