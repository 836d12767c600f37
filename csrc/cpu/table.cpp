// The kernel table of one instruction set.
#include "cpu/kernels.h"

#define LCORE_STRING_OF(x) #x
#define LCORE_STRING(x) LCORE_STRING_OF(x)

namespace lcore::cpu::LCORE_ISA {

void attention_forward(const AttentionParams&, Executor&);
void attention_backward(const AttentionGradParams&, Executor&);
void cache_append(const CacheAppendParams&, Executor&);
void causal_conv1d(const CausalConv1dParams&, Executor&);
void causal_conv1d_backward(const CausalConv1dGradParams&, Executor&);
void hadamard(const HadamardParams&, Executor&);
void cache_compact(const CacheCompactParams&, Executor&);
void key_mass(const KeyMassParams&, Executor&);
void linear_attention(const LinearAttentionParams&, Executor&);
void linear_attention_backward(const LinearAttentionGradParams&, Executor&);
void linear_attention_step(const LinearAttentionStepParams&, Executor&);
void merge_states(const MergeParams&, Executor&);
void merge_states_backward(const MergeGradParams&, Executor&);
void mlstm_gates(const MlstmGateParams&, Executor&);
void mlstm_gates_backward(const MlstmGateGradParams&, Executor&);
void page_bounds(const PageBoundsParams&, Executor&);
void page_scores(const PageScoresParams&, Executor&);
void rope(const RopeParams&, Executor&);
void rwkv4_wkv(const Rwkv4Params&, Executor&);
void rwkv4_wkv_backward(const Rwkv4GradParams&, Executor&);
void select_pages(const SelectPagesParams&, Executor&);
void selective_scan(const SelectiveScanParams&, Executor&);
void selective_scan_backward(const SelectiveScanGradParams&, Executor&);
double peak_fma(Executor&, int);
double peak_dot(Executor&, int);
double peak_read(Executor&, int);

extern const KernelTable kTable;
const KernelTable kTable = {LCORE_STRING(LCORE_ISA),
                            attention_forward,
                            attention_backward,
                            cache_append,
                            causal_conv1d,
                            causal_conv1d_backward,
                            hadamard,
                            cache_compact,
                            key_mass,
                            linear_attention,
                            linear_attention_backward,
                            linear_attention_step,
                            merge_states,
                            merge_states_backward,
                            mlstm_gates,
                            mlstm_gates_backward,
                            page_bounds,
                            page_scores,
                            rope,
                            rwkv4_wkv,
                            rwkv4_wkv_backward,
                            select_pages,
                            selective_scan,
                            selective_scan_backward,
                            peak_fma,
                            peak_dot,
                            peak_read};

}  // namespace lcore::cpu::LCORE_ISA
