// Gradients of the selective scan, by a recurrence that runs back from the last step (dy = dout silu(z)):
//   dh_t = C_t dy_t + a_(t+1) dh_(t+1),  a_t = e^(delta_t A),  s_t = <dh_t, B_t>,  q_t = dh_t a_t h_(t-1):
//   du = D dy + delta s,  ddelta = u s + <q, A>,  dA = sum_t delta q,  dB = sum_d delta u dh,  dC = sum_d dy h,
//   dD = sum dy u,  d initial = a_1 dh_1.  a h_(t-1) is a product, not h_t - delta u B: no cancellation.
// A chunk's states come again from the one kept at its start: first one in 8 steps, then those 8 in registers with
// their decays. Sums of dB and dC over the channels of a block are made by shuffles in a tree and lie in scratch beside
// those of other blocks, which another kernel adds in order; sums over time are double. No atomics. Chunks are taken in
// windows, the last first, so that scratch has a fixed size whatever the length.
#include <algorithm>

#include "cuda/generic/selective_scan/scan.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/zero.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kSub = 8;  // steps whose states and decays fit the registers
constexpr int kSubs = kSteps / kSub;
constexpr int kWarps = kScanThreads / kWarpLanes;
constexpr int64_t kMostParts = 64;  // parts of the sequences whose sums over time are kept apart

template <class X>
struct ScanGradArguments {
  SelectiveScanGradParams g;
  X* partial;  // [window][groups][blocks][kSteps][dB, dC][padded states]
  X* dh;       // [sequences][dim][states]: between chunks
  double* da;  // [parts][dim][states]
  double* dd;  // [parts][dim][dD, ddelta_bias]
  int64_t parts;
  int64_t window;  // chunk slots of a row
  int64_t first;   // chunk, or with packed sequences slot, at which the window begins

  __host__ __device__ int padded() const { return passes_of(g.forward) * kStates; }
};

// The chunks of a sequence that lie in the window, and the place of the first in `partial`.
struct Window {
  int64_t from, to, slot;

  template <class X>
  __device__ Window(const ScanGradArguments<X>& a, int64_t sequence, const Span& span) {
    const Sequences& s = a.g.forward.sequences;
    const int64_t offset = s.offsets == nullptr ? 0 : first_slot(s, sequence, span);
    from = max(a.first - offset, int64_t{0});
    to = min(a.first + a.window - offset, chunks_of(span));
    slot = (s.offsets == nullptr ? sequence * a.window : 0) + offset + from - a.first;
  }
};

// Shared memory: of floats 97 KB, two blocks an SM.
template <class X>
struct GradTiles {
  X *b, *c;
  X *delta, *slope, *u, *dy, *gate;  // gate: dout silu'(z), the factor of y in dz
  X *sum_b, *sum_a, *y;
  X* bounds;   // [kSubs][kPerLane][threads]: states before each run of kSub steps
  X* partial;  // [kWarps][kSub][dB, dC][kStates]
  X* dh;       // [pass][kPerLane][threads]: between chunks

  __device__ explicit GradTiles(X* base) {
    b = base;
    c = b + kSteps * kStateRow<X>;
    partial = c + kSteps * kStateRow<X>;
    bounds = partial + kWarps * kSub * 2 * kStates;
    X* next = bounds + kSubs * kPerLane * kScanThreads;
    delta = next;
    slope = delta + kTileSize;
    u = slope + kTileSize;
    dy = u + kTileSize;
    gate = dy + kTileSize;
    sum_b = gate + kTileSize;
    sum_a = sum_b + kTileSize;
    y = sum_a + kTileSize;
  }
  static constexpr size_t kBytes = sizeof(X) * (2 * kSteps * kStateRow<X> + kWarps * kSub * 2 * kStates +
                                                kSubs * kPerLane * kScanThreads + 8 * kTileSize);
};

// Adds up over the channels of a warp eight numbers of each lane; lane l keeps the one of index l / 4.
template <class X>
__device__ X add_channels(X (&v)[2 * kPerLane]) {
  const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
  for (int half = kPerLane; half > 0; half /= 2) {
    const int bit = half * kLanes;
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const X sent = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
      v[i] = kept + __shfl_xor_sync(kAllLanes, sent, bit);
    }
  }
  return v[0];
}

