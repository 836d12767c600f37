"""What tails held before their page was coded: so that the last step into a coded page can be taken back exactly."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcore.cache.pool import new_tensor
from lcore.errors import message

Mask = NDArray[np.bool_]


class Undo:
    """The waiting tokens of every slot as they were when an append completed their page.

    A coded page gives back rounded values, and what was coded once must not be coded again. A step that fails half way
    through a model, or a draft that is refused, takes back what it has just appended: for that the tokens that waited
    before it are enough.

    tail_k, tail_v: as `Slots`. lengths: (layers, batch, kv_heads) int32, the tokens of a slot at that time; 0 for none.
    """

    def __init__(self, tail_k: Tensor, tail_v: Tensor, lengths: Tensor) -> None:
        self.tail_k, self.tail_v, self.lengths = tail_k, tail_v, lengths

    @staticmethod
    def beside(function: str, tail_k: Tensor, tail_v: Tensor) -> Undo:
        """Nothing to take back yet, for slots with these tails."""
        shape = tuple(tail_k.shape[:3])
        k, v = (new_tensor(function, tuple(x.shape), x.dtype) for x in (tail_k, tail_v))
        return Undo(k, v, new_tensor(function, shape, torch.int32).zero_())

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.tail_k, self.tail_v, self.lengths))

    def copy(self, function: str) -> Undo:
        own = (self.tail_k, self.tail_v, self.lengths)
        k, v, lengths = (new_tensor(function, tuple(x.shape), x.dtype).copy_(x) for x in own)
        return Undo(k, v, lengths)

    def save(self, layer: int, filling: Mask, lengths: NDArray[np.int32], tail_k: Tensor, tail_v: Tensor) -> None:
        """Keeps the tails of a layer's slots whose page is about to be coded; lengths are those before that."""
        where = torch.from_numpy(filling)
        self.tail_k[layer][where] = tail_k[where]
        self.tail_v[layer][where] = tail_v[where]
        self.lengths.numpy()[layer][filling] = lengths[filling]

    def forget(self, layer: int) -> None:
        """Slots whose pages have moved have nothing to take back."""
        self.lengths[layer] = 0

    def check(self, cut: Mask, after: NDArray[np.int32], page_size: int) -> None:
        """ValueError when slots that are cut to `after` tokens, inside a coded page, cannot be cut there exactly."""
        saved = self.lengths.numpy()
        exact = (saved // page_size == after // page_size) & (after <= saved)
        if (wrong := cut & ~exact).any():
            n = int(after[wrong][0])
            rule = f"end at whole pages of {page_size} tokens, in the tail, or before the last append"
            got = f"{n} in a coded page; {n // page_size * page_size} would do"
            raise ValueError(message("PagedCache.crop", "n", rule, got))

    def restore(self, cut: Mask, tail_k: Tensor, tail_v: Tensor) -> None:
        where = torch.from_numpy(cut)
        tail_k[where] = self.tail_k[where]
        tail_v[where] = self.tail_v[where]
