"""Jamba: Mamba layers with norms of dt, B and C, attention without positions every few layers, experts in some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from lcore.errors import require
from lcore.models.hybrid import HybridLayer, Parts
from lcore.models.hybrid_config import HybridConfig, Modules, attention_numbers, common_fields
from lcore.nn import Attention, GatedMLP, Mamba, RMSNorm, SparseMLP

# What transformers' JambaConfig assumes when config.json is silent.
_USUAL = {
    "num_kv_heads": 8, "head_dim": 0, "max_position_embeddings": 262144, "num_experts": 16, "num_experts_per_tok": 2,
}  # fmt: skip


@dataclass(frozen=True)
class JambaConfig(HybridConfig):
    """As HybridConfig. Layers attn_layer_offset, + attn_layer_period, ... attend; layers expert_layer_offset,
    + expert_layer_period, ... have experts, if there are several. time_step_rank 0 is hidden_size / 16, rounded up."""

    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int = 0
    use_bias: bool = False
    use_conv_bias: bool = True

    model_type: ClassVar[str] = "jamba"
    architecture: ClassVar[str] = "JambaForCausalLM"
    last_norm: ClassVar[str] = "final_layernorm"
    counts: ClassVar[tuple[str, ...]] = (
        "attn_layer_period", "expert_layer_period", "state_size", "conv_kernel", "expand", "time_step_rank",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.time_step_rank == 0:
            object.__setattr__(self, "time_step_rank", math.ceil(self.hidden_size / 16))
        for kind in ("attn", "expert"):
            period, offset = getattr(self, f"{kind}_layer_period"), getattr(self, f"{kind}_layer_offset")
            require(0 <= offset < period, "JambaConfig", f"{kind}_layer_offset", f"be in 0 .. {period - 1}", offset)
        super().__post_init__()

    @property
    def attends(self) -> list[bool]:
        return [i % self.attn_layer_period == self.attn_layer_offset for i in range(self.num_layers)]

    @property
    def sparse(self) -> list[bool]:
        several = self.num_experts > 1
        period, offset = self.expert_layer_period, self.expert_layer_offset
        return [several and i % period == offset for i in range(self.num_layers)]

    @property
    def recurrent_values(self) -> int:
        return 5 * self.expand * self.hidden_size + 4 * self.state_size

    def modules(self) -> Modules:
        kinds = zip(self.attends, self.sparse, attention_numbers(self.attends), strict=True)
        return [JambaLayer(self, *kind) for kind in kinds], partial(RMSNorm, self.hidden_size, self.rms_norm_eps)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "attn_layer_period": self.attn_layer_period,
            "attn_layer_offset": self.attn_layer_offset,
            "expert_layer_period": self.expert_layer_period,
            "expert_layer_offset": self.expert_layer_offset,
            "mamba_d_state": self.state_size,
            "mamba_d_conv": self.conv_kernel,
            "mamba_expand": self.expand,
            "mamba_dt_rank": self.time_step_rank,
            "mamba_proj_bias": self.use_bias,
            "mamba_conv_bias": self.use_conv_bias,
        }


class JambaLayer(HybridLayer):
    """A layer of Jamba under the names of its checkpoints."""

    def __init__(self, config: JambaConfig, attends: bool, sparse: bool, number: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.attends = attends
        if attends:
            self.self_attn = Attention(hidden, config.num_heads, config.num_kv_heads, config.head_dim, layer=number)
        else:
            self.mamba = Mamba(
                hidden,
                config.expand * hidden,
                config.state_size,
                conv_width=config.conv_kernel,
                dt_rank=config.time_step_rank,
                bias=config.use_bias,
                conv_bias=config.use_conv_bias,
                norm_eps=eps,
                norm_weights=True,
            )
        self.feed_forward = (
            SparseMLP(hidden, config.intermediate_size, config.num_experts, config.num_experts_per_tok,
                      router_name="router")
            if sparse
            else GatedMLP(hidden, config.intermediate_size)
        )  # fmt: skip
        self.input_layernorm = RMSNorm(hidden, eps)
        self.pre_ff_layernorm = RMSNorm(hidden, eps)

    @property
    def parts(self) -> Parts:
        return Parts(self.self_attn if self.attends else self.mamba, self.pre_ff_layernorm, self.feed_forward)


def parse_jamba(raw: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of JambaConfig from the dict of a config.json, as `common_fields`."""
    rank = raw.get("mamba_dt_rank", "auto")
    places = ("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset")
    return common_fields(raw, ids, _USUAL) | {
        **{name: raw[name] for name in places if name in raw},
        "state_size": raw.get("mamba_d_state", 16),
        "conv_kernel": raw.get("mamba_d_conv", 4),
        "expand": raw.get("mamba_expand", 2),
        "time_step_rank": 0 if rank == "auto" else rank,
        "use_bias": bool(raw.get("mamba_proj_bias", False)),
        "use_conv_bias": bool(raw.get("mamba_conv_bias", True)),
    }