// One chunk's tiles of channels.
template <class X>
__device__ void load_chunk(const SelectiveScanGradParams& g, const ScanPlace& place, const Span& span, int64_t begin,
                           int steps, const GradTiles<X>& tiles) {
  const SelectiveScanParams& p = g.forward;
  load_channels<X>(p.u, span, begin, steps, place, tiles.u, [](X u, int) { return u; });
  const int64_t delta = index_of(p.delta, span.row, place.first, begin);
  for_each_element(p.delta, steps, kChannels, [&](int t, int c) {
    X slope = 0, step = 0;
    if (c < place.count) {
      const X given = read<X>(p.delta.data, p.delta.type, delta + t * p.delta.step + c * p.delta.channel);
      step = step_size<X>(p, place.first + c, given, &slope);
    }
    tiles.delta[t * kRow + c] = step;
    tiles.slope[t * kRow + c] = slope;
  });
  const int64_t dout = index_of(g.dout, span.row, place.first, begin), z = index_of(p.z, span.row, place.first, begin);
  for_each_element(g.dout, steps, kChannels, [&](int t, int c) {
    X dy = 0, gate = 0;
    if (c < place.count) {
      dy = read<X>(g.dout.data, g.dout.type, dout + t * g.dout.step + c * g.dout.channel);
      if (p.z.data != nullptr) {
        const X given = read<X>(p.z.data, p.z.type, z + t * p.z.step + c * p.z.channel), sigmoid_z = sigmoid(given);
        gate = dy * silu_slope(given, sigmoid_z);
        dy *= given * sigmoid_z;
      }
    }
    tiles.dy[t * kRow + c] = dy;
    tiles.gate[t * kRow + c] = gate;
  });
}

// A chunk back from its last step, for a pass's states.
template <class X>
__device__ void retreat(const ScanGradArguments<X>& a, const ScanPlace& place, const GradTiles<X>& tiles, int steps,
                        int pass, const X* kept, X* to_partial, X (&dh)[kPerLane], X (&da)[kPerLane]) {
  const SelectiveScanParams& p = a.g.forward;
  const int states = place.here() ? place.states(p, pass) : 0, padded = a.padded();
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  X rates[kPerLane], h[kPerLane];
  load_rates(p, place, pass, kLog2E<X>, rates);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t n = pass * kStates + place.lane * kPerLane + i;
    h[i] = i < states ? kept[n * p.dim + place.channel()] : X{0};
  }
  const X *b_row = tiles.b + place.lane * kPerLane, *c_row = tiles.c + place.lane * kPerLane;
  const int subs = (steps + kSub - 1) / kSub;
  for (int sub = 0; sub < subs; ++sub) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) tiles.bounds[(sub * kPerLane + i) * kScanThreads + threadIdx.x] = h[i];
    if (sub + 1 == subs) break;
