"""Public ops: argument checks, fake kernels and autograd around ``torch.ops.lcore``."""

from lcore.ops import _attention_grad  # noqa: F401  (registers fakes and autograd)
from lcore.ops.attention import attention
from lcore.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from lcore.ops.compose_states import compose_states
from lcore.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_update
from lcore.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_update
from lcore.ops.hadamard import hadamard
from lcore.ops.key_mass import key_mass
from lcore.ops.merge_states import merge_states
from lcore.ops.mlstm import mlstm, mlstm_update
from lcore.ops.page_bounds import page_bounds, page_scores
from lcore.ops.rope import rope
from lcore.ops.rwkv4_wkv import rwkv4_wkv, rwkv4_wkv_update
from lcore.ops.rwkv6 import rwkv6, rwkv6_update
from lcore.ops.rwkv7 import rwkv7, rwkv7_update
from lcore.ops.select_pages import select_pages
from lcore.ops.selective_scan import selective_scan
from lcore.ops.selective_state_update import selective_state_update
from lcore.ops.ssd import ssd

__all__ = [
    "attention",
    "causal_conv1d",
    "causal_conv1d_update",
    "compose_states",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gated_linear_attention",
    "gated_linear_attention_update",
    "hadamard",
    "key_mass",
    "merge_states",
    "mlstm",
    "mlstm_update",
    "page_bounds",
    "page_scores",
    "rope",
    "rwkv4_wkv",
    "rwkv4_wkv_update",
    "rwkv6",
    "rwkv6_update",
    "rwkv7",
    "rwkv7_update",
    "select_pages",
    "selective_scan",
    "selective_state_update",
    "ssd",
]
