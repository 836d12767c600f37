"""lcore: the long-context core for PyTorch."""

from lcore.cache import HybridCache, PagedCache, PrefixCache, StateCache, policies, selection
from lcore.generation import Generator
from lcore.info import build_info, explain
from lcore.models import load_model
from lcore.ops import (
    attention,
    causal_conv1d,
    causal_conv1d_update,
    compose_states,
    gated_delta_rule,
    gated_delta_rule_update,
    gated_linear_attention,
    gated_linear_attention_update,
    hadamard,
    key_mass,
    merge_states,
    page_bounds,
    page_scores,
    rope,
    rwkv6,
    rwkv6_update,
    select_pages,
    selective_scan,
    selective_state_update,
    ssd,
)

__all__ = [
    "Generator",
    "HybridCache",
    "PagedCache",
    "PrefixCache",
    "StateCache",
    "attention",
    "build_info",
    "causal_conv1d",
    "causal_conv1d_update",
    "compose_states",
    "explain",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gated_linear_attention",
    "gated_linear_attention_update",
    "hadamard",
    "key_mass",
    "load_model",
    "merge_states",
    "page_bounds",
    "page_scores",
    "policies",
    "rope",
    "rwkv6",
    "rwkv6_update",
    "select_pages",
    "selection",
    "selective_scan",
    "selective_state_update",
    "ssd",
]
__version__ = build_info()["version"]