#pragma unroll 4
    for (int t = sub * kSub; t < (sub + 1) * kSub; ++t) {
      States4<X> b;
      b.load(b_row + t * kStateRow<X>);
      const X step = tiles.delta[t * kRow + place.column], input = step * tiles.u[t * kRow + place.column];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i < states) h[i] = fma(power_of_two(step * rates[i]), h[i], input * b[i]);
      }
    }
  }
  X factors[kPerLane];  // A itself
  load_rates(p, place, pass, X{1}, factors);
  for (int sub = subs - 1; sub >= 0; --sub) {
    X decays[kSub][kPerLane], values[kSub + 1][kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[0][i] = tiles.bounds[(sub * kPerLane + i) * kScanThreads + threadIdx.x];
#pragma unroll
    for (int s = 0; s < kSub; ++s) {
      const int t = sub * kSub + s;
      if (t >= steps) continue;
      States4<X> b;
      b.load(b_row + t * kStateRow<X>);
      const X step = tiles.delta[t * kRow + place.column], input = step * tiles.u[t * kRow + place.column];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        decays[s][i] = power_of_two(step * rates[i]);
        values[s + 1][i] = i < states ? fma(decays[s][i], values[s][i], input * b[i]) : X{0};
      }
    }
#pragma unroll
    for (int s = kSub - 1; s >= 0; --s) {
      const int t = sub * kSub + s, at = t * kRow + place.column;
      if (t >= steps) continue;
      States4<X> b, c;
      b.load(b_row + t * kStateRow<X>);
      c.load(c_row + t * kStateRow<X>);
      const X step = tiles.delta[at], input = step * tiles.u[at], dy = tiles.dy[at];
      X y = 0, sum_b = 0, sum_a = 0, products[2 * kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        products[i] = products[kPerLane + i] = X{0};
        if (i >= states) continue;
        y = fma(values[s + 1][i], c[i], y);
        dh[i] = fma(dy, c[i], dh[i]);
        sum_b = fma(dh[i], b[i], sum_b);
        const X slope = dh[i] * (decays[s][i] * values[s][i]);
        sum_a = fma(slope, factors[i], sum_a);
        da[i] = fma(step, slope, da[i]);
        products[i] = input * dh[i];
        products[kPerLane + i] = dy * values[s + 1][i];
        dh[i] *= decays[s][i];
      }
      y = reduce_add<kLanes>(y);
      sum_b = reduce_add<kLanes>(sum_b);
      sum_a = reduce_add<kLanes>(sum_a);
      if (place.lane < 3) {
        X* tile = place.lane == 0 ? tiles.y : place.lane == 1 ? tiles.sum_b : tiles.sum_a;
        const X sum = place.lane == 0 ? y : place.lane == 1 ? sum_b : sum_a;
        tile[at] = pass == 0 ? sum : tile[at] + sum;
      }
      const X total = add_channels(products);
      const int index = lane / kLanes;
      tiles.partial[((warp * kSub + s) * 2 + index / kPerLane) * kStates + place.lane * kPerLane + index % kPerLane] =
          total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < min(kSub, steps - sub * kSub) * 2 * kStates; i += kScanThreads) {
      X sum = tiles.partial[i];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += tiles.partial[w * kSub * 2 * kStates + i];
      const int64_t row = (sub * kSub + i / (2 * kStates)) * 2 + i / kStates % 2;
      to_partial[row * padded + pass * kStates + i % kStates] = sum;
    }
    __syncthreads();
  }
}

// Gradients of the channels' own inputs in place of their sums, and what they add to dD and ddelta_bias.
template <class X>
__device__ void resolve(const SelectiveScanGradParams& g, const ScanPlace& place, const GradTiles<X>& tiles, int steps,
                        X& dd, X& dbias) {
  const SelectiveScanParams& p = g.forward;
  const X skip = p.d == nullptr ? X{0} : static_cast<const X*>(p.d)[place.channel()];
  for (int t = place.lane; t < steps; t += kLanes) {
    const int at = t * kRow + place.column;
    const X u = tiles.u[at], dy = tiles.dy[at], sum_b = tiles.sum_b[at];
    const X ddelta = fma(u, sum_b, tiles.sum_a[at]) * tiles.slope[at], du = tiles.delta[at] * sum_b;
    const X y = p.d == nullptr ? tiles.y[at] : fma(skip, u, tiles.y[at]);
    tiles.y[at] = y * tiles.gate[at];
    tiles.sum_b[at] = p.d == nullptr ? du : fma(skip, dy, du);
    tiles.sum_a[at] = ddelta;
    dd = fma(dy, u, dd);
    dbias += ddelta;
  }
}

template <class X>
__device__ void store_chunk(const Series& to, const ScanPlace& place, const Span& span, int64_t begin, int steps,
                            const X* tile) {
  if (to.data == nullptr) return;
  const int64_t base = index_of(to, span.row, place.first, begin);
  for_each_element(to, steps, place.count,
                   [&](int t, int c) { write<X>(to, base + t * to.step + c * to.channel, tile[t * kRow + c]); });
}

