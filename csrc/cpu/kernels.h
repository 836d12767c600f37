// The CPU kernels of one instruction set as a table of functions. Every source under csrc/cpu/<family>/ is compiled
// once per instruction set, in a namespace of its own (LCORE_ISA), and the table is chosen once, at the first call.
#pragma once

#include <string>

namespace lcore {
class Executor;
struct AttentionParams;
struct AttentionGradParams;
struct CacheAppendParams;
struct CausalConv1dParams;
struct CausalConv1dGradParams;
struct HadamardParams;
struct CacheCompactParams;
struct KeyMassParams;
struct LinearAttentionParams;
struct LinearAttentionGradParams;
struct LinearAttentionStepParams;
struct MergeParams;
struct MergeGradParams;
struct MlstmGateParams;
struct MlstmGateGradParams;
struct PageBoundsParams;
struct PageScoresParams;
struct RopeParams;
struct Rwkv4Params;
struct Rwkv4GradParams;
struct SelectPagesParams;
struct SelectiveScanParams;
struct SelectiveScanGradParams;
}  // namespace lcore

namespace lcore::cpu {

struct KernelTable {
  const char* isa;
  void (*attention_forward)(const AttentionParams&, Executor&);
  void (*attention_backward)(const AttentionGradParams&, Executor&);
  void (*cache_append)(const CacheAppendParams&, Executor&);
  void (*causal_conv1d)(const CausalConv1dParams&, Executor&);
  void (*causal_conv1d_backward)(const CausalConv1dGradParams&, Executor&);
  void (*hadamard)(const HadamardParams&, Executor&);
  void (*cache_compact)(const CacheCompactParams&, Executor&);
  void (*key_mass)(const KeyMassParams&, Executor&);
  void (*linear_attention)(const LinearAttentionParams&, Executor&);
  void (*linear_attention_backward)(const LinearAttentionGradParams&, Executor&);
  void (*linear_attention_step)(const LinearAttentionStepParams&, Executor&);
  void (*merge_states)(const MergeParams&, Executor&);
  void (*merge_states_backward)(const MergeGradParams&, Executor&);
  void (*mlstm_gates)(const MlstmGateParams&, Executor&);
  void (*mlstm_gates_backward)(const MlstmGateGradParams&, Executor&);
  void (*page_bounds)(const PageBoundsParams&, Executor&);
  void (*page_scores)(const PageScoresParams&, Executor&);
  void (*rope)(const RopeParams&, Executor&);
  void (*rwkv4_wkv)(const Rwkv4Params&, Executor&);
  void (*rwkv4_wkv_backward)(const Rwkv4GradParams&, Executor&);
  void (*select_pages)(const SelectPagesParams&, Executor&);
  void (*selective_scan)(const SelectiveScanParams&, Executor&);
  void (*selective_scan_backward)(const SelectiveScanGradParams&, Executor&);
  double (*peak_fma)(Executor&, int repeats);  // float32 operations a second
  double (*peak_dot)(Executor&,
                     int repeats);  // bfloat16 dot-product operations a second, 0 where there is no such instruction
  double (*peak_read)(Executor&, int repeats);  // bytes a second
};

// The best table this machine can run, or the one LCORE_CPU_ISA names. Throws std::invalid_argument when that variable
// names a set that was not built or that this machine lacks.
const KernelTable& kernels();

// Comma-separated names of the instruction sets in this build.
const char* built_isas();

}  // namespace lcore::cpu
