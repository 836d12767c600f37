"""What the configs of hybrid models have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lcore.errors import require

if TYPE_CHECKING:
    from lcore.models.hybrid import HybridLayer

Modules = tuple[list["HybridLayer"], Callable[[], torch.nn.Module]]


@dataclass(frozen=True)
class HybridConfig:
    """Everything that fixes a hybrid model's computation; two equal configs with equal weights give equal logits.

    num_kv_heads 0 is num_heads; head_dim 0 is hidden_size // num_heads.

    Raises: ValueError for sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 0
    rms_norm_eps: float = 1e-6
    num_experts: int = 0
    num_experts_per_tok: int = 0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    last_norm: ClassVar[str]  # name of the norm behind all layers
    counts: ClassVar[tuple[str, ...]]  # fields that are positive integers, besides those here

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        own = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*own, *self.counts):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, owner, name, "be a positive integer", value)
        fits = self.num_heads % self.num_kv_heads == 0
        require(fits, owner, "num_heads", f"be a multiple of num_kv_heads = {self.num_kv_heads}", self.num_heads)
        attending = sum(self.attends)
        rule = "have attention layers and recurrent ones"
        require(0 < attending < self.num_layers, owner, "layers", rule, f"{attending} of {self.num_layers} that attend")
        if any(self.sparse):
            rule = f"be in 1 .. num_experts = {self.num_experts}"
            top = self.num_experts_per_tok
            require(1 <= top <= self.num_experts, owner, "num_experts_per_tok", rule, top)

    @property
    def attends(self) -> list[bool]:
        """Of each layer, whether it is attention."""
        raise NotImplementedError

    @property
    def sparse(self) -> list[bool]:
        """Of each layer, whether its feed-forward block is a mixture of experts."""
        raise NotImplementedError

    @property
    def recurrent_values(self) -> int:
        """Values a token that a recurrent block computes: its inputs before and after the convolution, gates,
        outputs."""
        raise NotImplementedError

    def modules(self) -> Modules:
        """The layers, attention layers numbered among themselves, and the norm behind them."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers 5 writes for this model, without the dtype."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }


def attention_numbers(attends: list[bool]) -> list[int]:
    """Of each layer, how many attention layers there are before it: an attention layer's place in the cache."""
    return [sum(attends[:layer]) for layer in range(len(attends))]


def common_fields(raw: Mapping[str, Any], ids: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of HybridConfig from the dict of a config.json, in which the common sizes have been checked.

    ids: where bos_token_id and its like are read. usual: what the family assumes when config.json is silent.
    """
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": raw["num_attention_heads"],
        "num_kv_heads": raw.get("num_key_value_heads", usual["num_kv_heads"]) or 0,
        "head_dim": raw.get("head_dim") or usual["head_dim"],
        "max_position_embeddings": raw.get("max_position_embeddings", usual["max_position_embeddings"]),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "num_experts": raw.get("num_experts", usual["num_experts"]),
        "num_experts_per_tok": raw.get("num_experts_per_tok", usual["num_experts_per_tok"]),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "initializer_range": raw.get("initializer_range", 0.02),
        "bos_token_id": ids.get("bos_token_id"),
        "pad_token_id": ids.get("pad_token_id"),
    }
