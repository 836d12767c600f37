"""Qwen3-Next: Gated DeltaNet, gated attention every few layers, experts with a shared one, zero-centred norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from lcore.errors import message, require
from lcore.models.hybrid import HybridLayer, Parts
from lcore.models.hybrid_config import HybridConfig, Modules, attention_numbers, common_fields
from lcore.nn import Attention, GatedDeltaNet, GatedMLP, SparseMLP, ZeroCentredRMSNorm
from lcore.positions import RopeConfig

_KINDS = {"full_attention": True, "linear_attention": False}  # in layer_types: whether the layer attends
# What transformers' Qwen3NextConfig assumes when config.json is silent.
_USUAL = {
    "num_kv_heads": 2, "head_dim": 256, "max_position_embeddings": 32768, "num_experts": 512, "num_experts_per_tok": 10,
}  # fmt: skip
_PARTIAL_ROTARY = 0.25
_INTERVAL = 4


@dataclass(frozen=True)
class Qwen3NextConfig(HybridConfig):
    """As HybridConfig. layer_types has "full_attention" or "linear_attention" for each layer; empty is every fourth
    layer attention. Layers decoder_sparse_step, 2 decoder_sparse_step, ... counted from 1 have experts, if there are
    any, but for those in mlp_only_layers."""

    layer_types: tuple[str, ...] = ()
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(partial_rotary_factor=_PARTIAL_ROTARY))
    attention_bias: bool = False
    conv_kernel: int = 4
    key_dim: int = 128
    value_dim: int = 128
    num_key_heads: int = 16
    num_value_heads: int = 32
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True

    model_type: ClassVar[str] = "qwen3_next"
    architecture: ClassVar[str] = "Qwen3NextForCausalLM"
    last_norm: ClassVar[str] = "norm"
    counts: ClassVar[tuple[str, ...]] = (
        "conv_kernel", "key_dim", "value_dim", "num_key_heads", "num_value_heads", "decoder_sparse_step",
        "moe_intermediate_size", "shared_expert_intermediate_size",
    )  # fmt: skip

    def __post_init__(self) -> None:
        owner, layers = "Qwen3NextConfig", range(self.num_layers)
        if not self.layer_types:
            kinds = ("linear_attention" if (i + 1) % _INTERVAL else "full_attention" for i in layers)
            object.__setattr__(self, "layer_types", tuple(kinds))
        rule = f"have num_layers = {self.num_layers} entries"
        require(len(self.layer_types) == self.num_layers, owner, "layer_types", rule, len(self.layer_types))
        unknown = sorted(set(self.layer_types) - set(_KINDS))
        if unknown:
            raise NotImplementedError(message(owner, "layer_types", f"be {' or '.join(_KINDS)}", unknown[0]))
        super().__post_init__()

    @property
    def attends(self) -> list[bool]:
        return [_KINDS[kind] for kind in self.layer_types]

    @property
    def sparse(self) -> list[bool]:
        step, dense = self.decoder_sparse_step, self.mlp_only_layers
        return [self.num_experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(self.num_layers)]

    @property
    def recurrent_values(self) -> int:
        return 4 * self.num_key_heads * self.key_dim + 5 * self.num_value_heads * self.value_dim

    def modules(self) -> Modules:
        kinds = zip(self.attends, self.sparse, attention_numbers(self.attends), strict=True)
        norm = partial(ZeroCentredRMSNorm, self.hidden_size, self.rms_norm_eps)
        return [Qwen3NextLayer(self, *kind) for kind in kinds], norm

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "layer_types": list(self.layer_types),
            "rope_parameters": self.rope.to_dict(),
            "attention_bias": self.attention_bias,
            "linear_conv_kernel_dim": self.conv_kernel,
            "linear_key_head_dim": self.key_dim,
            "linear_value_head_dim": self.value_dim,
            "linear_num_key_heads": self.num_key_heads,
            "linear_num_value_heads": self.num_value_heads,
            "decoder_sparse_step": self.decoder_sparse_step,
            "mlp_only_layers": list(self.mlp_only_layers),
            "moe_intermediate_size": self.moe_intermediate_size,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
        }


class Qwen3NextLayer(HybridLayer):
    """A layer of Qwen3-Next under the names of its checkpoints."""

    def __init__(self, config: Qwen3NextConfig, attends: bool, sparse: bool, number: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.attends = attends
        if attends:
            self.self_attn = Attention(
                hidden,
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                layer=number,
                bias=config.attention_bias,
                output_bias=config.attention_bias,
                qk_norm_eps=eps,
                norm=ZeroCentredRMSNorm,
                gated=True,
                rope=config.rope,
            )
        else:
            self.linear_attn = GatedDeltaNet(
                hidden,
                config.num_key_heads,
                config.num_value_heads,
                config.key_dim,
                config.value_dim,
                conv_width=config.conv_kernel,
                norm_eps=eps,
            )
        self.mlp = (
            SparseMLP(hidden, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok,
                      normalize=config.norm_topk_prob, shared_size=config.shared_expert_intermediate_size)
            if sparse
            else GatedMLP(hidden, config.intermediate_size)
        )  # fmt: skip
        self.input_layernorm = ZeroCentredRMSNorm(hidden, eps)
        self.post_attention_layernorm = ZeroCentredRMSNorm(hidden, eps)

    @property
    def parts(self) -> Parts:
        return Parts(self.self_attn if self.attends else self.linear_attn, self.post_attention_layernorm, self.mlp)


def parse_qwen3_next(raw: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of Qwen3NextConfig from the dict of a config.json, as `common_fields`."""
    layers, interval = range(raw["num_hidden_layers"]), raw.get("full_attention_interval", _INTERVAL)
    kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in layers]
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    parameters.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor", _PARTIAL_ROTARY))
    common = common_fields(raw, ids, _USUAL)
    limit = common["max_position_embeddings"]
    return common | {
        "layer_types": tuple(raw.get("layer_types") or kinds),
        "rope": RopeConfig.from_dict(parameters, rope_theta=raw.get("rope_theta"), max_position_embeddings=limit),
        "attention_bias": bool(raw.get("attention_bias", False)),
        "conv_kernel": raw.get("linear_conv_kernel_dim", 4),
        "key_dim": raw.get("linear_key_head_dim", 128),
        "value_dim": raw.get("linear_value_head_dim", 128),
        "num_key_heads": raw.get("linear_num_key_heads", 16),
        "num_value_heads": raw.get("linear_num_value_heads", 32),
        "decoder_sparse_step": raw.get("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(raw.get("mlp_only_layers") or ()),
        "moe_intermediate_size": raw.get("moe_intermediate_size", 512),
        "shared_expert_intermediate_size": raw.get("shared_expert_intermediate_size", 512),
        "norm_topk_prob": bool(raw.get("norm_topk_prob", True)),
    }
