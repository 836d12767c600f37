"""The RoPE settings of a model, read from either generation of Hugging Face keys.

Transformers 4 wrote `rope_theta` beside `rope_scaling = {"type" or "rope_type": ..., "factor": ...}`; transformers 5
writes one dict, `rope_parameters`, with `rope_theta` inside, or one such dict per layer type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lcore.errors import message, require, require_type

ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
}
_POSITIVE = ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")


@dataclass(frozen=True)
class RopeConfig:
    """What fixes the rotation frequencies of a model; see `rope_frequencies` for the formulas.

    Fields carry the names of Hugging Face's `rope_parameters`, except `theta` (there `rope_theta`). None means that
    the checkpoint does not say. `max_position_embeddings` serves yarn when no factor is given.

    Raises: NotImplementedError for a rope type outside `ROPE_TYPES`; ValueError for a missing or impossible value.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        kind, owner = self.rope_type, "RopeConfig"
        if kind not in ROPE_TYPES:
            raise NotImplementedError(message(owner, "rope_type", f"be one of {', '.join(ROPE_TYPES)}", kind))
        missing = [name for name in _REQUIRED[kind] if getattr(self, name) is None]
        require(not missing, owner, f"rope_type {kind!r}", f"come with {', '.join(missing)}", "none")
        for name in _POSITIVE:
            value = getattr(self, name)
            require(value is None or (_is_number(value) and value > 0), owner, name, "be a number above 0", value)
        if kind == "yarn" and self.factor is None:
            known = self.max_position_embeddings is not None
            require(known, owner, "rope_type 'yarn'", "come with factor or max_position_embeddings", "none")
        partial = self.partial_rotary_factor
        require(_is_number(partial) and 0 < partial <= 1, owner, "partial_rotary_factor", "be in (0, 1]", partial)

    @classmethod
    def from_dict(
        cls,
        parameters: Mapping[str, Any] | None,
        *,
        rope_theta: float | None = None,
        max_position_embeddings: int | None = None,
        original_max_position_embeddings: int | None = None,
    ) -> RopeConfig:
        """Reads one `rope_parameters` or `rope_scaling` dict (not nested; see `split_by_layer_type`).

        The keywords are the values that stand beside the dict in config.json. `rope_theta` inside the dict wins over
        the one beside it; for `original_max_position_embeddings` it is the other way round, and where neither is
        given it is `max_position_embeddings`, all as in transformers.
        """
        given = dict(parameters or {})
        rope_type = given.pop("rope_type", None) or given.get("type") or "default"
        theta = given.pop("rope_theta", None) or rope_theta or 10000.0
        known = {field.name for field in fields(cls)} - {"theta"}
        values = {name: value for name, value in given.items() if name in known and value is not None}
        values.setdefault("max_position_embeddings", max_position_embeddings)
        if rope_type in ("llama3", "yarn"):
            inside = values.get("original_max_position_embeddings")
            original = original_max_position_embeddings or inside or max_position_embeddings
            values["original_max_position_embeddings"] = original
        return cls(rope_type=rope_type, theta=theta, **values)

    def to_dict(self) -> dict[str, Any]:
        """The same settings as a `rope_parameters` dict of transformers 5."""
        skipped = {"theta", "max_position_embeddings"}
        if self.rope_type == "default":
            skipped |= {"original_max_position_embeddings"}
        if self.rope_type != "yarn":
            skipped |= {"truncate"}
        if self.partial_rotary_factor == 1.0:
            skipped |= {"partial_rotary_factor"}
        written = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skipped}
        return {"rope_theta": self.theta} | {name: value for name, value in written.items() if value is not None}


def split_by_layer_type(parameters: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any] | None]:
    """A nested `rope_parameters` as {layer type: dict}; a flat one, or none, as {"full_attention": dict}."""
    got = type(parameters).__name__
    require_type(
        parameters is None or isinstance(parameters, Mapping), "RopeConfig", "rope_parameters", "be a dict", got
    )
    nested: dict[str, Mapping[str, Any] | None] = {
        name: value for name, value in (parameters or {}).items() if isinstance(value, Mapping)
    }
    if not nested:
        return {"full_attention": parameters}
    unknown = sorted(set(nested) - {"full_attention", "sliding_attention"})
    if unknown:
        rule = "have the layer types full_attention and sliding_attention only"
        raise NotImplementedError(message("RopeConfig", "rope_parameters", rule, ", ".join(unknown)))
    return nested


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
