// lcore::select_pages.
#include "core/select_pages.h"

#include <algorithm>
#include <limits>

#include "torch/device.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;

const int32_t* page_numbers(const char* name, const Tensor& t, const SelectPagesParams& p) {
  require(t.is_contiguous() && t.scalar_type() == ScalarType::Int && t.dim() == 2 && t.size(0) == p.batch &&
              t.size(1) == p.kv_heads,
          "select_pages", std::string(name) + " must be contiguous int32 of shape (batch, kv_heads)");
  return static_cast<const int32_t*>(t.data_ptr());
}

std::tuple<Tensor, Tensor> select_pages(Tensor scores, Tensor ranked, Tensor read, int64_t sinks, int64_t width) {
  const char* op = "select_pages";
  require(scores.is_contiguous() && scores.scalar_type() == ScalarType::Float && scores.dim() == 3 && ranked.dim() == 2,
          op, "scores must be contiguous float32 of shape (batch, heads, pages), got " + shape_text(scores));
  SelectPagesParams p{};
  p.batch = scores.size(0);
  p.heads = scores.size(1);
  p.pages = scores.size(2);
  p.kv_heads = ranked.size(1);
  require(p.kv_heads > 0 && p.heads % p.kv_heads == 0, op, "heads must be a multiple of kv_heads");
  require(p.pages < std::numeric_limits<int32_t>::max() / 2 && width >= 0 && sinks >= 0, op,
          "pages, width and sinks must not be negative, and pages below 2^30");
  p.ranked = page_numbers("ranked", ranked, p);
  p.read = page_numbers("read", read, p);
  for (int64_t i = 0; !on_gpu(ranked) && i < p.batch * p.kv_heads; ++i) {
    require(p.read[i] >= 0 && p.read[i] <= p.ranked[i] && p.ranked[i] <= p.pages && p.read[i] <= width, op,
            "0 <= read <= ranked <= pages and read <= width must hold");
  }
  p.sinks = sinks;
  p.width = width;
  p.scores = static_cast<const float*>(scores.data_ptr());
  Tensor chosen = new_tensor(scores, {p.batch, p.kv_heads, width}, ScalarType::Int);
  Tensor unread = new_tensor(scores, {p.batch, p.heads});
  p.chosen = static_cast<int32_t*>(chosen.data_ptr());
  p.unread = static_cast<float*>(unread.data_ptr());
  LCORE_RUN(select_pages, scores, p)
  return {chosen, unread};
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) {
  m.def(
      "select_pages(Tensor scores, Tensor ranked, Tensor read, int sinks, int width) -> (Tensor pages, Tensor unread)");
}

LCORE_KERNELS(m) { m.impl<lcore::select_pages>("select_pages"); }
