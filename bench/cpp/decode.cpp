// Attention of the last tokens over a long cache, paged and dense, without torch: build/bench-cpp/decode --tokens 65536
// --kv-format bf16 --json FILE. GB/s count every key and value once; tokens/s are those of one layer.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/cache_append.h"
#include "harness.h"
#include "tensor.h"

namespace lcore::bench {
namespace {

constexpr int64_t kPageSize = 64;  // PagedCache's default

struct Shape {
  std::string format;
  bool paged;
  int64_t batch;
  int64_t tokens;
  int64_t new_tokens;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;

  Problem problem() const {
    return {dtype_named(format),        batch,      new_tokens, tokens, heads, kv_heads,
            static_cast<int>(head_dim), kUnbounded, int64_t{0}};
  }

  std::string name() const {
    return std::string(paged ? "paged/" : "dense/") + format + "/" + std::to_string(batch) + "x" +
           std::to_string(tokens) + "/new:" + std::to_string(new_tokens) + "/heads:" + std::to_string(heads) + ":" +
           std::to_string(kv_heads) + "/dim:" + std::to_string(head_dim);
  }
};

struct Inputs {
  Inputs(const Shape& shape, Executor& executor) {
    const Problem problem = shape.problem();
    const auto normal = [&](int64_t seq, int64_t heads, int seed) {
      return Tensor::normal(problem.type, shape.batch, seq, heads, shape.head_dim, seed, executor);
    };
    q = normal(shape.new_tokens, shape.heads, 1);
    k = normal(shape.tokens, shape.kv_heads, 2);
    v = normal(shape.tokens, shape.kv_heads, 3);
    out = Tensor(problem.type, shape.batch, shape.new_tokens, shape.heads, shape.head_dim);
    lse.resize(shape.batch * shape.heads * shape.new_tokens);
    params.type = problem.type;
    params.q = q.strided();
    params.k = k.strided();
    params.v = v.strided();
    params.out = out.data();
    params.lse = lse.data();
    params.lse_head = shape.new_tokens;
    params.lse_batch = shape.heads * shape.new_tokens;
    params.batch = shape.batch;
    params.seq_q = shape.new_tokens;
    params.seq_k = shape.tokens;
    params.heads = shape.heads;
    params.kv_heads = shape.kv_heads;
    params.head_dim = params.head_dim_v = problem.head_dim;
    params.window_left = problem.window_left;
    params.window_right = problem.window_right;
    params.softmax_scale = problem.scale();
    if (shape.paged) fill_pages(shape, problem, executor);
  }

  // Page n of every row and head before page n + 1 of any: as they come when a text is appended bit by bit.
  void fill_pages(const Shape& shape, const Problem& problem, Executor& executor) {
    const int64_t width = (shape.tokens + kPageSize - 1) / kPageSize;
    const int64_t slots = shape.batch * shape.kv_heads;
    pages.k_format = pages.v_format = plain_format(problem.type);
    pages.v_offset = page_side(pages.k_format, false, kPageSize, shape.head_dim).bytes;
    pages.page_bytes = 2 * pages.v_offset;
    pages.page_size = kPageSize;
    pages.table_width = width;
    pool = Tensor(DType::kFloat32, 1, slots * width, 1, pages.page_bytes / 4);
    tail_k = Tensor(problem.type, shape.batch, shape.kv_heads, kPageSize, shape.head_dim);
    tail_v = Tensor(problem.type, shape.batch, shape.kv_heads, kPageSize, shape.head_dim);
    table.resize(slots * width);
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t page = 0; page < width; ++page) {
        table[slot * width + page] = static_cast<int32_t>(page * slots + slot);
      }
    }
    lengths.assign(slots, 0);
    pages.pool = static_cast<const uint8_t*>(pool.data());
    pages.page_table = table.data();
    pages.lengths = lengths.data();
    pages.tail_k = tail_k.data();
    pages.tail_v = tail_v.data();
    CacheAppendParams append{};
    append.type = problem.type;
    append.pages = pages;
    append.pool = static_cast<uint8_t*>(pool.data());
    append.lengths = lengths.data();
    append.tail_k = tail_k.data();
    append.tail_v = tail_v.data();
    append.k = k.strided();
    append.v = v.strided();
    append.batch = shape.batch;
    append.new_tokens = shape.tokens;
    append.kv_heads = shape.kv_heads;
    append.head_dim = append.head_dim_v = problem.head_dim;
    cpu::kernels().cache_append(append, executor);
    params.pages = &pages;
  }