template <class X>
__global__ void __launch_bounds__(kScanThreads, sizeof(X) == 8 ? 1 : 2) scan_backward_kernel(ScanGradArguments<X> a) {
  const SelectiveScanGradParams& g = a.g;
  const SelectiveScanParams& p = g.forward;
  const int64_t blocks = blocks_a_group(p), block = blockIdx.x % blocks, group = blockIdx.x / blocks % p.groups;
  const int64_t part = blockIdx.x / blocks / p.groups;
  const ScanPlace place(p, group, block);
  const GradTiles<X> tiles(dynamic_shared<X>());
  const int passes = passes_of(p);
  double dd = 0, dbias = 0;
  for (int64_t sequence = part * p.sequences.count / a.parts; sequence < (part + 1) * p.sequences.count / a.parts;
       ++sequence) {
    const Span span = span_of(p.sequences, sequence);
    const Window window(a, sequence, span);
    const int64_t chunks = chunks_of(span), kept = first_slot(p.sequences, sequence, span);
    for (int64_t chunk = window.to - 1; chunk >= window.from; --chunk) {
      const int64_t begin = span.begin + chunk * kChunk;
      const int steps = static_cast<int>(min(kChunk, span.end - begin));
      __syncthreads();
      load_chunk(g, place, span, begin, steps, tiles);
      for (int pass = 0; pass < passes; ++pass) {
        load_projection<X>(p.b, group * p.b_group, span, begin, steps, pass, p.states, tiles.b);
        load_projection<X>(p.c, group * p.c_group, span, begin, steps, pass, p.states, tiles.c);
        __syncthreads();
        const int states = place.here() ? place.states(p, pass) : 0;
        const int64_t index = states_index(p, sequence, place, pass);
        X dh[kPerLane], da[kPerLane] = {};
        read_states<X>({chunk + 1 == chunks ? g.dfinal : a.dh, kTypeOf<X>, nullptr}, index, states, dh);
        const int64_t at = (window.slot + chunk - window.from) * p.groups * blocks + group * blocks + block;
        retreat(a, place, tiles, steps, pass, static_cast<const X*>(p.checkpoints) + (kept + chunk) * p.states * p.dim,
                a.partial + at * kSteps * 2 * a.padded(), dh, da);
        void* to = chunk > 0 ? a.dh : g.dinitial;
        if (to != nullptr) write_states<X>({to, kTypeOf<X>, nullptr}, index, states, dh);
        double* sums = a.da + states_index(p, part, place, pass);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i < states) sums[i] += da[i];
        }
      }
      __syncthreads();
      X dd_of_chunk = 0, dbias_of_chunk = 0;
      resolve(g, place, tiles, steps, dd_of_chunk, dbias_of_chunk);
      dd += reduce_add<kLanes>(dd_of_chunk);
      dbias += reduce_add<kLanes>(dbias_of_chunk);
      __syncthreads();
      store_chunk(g.du, place, span, begin, steps, tiles.sum_b);
      store_chunk(g.ddelta, place, span, begin, steps, tiles.sum_a);
      store_chunk(g.dz, place, span, begin, steps, tiles.y);
    }
  }
  if (!place.here() || place.lane != 0) return;
  double* sums = a.dd + (part * p.dim + place.channel()) * 2;
  sums[0] += dd;
  sums[1] += dbias;
}

// dB and dC of a window's chunks: one thread a number, over the blocks of its group in order.
template <class X>
__global__ void __launch_bounds__(kScanThreads) scan_projections_kernel(ScanGradArguments<X> a) {
  const SelectiveScanParams& p = a.g.forward;
  const Sequences& s = p.sequences;
  const int64_t item = int64_t{blockIdx.x} * kScanThreads + threadIdx.x, blocks = blocks_a_group(p);
  const int padded = a.padded(), n = static_cast<int>(item % padded);
  const int which = static_cast<int>(item / padded % 2), t = static_cast<int>(item / padded / 2 % kSteps);
  const int64_t group = item / padded / 2 / kSteps % p.groups, slot = item / padded / 2 / kSteps / p.groups;
  if (n >= p.states || slot >= a.window * s.batch) return;
  int64_t sequence = slot / a.window, chunk = a.first + slot % a.window;
  if (s.offsets != nullptr) {  // the last whose first slot is at or before this one
    int64_t first = 0, last = s.count;
    while (last - first > 1) {
      const int64_t middle = (first + last) / 2;
      (first_slot(s, middle, span_of(s, middle)) <= a.first + slot ? first : last) = middle;
    }
    sequence = first;
    chunk = a.first + slot - first_slot(s, sequence, span_of(s, sequence));
  }
  const Span span = span_of(s, sequence);
  const int64_t step = span.begin + chunk * kChunk + t;
  if (step >= span.end) return;
  const X* from = a.partial + (((slot * p.groups + group) * blocks * kSteps + t) * 2 + which) * padded + n;
  double sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += from[block * kSteps * 2 * padded];
  const Series& to = which == 0 ? a.g.db : a.g.dc;
  write<X>(to, index_of(to, span.row, group * p.states + n, step), static_cast<X>(sum));
}

