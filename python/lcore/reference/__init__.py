"""The formulas of the ops in plain torch: short, differentiable, float64 when the inputs are. Slow, and S x S."""

from lcore.reference.attention import attention
from lcore.reference.causal_conv1d import causal_conv1d
from lcore.reference.compose_states import compose_states
from lcore.reference.gated_delta_rule import gated_delta_rule
from lcore.reference.gated_linear_attention import gated_linear_attention
from lcore.reference.hadamard import hadamard
from lcore.reference.key_mass import key_mass
from lcore.reference.merge_states import merge_states
from lcore.reference.mlstm import mlstm
from lcore.reference.page_bounds import page_bounds, page_scores
from lcore.reference.rope import rope
from lcore.reference.rwkv4_wkv import rwkv4_wkv
from lcore.reference.rwkv6 import rwkv6
from lcore.reference.rwkv7 import rwkv7
from lcore.reference.select_pages import select_pages
from lcore.reference.selective_scan import selective_scan
from lcore.reference.ssd import ssd

__all__ = [
    "attention",
    "causal_conv1d",
    "compose_states",
    "gated_delta_rule",
    "gated_linear_attention",
    "hadamard",
    "key_mass",
    "merge_states",
    "mlstm",
    "page_bounds",
    "page_scores",
    "rope",
    "rwkv4_wkv",
    "rwkv6",
    "rwkv7",
    "select_pages",
    "selective_scan",
    "ssd",
]
