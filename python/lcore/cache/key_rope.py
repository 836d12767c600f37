"""Keys that a cache holds before RoPE: which rotation a layer's are read with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lcore.errors import message, require, require_type
from lcore.ops.rope import rope as turn
from lcore.positions import Rotation

if TYPE_CHECKING:
    from lcore.cache.policies.base import Policy

# One for all layers, or one for each, None where keys are read as they are stored; None for a cache after RoPE.
KeyRope: TypeAlias = Rotation | tuple[Rotation | None, ...] | None


def check_rope(
    function: str, rope: Any, num_layers: int, head_dim: int, *, rotate: bool, policy: Policy | None
) -> KeyRope:
    """rope of a cache, in the shortest form; it must fit the heads, and what else the cache does."""
    rule = "be an lcore.positions.Rotation, a sequence with one or None for each layer, or None"
    one = rope is None or isinstance(rope, Rotation)
    layers = (rope,) * num_layers if one else tuple(rope) if isinstance(rope, Sequence) else ()
    require_type(
        len(layers) > 0 and all(x is None or isinstance(x, Rotation) for x in layers),
        function,
        "rope",
        rule,
        repr(rope),
    )
    require(len(layers) == num_layers, function, "rope", f"have one entry for each of {num_layers} layers", len(layers))
    for rotation in layers:
        pairs = 0 if rotation is None else len(rotation.inv_freq)
        require(2 * pairs <= head_dim, function, "rope", f"have at most head_dim / 2 = {head_dim // 2} pairs", pairs)
    found: KeyRope = layers[0] if all(x == layers[0] for x in layers) else layers
    if found is not None and rotate:
        raise NotImplementedError(
            f"lcore.{function}: rotate=True with rope, keys before RoPE, is not there: the Hadamard transform of a key "
            "must follow its RoPE, which is not known when it is stored; use one of the two"
        )
    reindex = policy is not None and policy.reindex
    if reindex and found is None:
        rule = "be given for a policy with reindex=True, which needs keys before RoPE; a model's new_cache does"
        raise ValueError(message(function, "rope", rule, None))
    if policy is not None and found is not None:
        rule = "be True with rope: keys before RoPE are read at their places in the cache, which evictions change"
        require(reindex, function, "policy.reindex", rule, reindex)
    return found


def layer_rope(rope: KeyRope, layer: int) -> Rotation | None:
    return rope[layer] if isinstance(rope, tuple) else rope


def turned_keys(k: Tensor, first: int, rope: Rotation) -> Tensor:
    """k (batch, kv_heads, n, head_dim) rotated to positions first, first + 1, ..."""
    return _turned(k.transpose(1, 2), torch.arange(first, first + k.shape[2]), rope).transpose(1, 2)


def turned_queries(q: Tensor, lengths: Tensor, counts: Tensor | None, rope: Rotation) -> Tensor:
    """q (batch, new, heads, head_dim) as float32, the last of each row rotated to the place of the last key.

    lengths: (batch, kv_heads), keys of each slot. counts: (batch,) real rows of q, or None.
    """
    batch, new, heads, dim = q.shape
    last = lengths.long() - (new if counts is None else counts[:, None])
    places = last.flatten()[:, None] + torch.arange(new)
    by_slot = q.float().unflatten(2, (lengths.shape[1], -1)).transpose(1, 2).flatten(0, 1)
    turned = _turned(by_slot, places, rope)
    return turned.unflatten(0, lengths.shape).transpose(1, 2).reshape(batch, new, heads, dim)


def _turned(x: Tensor, positions: Tensor, rope: Rotation) -> Tensor:
    scaling, interleaved = rope.attention_scaling, rope.interleaved
    return turn(x, positions, rope.frequencies, attention_scaling=scaling, interleaved=interleaved)


def rope_from_json(value: Any) -> KeyRope:
    """What was written as dicts of the fields."""
    if isinstance(value, list):
        return tuple(None if part is None else Rotation(**part) for part in value)
    return None if value is None else Rotation(**value)
