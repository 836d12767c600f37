"""What a policy remembers about the keys that a cache holds."""

from __future__ import annotations

import torch
from numpy import int32
from numpy.typing import NDArray
from torch import Tensor


class KeyScores:
    """Named numbers of every key, layer by layer: float32 (batch, kv_heads, keys), 0 behind a slot's last key."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]

    @property
    def nbytes(self) -> int:
        return sum(_bytes(values) for values in self.layers)

    def added_bytes(self, layer: int, values: dict[str, Tensor]) -> int:
        """What `layers[layer] = values` would add."""
        return _bytes(values) - _bytes(self.layers[layer])

    def copy(self) -> KeyScores:
        copy = KeyScores(0)
        copy.layers = [{name: x.clone() for name, x in values.items()} for values in self.layers]
        return copy

    def crop(self, lengths: NDArray[int32]) -> None:
        """Forgets what stands behind the first lengths[layer, batch, kv_head] keys."""
        for values, kept in zip(self.layers, torch.from_numpy(lengths), strict=True):
            for x in values.values():
                x[torch.arange(x.shape[-1]) >= kept[..., None]] = 0


def _bytes(values: dict[str, Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in values.values())


def gather_kept(values: Tensor, keep: Tensor) -> Tensor:
    """values (batch, kv_heads, keys) where `keep` is set, moved together in their order, with zeros behind."""
    counts = keep.sum(-1)
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(counts.max())]
    kept = values.gather(-1, order)
    return kept.masked_fill(torch.arange(kept.shape[-1]) >= counts[..., None], 0)
