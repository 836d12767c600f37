"""The shape of a Mamba model, and what its config.json says in its own words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcore.errors import message, require

# model_type and architecture in a config.json
MAMBA_FAMILIES = {
    "mamba": "MambaForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}
_OWNER = "MambaConfig"
_COUNTS = ("vocab_size", "hidden_size", "num_layers", "intermediate_size", "state_size", "conv_kernel")
# What the configuration classes of transformers assume when config.json is silent.
_MAMBA2 = {"num_heads": 128, "head_dim": 64, "num_groups": 8, "state_size": 128, "tied": False}
_MAMBA = {"num_heads": 0, "head_dim": 0, "num_groups": 0, "state_size": 16, "tied": True}


@dataclass(frozen=True)
class MambaConfig:
    """Everything that fixes a Mamba model's computation; two equal configs with equal weights give equal logits.

    Fields with a shorter form: intermediate_size 0 is num_heads * head_dim in mamba2, and 2 * hidden_size elsewhere;
    time_step_rank 0 is hidden_size / 16, rounded up. num_heads, head_dim, n_groups and time_step_limit are read in
    mamba2 alone, time_step_rank in the others, mixer_rms_eps in falcon_mamba.

    Raises: NotImplementedError for an unknown model_type; ValueError for sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    model_type: str = "mamba"
    intermediate_size: int = 0
    state_size: int = 16
    conv_kernel: int = 4
    time_step_rank: int = 0
    num_heads: int = 0
    head_dim: int = 0
    n_groups: int = 0
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    use_bias: bool = False
    use_conv_bias: bool = True
    residual_in_fp32: bool = True
    layer_norm_epsilon: float = 1e-5
    mixer_rms_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.1
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    max_position_embeddings = 0  # no length that the model was made for
    num_kv_heads = 0

    @property
    def recurrent_values(self) -> int:
        """Values a token that a block computes: u, its convolution, steps, z and y, and B and C before and after it."""
        return 5 * self.intermediate_size + 4 * max(1, self.n_groups) * self.state_size

    def __post_init__(self) -> None:
        if self.model_type not in MAMBA_FAMILIES:
            rule = f"be one of {', '.join(MAMBA_FAMILIES)}"
            raise NotImplementedError(message(_OWNER, "model_type", rule, self.model_type))
        heads = self.model_type == "mamba2"
        if self.intermediate_size == 0:
            size = self.num_heads * self.head_dim if heads else 2 * self.hidden_size
            object.__setattr__(self, "intermediate_size", size)
        if self.time_step_rank == 0:
            object.__setattr__(self, "time_step_rank", math.ceil(self.hidden_size / 16))
        for name in (*_COUNTS, *(("num_heads", "head_dim", "n_groups") if heads else ("time_step_rank",))):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, _OWNER, name, "be a positive integer", value)
        if heads:
            got = f"{self.num_heads} and {self.head_dim}"
            fits = self.num_heads * self.head_dim == self.intermediate_size
            product = f"have the product intermediate_size = {self.intermediate_size}"
            require(fits, _OWNER, "num_heads and head_dim", product, got)
            whole = self.intermediate_size % self.hidden_size == 0
            rule = f"be a multiple of hidden_size = {self.hidden_size}"
            require(whole, _OWNER, "intermediate_size", rule, self.intermediate_size)
            rule = f"be a multiple of n_groups = {self.n_groups}"
            require(self.num_heads % self.n_groups == 0, _OWNER, "num_heads", rule, self.num_heads)

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers 5 writes for this model, without the dtype."""
        written: dict[str, Any] = {
            "architectures": [MAMBA_FAMILIES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "expand": self.intermediate_size // self.hidden_size,
            "state_size": self.state_size,
            "conv_kernel": self.conv_kernel,
            "time_step_rank": self.time_step_rank,
            "hidden_act": "silu",
            "use_bias": self.use_bias,
            "use_conv_bias": self.use_conv_bias,
            "residual_in_fp32": self.residual_in_fp32,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }
        if self.model_type == "mamba2":
            limit = [bound if math.isfinite(bound) else {"__float__": "Infinity"} for bound in self.time_step_limit]
            heads = {"num_heads": self.num_heads, "head_dim": self.head_dim, "n_groups": self.n_groups}
            return written | heads | {"time_step_limit": limit}
        if self.model_type == "falcon_mamba":
            written["mixer_rms_eps"] = self.mixer_rms_eps
        return written | {"intermediate_size": self.intermediate_size}


def parse_mamba(family: str, raw: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of MambaConfig from the dict of a config.json, in which the common sizes have been checked.

    ids: where bos_token_id and its like are read. Raises: ValueError for an impossible value.
    """
    heads = family == "mamba2"
    usual: dict[str, Any] = _MAMBA2 if heads else _MAMBA
    rank = raw.get("time_step_rank", "auto")
    num_heads, head_dim = (raw.get(name, usual[name]) if heads else 0 for name in ("num_heads", "head_dim"))
    inner = num_heads * head_dim if heads else raw.get("intermediate_size")
    return {
        "model_type": family,
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "intermediate_size": inner or int(raw.get("expand", 2) * raw["hidden_size"]),
        "state_size": raw.get("state_size", usual["state_size"]),
        "conv_kernel": raw.get("conv_kernel", 4),
        "time_step_rank": 0 if rank == "auto" else rank,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "n_groups": raw.get("n_groups", usual["num_groups"]) if heads else 0,
        "time_step_limit": _limit(raw.get("time_step_limit")) if heads else (0.0, math.inf),
        "use_bias": bool(raw.get("use_bias", False)),
        "use_conv_bias": bool(raw.get("use_conv_bias", True)),
        "residual_in_fp32": bool(raw.get("residual_in_fp32", True)),
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "mixer_rms_eps": raw.get("mixer_rms_eps", 1e-6),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", usual["tied"])),
        "initializer_range": raw.get("initializer_range", 0.1),
        "bos_token_id": ids.get("bos_token_id"),
        "pad_token_id": ids.get("pad_token_id"),
    }


def _limit(raw: Any) -> tuple[float, float]:
    """Two numbers; transformers 5 writes infinity as an object, which JSON has no number for."""
    if raw is None:
        return 0.0, math.inf
    bounds = [float(x["__float__"]) if isinstance(x, dict) and "__float__" in x else x for x in raw]
    fits = len(bounds) == 2 and all(isinstance(x, (int, float)) for x in bounds) and bounds[0] <= bounds[1]
    require(fits, "load_model", "time_step_limit", "be two numbers, the second not below the first", raw)
    return float(bounds[0]), float(bounds[1])
