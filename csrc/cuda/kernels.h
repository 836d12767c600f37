// The CUDA kernels as the host sees them: one function an op, named as in cpu/kernels.h, which picks the family of
// architectures.
#pragma once

#include "core/attention.h"
#include "core/cache_append.h"
#include "core/cache_compact.h"
#include "core/causal_conv1d.h"
#include "core/hadamard.h"
#include "core/merge_states.h"
#include "core/page_bounds.h"
#include "core/rope.h"
#include "core/select_pages.h"
#include "core/selective_scan.h"
#include "cuda/stream.h"

namespace lcore::cuda {

// Compiled for sm_80 and sm_90a and, through PTX, for every later chip.
namespace generic {
void attention_forward(const AttentionParams& params, Stream& stream);
void attention_backward(const AttentionGradParams& params, Stream& stream);
void attention_paged(const AttentionParams& params, Stream& stream);
void cache_append(const CacheAppendParams& params, Stream& stream);
void cache_compact(const CacheCompactParams& params, Stream& stream);
void hadamard(const HadamardParams& params, Stream& stream);
void page_bounds(const PageBoundsParams& params, Stream& stream);
void page_scores(const PageScoresParams& params, Stream& stream);
void select_pages(const SelectPagesParams& params, Stream& stream);
void rope(const RopeParams& params, Stream& stream);
void causal_conv1d(const CausalConv1dParams& params, Stream& stream);
void causal_conv1d_backward(const CausalConv1dGradParams& params, Stream& stream);
void selective_scan(const SelectiveScanParams& params, Stream& stream);
void selective_scan_backward(const SelectiveScanGradParams& params, Stream& stream);
void merge_states(const MergeParams& params, Stream& stream);
void merge_states_backward(const MergeGradParams& params, Stream& stream);
}  // namespace generic

// Each throws std::runtime_error on a chip older than sm_80, naming it.
void attention_forward(const AttentionParams& params, Stream& stream);
void attention_backward(const AttentionGradParams& params, Stream& stream);
void cache_append(const CacheAppendParams& params, Stream& stream);
void cache_compact(const CacheCompactParams& params, Stream& stream);
void hadamard(const HadamardParams& params, Stream& stream);
void page_bounds(const PageBoundsParams& params, Stream& stream);
void page_scores(const PageScoresParams& params, Stream& stream);
void select_pages(const SelectPagesParams& params, Stream& stream);
void rope(const RopeParams& params, Stream& stream);
void causal_conv1d(const CausalConv1dParams& params, Stream& stream);
void causal_conv1d_backward(const CausalConv1dGradParams& params, Stream& stream);
void selective_scan(const SelectiveScanParams& params, Stream& stream);
void selective_scan_backward(const SelectiveScanGradParams& params, Stream& stream);
void merge_states(const MergeParams& params, Stream& stream);
void merge_states_backward(const MergeGradParams& params, Stream& stream);

}  // namespace lcore::cuda