  Tensor q, k, v, out, pool, tail_k, tail_v;
  std::vector<float> lse;
  std::vector<int32_t> table, lengths;
  KvPages pages{};
  AttentionParams params{};
};

std::function<void()> prepare(const Shape& shape, Executor& executor) {
  const auto x = std::make_shared<Inputs>(shape, executor);
  cpu::kernels().attention_forward(x->params, executor);
  check_forward(shape.problem(), {x->q, x->k, x->v, x->out});
  if (shape.paged) {  // the pages hold them
    x->k = Tensor();
    x->v = Tensor();
  }
  return [x, &executor] { cpu::kernels().attention_forward(x->params, executor); };
}

Row describe(const Shape& shape, const Peaks& peaks, double seconds, benchmark::UserCounters* counters) {
  const int64_t width = static_cast<int64_t>(size_of(dtype_named(shape.format)));
  const int64_t bytes = 2 * shape.batch * shape.tokens * shape.kv_heads * shape.head_dim * width;
  const double gbytes = static_cast<double>(bytes) / seconds / 1e9;
  const double tokens = static_cast<double>(shape.batch * shape.new_tokens) / seconds;
  (*counters)["GB/s"] = gbytes;
  (*counters)["of_read_peak"] = gbytes / peaks.read_gbytes;
  (*counters)["tokens/s"] = tokens;
  Row row;
  row.set("kind", "decode").set("kv_format", shape.format).set("paged", shape.paged).set("batch", shape.batch);
  row.set("tokens", shape.tokens).set("new_tokens", shape.new_tokens).set("heads", shape.heads);
  row.set("kv_heads", shape.kv_heads).set("head_dim", shape.head_dim).set("ms", seconds * 1e3);
  row.set("tokens_per_s", tokens).set("gbytes_per_s", gbytes);
  row.set("read_gbytes_per_s", peaks.read_gbytes).set("of_read_peak", gbytes / peaks.read_gbytes);
  for (const char* key : {"torch_gqa_ms", "torch_packed_ms", "speedup_gqa", "speedup_packed"}) row.set(key, nullptr);
  return row;
}

int run(int argc, char** argv) {
  Harness harness("decode", argc, argv);
  Flags& flags = harness.flags();
  const bool whole = flags.has("full-set");
  Shape shape{};
  shape.batch = flags.number("batch", "1");
  shape.heads = flags.number("heads", "32");
  shape.kv_heads = flags.number("kv-heads", "8");
  shape.head_dim = flags.number("head-dim", "128");
  if (shape.heads % shape.kv_heads != 0) throw std::invalid_argument("--heads must be a multiple of --kv-heads");
  const auto formats = flags.texts("kv-format", whole ? "bf16,fp32,fp16" : "bf16");
  const auto lengths = flags.numbers("tokens", whole ? "4096,16384,65536" : "4096,16384");
  const auto counts = flags.numbers("new-tokens", whole ? "1,4,16,64" : "1");
  std::vector<Case> cases;
  for (const bool paged : {true, false}) {
    for (const std::string& format : formats) {
      dtype_named(format);  // refuses what it does not know
      for (const int64_t tokens : lengths) {
        for (const int64_t count : counts) {
          if (count > tokens) throw std::invalid_argument("--new-tokens must be at most --tokens");
          if (!paged && count != counts.front()) continue;
          Shape one = shape;
          one.paged = paged;
          one.format = format;
          one.tokens = tokens;
          one.new_tokens = count;
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
