// What every op family in csrc/torch/ shares: registration, tensors as kernel arguments, torch's threads.
// Python checks arguments first and raises TypeError or ValueError; the checks here keep a direct torch.ops call from
// reading outside a tensor, and can only raise RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "core/attention.h"
#include "core/dtype.h"
#include "core/executor.h"

namespace lcore {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The boxed ABI reads a float or int parameter as garbage without a word; refuse them at compile time.
template <class T>
inline constexpr bool is_schema_type =
    !std::is_arithmetic_v<T> || std::is_same_v<T, bool> || std::is_same_v<T, int64_t> || std::is_same_v<T, double>;
template <class R, class... A>
consteval bool check_kernel(R (*)(A...)) {
  static_assert((is_schema_type<std::remove_cvref_t<A>> && ...),
                "an op's parameters must be bool, int64_t, double, Tensor, string, optional or vector");
  return true;
}
#define LCORE_BOX(fn) (static_cast<void>(::lcore::check_kernel(&fn)), TORCH_BOX(&fn))

DType dtype_of(const Tensor& tensor);           // throws for an element type that no kernel knows
PageFormat format_of(const std::string& name);  // "fp32" to "int2"
Strided strided(const Tensor& tensor);          // (batch, seq, heads, dim) or (tokens, heads, dim)
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape,
                  std::optional<torch::headeronly::ScalarType> type = std::nullopt);
std::string shape_text(const Tensor& tensor);  // "(2, 3)"

// condition or RuntimeError("lcore.<op>: <text>")
inline void require(bool condition, const char* op, const std::string& text) {
  STD_TORCH_CHECK(condition, "lcore.", op, ": ", text);
}

// Items run on torch's intra-op threads, as many as torch.get_num_threads() says.
class TorchExecutor final : public Executor {
 public:
  TorchExecutor() : workers_(static_cast<int>(torch::stable::get_num_threads())) {}
  int workers() const override { return workers_; }

 protected:
  void run_items(int64_t items, Item item, const void* context) override {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers_, 1, [&](int64_t begin, int64_t end) {
      // Inside another parallel region torch gives all workers' ranges to one call, which then takes every item.
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t i = next.fetch_add(1); i < items; i = next.fetch_add(1))
          item(context, i, static_cast<int>(worker));
      }
    });
  }

 private:
  int workers_;
};

}  // namespace lcore
