// Merging two attention states on a GPU: bytes read and written over those of a large copy.
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "core/merge_states.h"
#include "cuda/kernels.h"
#include "cuda_harness.h"

namespace lcore::bench {
namespace {

struct Shape {
  std::string dtype;
  int64_t batch, seq, heads, head_dim;

  std::string name() const {
    return dtype + "/" + std::to_string(batch) + "x" + std::to_string(seq) + "/heads:" + std::to_string(heads) +
           "/dim:" + std::to_string(head_dim);
  }
};

struct Inputs {
  Inputs(const Shape& shape, Executor& executor) {
    const DType type = dtype_named(shape.dtype);
    for (int i = 0; i < 2; ++i) {
      out.push_back(Tensor::normal(type, shape.batch, shape.seq, shape.heads, shape.head_dim, 1 + i, executor));
      lse.push_back(Tensor::normal(DType::kFloat32, shape.batch, shape.heads, shape.seq, 1, 3 + i, executor));
      device_out.push_back(std::make_unique<DeviceMemory>(out[i]));
      device_lse.push_back(std::make_unique<DeviceMemory>(lse[i]));
    }
    merged = Tensor(type, shape.batch, shape.seq, shape.heads, shape.head_dim);
    device_out.push_back(std::make_unique<DeviceMemory>(merged.bytes()));
    device_lse.push_back(std::make_unique<DeviceMemory>(lse[0].bytes()));
    params = {type,
              device_out[0]->data(),
              device_out[1]->data(),
              device_lse[0]->data(),
              device_lse[1]->data(),
              device_out[2]->data(),
              device_lse[2]->data(),
              shape.batch,
              shape.seq,
              shape.heads,
              shape.head_dim};
  }

  std::vector<Tensor> out, lse;
  Tensor merged;
  std::vector<std::unique_ptr<DeviceMemory>> device_out, device_lse;  // of a, of b, merged
  MergeParams params{};
};

void check_rows(const Shape& shape, const Inputs& x) {
  x.device_out[2]->to_host(x.merged);
  for (const int64_t batch : some_of(shape.batch)) {
    for (const int64_t token : some_of(shape.seq)) {
      for (const int64_t head : some_of(shape.heads)) {
        const double a = x.lse[0].row(batch, head, token)[0], b = x.lse[1].row(batch, head, token)[0];
        const double weight = 1 / (1 + std::exp(b - a));
        std::vector<double> want(shape.head_dim);
        add(weight, x.out[0].row(batch, token, head), &want);
        add(1 - weight, x.out[1].row(batch, token, head), &want);
        compare("row " + std::to_string(token), x.merged.row(batch, token, head), want, tolerance(x.params.type));
      }
    }
  }
}

std::function<void()> prepare(const Shape& shape, CudaHarness& harness) {
  const auto x = std::make_shared<Inputs>(shape, harness.pool());
  cuda::merge_states(x->params, harness.stream());
  check_rows(shape, *x);
  return [x, &harness] { cuda::merge_states(x->params, harness.stream()); };
}

Row describe(const Shape& shape, const CudaHarness& harness, double seconds, benchmark::UserCounters* counters) {
  const int64_t rows = shape.batch * shape.seq * shape.heads;
  const int64_t bytes = 3 * rows * (shape.head_dim * static_cast<int64_t>(size_of(dtype_named(shape.dtype))) + 4);
  const double gbytes = static_cast<double>(bytes) / seconds / 1e9;
  (*counters)["GB/s"] = gbytes;
  (*counters)["of_copy"] = gbytes / harness.copy_gbytes();
  Row row;
  row.set("kind", "gpu_merge_states").set("op", "merge_states").set("status", "ok").set("dtype", shape.dtype);
  row.set("batch", shape.batch).set("seq", shape.seq).set("heads", shape.heads).set("head_dim", shape.head_dim);
  row.set("seconds", seconds).set("gbytes_per_s", gbytes).set("of_peak", gbytes / harness.copy_gbytes());
  return row;
}

int run(int argc, char** argv) {
  CudaHarness harness("merge_states_cuda", argc, argv);
  Flags& flags = harness.flags();
  const bool whole = flags.has("full-set");
  Shape shape{};
  shape.batch = flags.number("batch", "4");
  shape.heads = flags.number("heads", "16");
  const auto dtypes = flags.texts("dtype", whole ? "bf16,fp16,fp32" : "bf16");
  const auto dims = flags.numbers("head-dim", whole ? "64,128,256" : "128");
  const auto lengths = flags.numbers("seq", whole ? "1,1024,16384" : "8192");
  std::vector<Case> cases;
  for (const std::string& dtype : dtypes) {
    dtype_named(dtype);  // refuses what it does not know
    for (const int64_t dim : dims) {
      for (const int64_t seq : lengths) {
        Shape one = shape;
        one.dtype = dtype;
        one.head_dim = dim;
        one.seq = seq;
        cases.push_back({one.name(), [one, &harness] { return prepare(one, harness); },
                         [one, &harness](double seconds, benchmark::UserCounters* counters) {
                           return describe(one, harness, seconds, counters);
                         }});
      }
    }
  }
  return harness.run(cases);
}

}  // namespace
}  // namespace lcore::bench

int main(int argc, char** argv) { return lcore::bench::main_of(lcore::bench::run, argc, argv); }
