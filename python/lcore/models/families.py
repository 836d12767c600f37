"""The decoder families that load, and what their config.json says in its own words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lcore.errors import message, require
from lcore.models.config import FAMILIES, ModelConfig
from lcore.models.hybrid_config import HybridConfig
from lcore.models.jamba import JambaConfig, parse_jamba
from lcore.models.mamba_config import MAMBA_FAMILIES, MambaConfig, parse_mamba
from lcore.models.qwen3_next import Qwen3NextConfig, parse_qwen3_next
from lcore.positions import RopeConfig
from lcore.positions.rope_config import split_by_layer_type

AnyConfig: TypeAlias = ModelConfig | MambaConfig | HybridConfig

_OWNER = "load_model"
_HYBRIDS: dict[str, tuple[type[HybridConfig], Callable[..., dict[str, Any]]]] = {
    "jamba": (JambaConfig, parse_jamba),
    "qwen3_next": (Qwen3NextConfig, parse_qwen3_next),
}
_ALL = FAMILIES | MAMBA_FAMILIES | {family: kind.architecture for family, (kind, _) in _HYBRIDS.items()}
_COMMON = ("vocab_size", "hidden_size", "num_hidden_layers")
_SIZES = (*_COMMON, "intermediate_size", "num_attention_heads")
# What the configuration classes of transformers assume when config.json is silent.
_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_MISTRAL_WINDOW = 4096
_QWEN_WINDOW, _QWEN_FULL_LAYERS = 4096, 28
_QWEN3_HEAD_DIM = 128


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> AnyConfig:
    """Reads the dict of a config.json, and of a generation_config.json for the ids that end a text.

    Raises: NotImplementedError for an architecture or feature without an implementation, by name; ValueError for a
        missing or impossible value.
    """
    family = family_of(raw)
    for name in _COMMON if family in MAMBA_FAMILIES else _SIZES:
        rule = f"have {name} as a positive integer"
        require(isinstance(raw.get(name), int) and raw[name] > 0, _OWNER, "config.json", rule, raw.get(name))
    _refuse_features(raw)
    ids = dict(raw) | {name: value for name, value in (generation or {}).items() if value is not None}
    if family in MAMBA_FAMILIES:
        return MambaConfig(**parse_mamba(family, raw, ids), eos_token_ids=_as_tuple(ids.get("eos_token_id")))
    if family in _HYBRIDS:
        kind, parse = _HYBRIDS[family]
        return kind(**parse(raw, ids), eos_token_ids=_as_tuple(ids.get("eos_token_id")))
    limit = raw.get("max_position_embeddings") or _MAX_POSITIONS[family]
    ropes = {
        kind: RopeConfig.from_dict(
            parameters,
            rope_theta=raw.get("rope_theta"),
            max_position_embeddings=limit,
            original_max_position_embeddings=raw.get("original_max_position_embeddings"),
        )
        for kind, parameters in split_by_layer_type(raw.get("rope_scaling") or raw.get("rope_parameters")).items()
    }
    for part in (raw.get("partial_rotary_factor"), *(rope.partial_rotary_factor for rope in ropes.values())):
        if part not in (None, 1):
            raise NotImplementedError(message(_OWNER, "partial_rotary_factor", "be 1 in these families", part))
    rope = ropes.get("full_attention") or ropes["sliding_attention"]
    return ModelConfig(
        model_type=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads", 8 if family == "mistral" else 0) or 0,
        head_dim=raw.get("head_dim") or (_QWEN3_HEAD_DIM if family == "qwen3" else 0),
        max_position_embeddings=limit,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=rope,
        sliding_rope=ropes.get("sliding_attention"),
        sliding_window=_windows(family, raw),
        attention_bias=family == "qwen2" or bool(raw.get("attention_bias", False) and family != "mistral"),
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        initializer_range=raw.get("initializer_range", 0.02),
        bos_token_id=ids.get("bos_token_id"),
        eos_token_ids=_as_tuple(ids.get("eos_token_id")),
        pad_token_id=ids.get("pad_token_id"),
    )


def family_of(raw: Mapping[str, Any]) -> str:
    """The family of a config.json, by its first architecture or, where none is given, its model_type."""
    named = raw.get("architectures") or []
    if named:
        for family, architecture in _ALL.items():
            if named[0] == architecture:
                return family
    elif raw.get("model_type") in _ALL:
        return str(raw["model_type"])
    got = named[0] if named else f"model_type {raw.get('model_type')!r}"
    raise NotImplementedError(message(_OWNER, "architecture", f"be one of {', '.join(_ALL.values())}", got))


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _windows(family: str, raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers = raw["num_hidden_layers"]
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        return (raw.get("sliding_window", _MISTRAL_WINDOW),) * layers
    window = raw.get("sliding_window", _QWEN_WINDOW) if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types")
    if kinds is None:
        full = raw.get("max_window_layers", _QWEN_FULL_LAYERS)
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    require(len(kinds) == layers, _OWNER, "layer_types", f"have num_hidden_layers = {layers} entries", len(kinds))
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(message(_OWNER, "layer_types", "be full_attention or sliding_attention", kind))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _refuse_features(raw: Mapping[str, Any]) -> None:
    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise NotImplementedError(message(_OWNER, "hidden_act", "be silu", act))
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unnamed")
        raise NotImplementedError(message(_OWNER, "weights", "be unquantized", f"quantization_config {method!r}"))