// dA, dD and ddelta_bias: over the parts in order.
template <class X>
__global__ void __launch_bounds__(kScanThreads) scan_parameters_kernel(ScanGradArguments<X> a) {
  const SelectiveScanParams& p = a.g.forward;
  const int64_t item = int64_t{blockIdx.x} * kScanThreads + threadIdx.x, channel = item / (p.states + 2);
  const int n = static_cast<int>(item % (p.states + 2)) - 2;
  if (channel >= p.dim) return;
  double sum = 0;
  for (int64_t part = 0; part < a.parts; ++part) {
    const int64_t row = part * p.dim + channel;
    sum += n < 0 ? a.dd[row * 2 + n + 2] : a.da[row * p.states + n];
  }
  void* to = n == -2 ? a.g.dd : n == -1 ? a.g.ddelta_bias : a.g.da;
  if (to != nullptr) static_cast<X*>(to)[n < 0 ? channel : channel * p.states + n] = static_cast<X>(sum);
}

template <class X>
void run(const SelectiveScanGradParams& g, Stream& stream) {
  const SelectiveScanParams& p = g.forward;
  const Sequences& s = p.sequences;
  const int64_t blocks = blocks_a_group(p), rows = s.batch;
  ScanGradArguments<X> a{};
  a.g = g;
  a.parts = std::min(s.count, kMostParts);
  const int64_t slot_bytes = p.groups * blocks * kSteps * 2 * a.padded() * static_cast<int64_t>(sizeof(X));
  const int64_t slots = s.offsets == nullptr ? std::max<int64_t>(1, blocks_for(s.steps, kChunk)) : chunk_slots(s);
  a.window =
      std::clamp<int64_t>(kPartialBytes / (slot_bytes * std::max<int64_t>(rows, 1)), 1, std::max<int64_t>(slots, 1));
  a.partial = static_cast<X*>(stream.scratch(a.window * rows * slot_bytes));
  a.dh = stream.scratch_of<X>(s.count * p.dim * p.states);
  const int64_t sums = a.parts * p.dim * (p.states + 2);
  a.da = stream.scratch_of<double>(sums);
  a.dd = a.da + a.parts * p.dim * p.states;
  const dim3 block(kScanThreads);
  if (sums > 0) launch(zero_kernel, dim3(blocks_for(sums, kScanThreads)), block, 0, stream, {a.da, sums});
  const int64_t grid = a.parts * p.groups * blocks;
  for (int64_t i = grid == 0 ? 0 : blocks_for(slots, a.window); i > 0; --i) {
    a.first = (i - 1) * a.window;
    launch(scan_backward_kernel<X>, dim3(grid), block, GradTiles<X>::kBytes, stream, a);
    const int64_t numbers = a.window * rows * p.groups * kSteps * 2 * a.padded();
    launch(scan_projections_kernel<X>, dim3(blocks_for(numbers, kScanThreads)), block, 0, stream, a);
  }
  launch(scan_parameters_kernel<X>, dim3(blocks_for(p.dim * (p.states + 2), kScanThreads)), block, 0, stream, a);
}

}  // namespace

void selective_scan_backward(const SelectiveScanGradParams& g, Stream& stream) {
  if (g.forward.dim == 0) return;
  g.forward.is_double ? run<double>(g, stream) : run<float>(g, stream);
}

}  // namespace lcore::cuda::generic
