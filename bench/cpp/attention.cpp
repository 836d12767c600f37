// Attention, forward and backward, without torch: build/bench-cpp/attention --seq 1024,4096 --dtype bf16 --json FILE.
// GFLOP/s count the pairs that the mask allows: forward 4 * pairs * heads * head_dim, backward 2.5 times that.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/attention.h"
#include "harness.h"
#include "tensor.h"

namespace lcore::bench {
namespace {

struct Shape {
  std::string pass;
  std::string dtype;
  int64_t batch;
  int64_t seq;
  bool packed;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  bool causal;
  int64_t window;  // 0: none

  bool backward() const { return pass == "backward"; }

  Problem problem() const {
    const int64_t side = window > 0 ? window : kUnbounded;
    return {dtype_named(dtype), batch, seq, seq, heads, kv_heads, static_cast<int>(head_dim), side, causal ? 0 : side};
  }

  std::string name() const {
    std::string text = pass + "/" + dtype + "/" + std::to_string(batch) + "x" + std::to_string(seq) +
                       "/heads:" + std::to_string(heads) + ":" + std::to_string(kv_heads) +
                       "/dim:" + std::to_string(head_dim);
    if (!causal) text += "/full";
    if (window > 0) text += "/window:" + std::to_string(window);
    return packed ? text + "/packed" : text;
  }
};

// The tensors of one case and the kernel's view of them.
struct Inputs {
  Inputs(const Shape& shape, Executor& executor) {
    const Problem problem = shape.problem();
    const DType type = problem.type;
    const auto normal = [&](int64_t heads, int seed) {
      return Tensor::normal(type, shape.batch, shape.seq, heads, shape.head_dim, seed, executor);
    };
    const auto empty = [&](int64_t heads) { return Tensor(type, shape.batch, shape.seq, heads, shape.head_dim); };
    q = normal(shape.heads, 1);
    k = normal(shape.kv_heads, 2);
    v = normal(shape.kv_heads, 3);
    out = empty(shape.heads);
    lse.resize(shape.batch * shape.heads * shape.seq);
    AttentionParams& p = params.forward;
    p.type = type;
    p.q = q.strided(shape.packed);
    p.k = k.strided(shape.packed);
    p.v = v.strided(shape.packed);
    p.out = out.data();
    p.lse = lse.data();
    p.batch = shape.batch;
    p.seq_q = p.seq_k = shape.packed ? shape.batch * shape.seq : shape.seq;
    p.lse_head = p.seq_q;
    p.lse_batch = shape.packed ? 0 : shape.heads * shape.seq;
    p.heads = shape.heads;
    p.kv_heads = shape.kv_heads;
    p.head_dim = p.head_dim_v = problem.head_dim;
    p.window_left = problem.window_left;
    p.window_right = problem.window_right;
    p.softmax_scale = problem.scale();
    if (shape.packed) {
      for (int64_t i = 0; i <= shape.batch; ++i) offsets.push_back(static_cast<int32_t>(i * shape.seq));
      p.cu_seqlens_q = p.cu_seqlens_k = offsets.data();
    }
    if (!shape.backward()) return;
    dout = normal(shape.heads, 4);
    dq = empty(shape.heads);
    dk = empty(shape.kv_heads);
    dv = empty(shape.kv_heads);
    params.dout = dout.strided(shape.packed);
    params.dq = dq.data();
    params.dk = dk.data();
    params.dv = dv.data();
  }

  Tensor q, k, v, out, dout, dq, dk, dv;
  std::vector<float> lse;
  std::vector<int32_t> offsets;
  AttentionGradParams params{};
};

std::function<void()> prepare(const Shape& shape, Executor& executor) {
  const auto x = std::make_shared<Inputs>(shape, executor);
  const Problem problem = shape.problem();
  const Forward forward{x->q, x->k, x->v, x->out};
  cpu::kernels().attention_forward(x->params.forward, executor);
  check_forward(problem, forward);
  if (!shape.backward()) return [x, &executor] { cpu::kernels().attention_forward(x->params.forward, executor); };
  cpu::kernels().attention_backward(x->params, executor);
  const int64_t lse_batch = shape.packed ? shape.seq : x->params.forward.lse_batch;
  check_backward(problem, forward,
                 {x->lse.data(), lse_batch, x->params.forward.lse_head, x->dout, x->dq, x->dk, x->dv});
  return [x, &executor] { cpu::kernels().attention_backward(x->params, executor); };
}

Row describe(const Shape& shape, const Peaks& peaks, double seconds, benchmark::UserCounters* counters) {
  const double pairs = static_cast<double>(shape.problem().allowed_pairs() * shape.batch * shape.heads);
  const double gflops = (shape.backward() ? 10 : 4) * pairs * shape.head_dim / seconds / 1e9;
  const double of_peak = gflops / peaks.gflops(shape.dtype);
  (*counters)["gflops"] = gflops;
  (*counters)["of_peak"] = of_peak;
  Row row;
  row.set("kind", "attention").set("pass", shape.pass).set("dtype", shape.dtype).set("batch", shape.batch);
  row.set("seq", shape.seq).set("packed", shape.packed).set("heads", shape.heads).set("kv_heads", shape.kv_heads);
  row.set("head_dim", shape.head_dim).set("causal", shape.causal);
  if (shape.window > 0) {
    row.set("window", shape.window);
  } else {
    row.set("window", nullptr);
  }
  row.set("ms", seconds * 1e3).set("gflops", gflops).set("ceiling", peaks.ceiling(shape.dtype));
  row.set("peak_gflops", peaks.gflops(shape.dtype)).set("of_peak", of_peak);
  for (const char* key : {"torch_gflops", "torch_gqa", "speedup", "flex_speedup", "flex_error"}) row.set(key, nullptr);
  return row;
}

int run(int argc, char** argv) {
  Harness harness("attention", argc, argv);
  Flags& flags = harness.flags();
  const bool whole = flags.has("full-set");
  Shape shape{};
  shape.heads = flags.number("heads", "8");
  shape.kv_heads = flags.number("kv-heads", std::to_string(shape.heads));
  shape.batch = flags.number("batch", "1");
  shape.packed = flags.has("packed");
  shape.causal = !flags.has("full");
  shape.window = flags.has("window") ? flags.number("window", "") : 0;
  if (shape.heads % shape.kv_heads != 0) throw std::invalid_argument("--heads must be a multiple of --kv-heads");
  const auto dtypes = flags.texts("dtype", "fp32,bf16");
  const auto dims = flags.numbers("head-dim", whole ? "64,128" : "128");
  const auto lengths = flags.numbers("seq", whole ? "128,1024,4096,16384" : "128,1024");
  std::vector<Case> cases;
  for (const std::string& pass : flags.texts("pass", "forward,backward")) {
    if (pass != "forward" && pass != "backward") throw std::invalid_argument("--pass is forward or backward");
    for (const std::string& dtype : dtypes) {
      dtype_named(dtype);  // refuses what it does not know
      for (const int64_t dim : dims) {
        for (const int64_t seq : lengths) {
          Shape one = shape;
          one.pass = pass;
          one.dtype = dtype;
          one.head_dim = dim;
          one.seq = seq;
          cases.push_back({one.name(), [one, &harness] { return prepare(one, harness.pool()); },
                           [one, &harness](double seconds, benchmark::UserCounters* counters) {
                             return describe(one, harness.peaks(), seconds, counters);
                           }});
        }
      }
    }
  }
  return harness.run(cases);
}

}  // namespace
}  // namespace lcore::bench

int main(int argc, char** argv) { return lcore::bench::main_of(lcore::bench::run, argc, argv); }
