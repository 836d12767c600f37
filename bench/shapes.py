"""The attention problems that are measured, and their tensors."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lcore

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `seq` tokens; packed: one behind the other, with cu_seqlens."""

    which: str  # of PASSES
    dtype: str
    seq: int
    head_dim: int
    batch: int = 1
    packed: bool = False
    heads: int = 8
    kv_heads: int = 8
    causal: bool = True
    window: int | None = None  # keys to the left of the query's own (and, not causal, to its right)

    @property
    def bounds(self) -> tuple[int, int]:
        """Keys to the left and right of a query's own position that it sees."""
        side = self.seq if self.window is None else self.window
        return side, 0 if self.causal else side

    def pairs(self) -> int:
        """(query, key) pairs that the mask allows, of all heads and sequences."""
        at = torch.arange(self.seq)
        left, right = self.bounds
        seen = at.clamp(max=left) + 1 + (self.seq - 1 - at).clamp(max=right)
        return int(seen.sum()) * self.heads * self.batch

    def flops(self) -> float:
        """Of both products of the forward; the backward's five count 2.5 times that."""
        return 4 * self.pairs() * self.head_dim * (2.5 if self.which == "backward" else 1)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient: standard normal, (batch, seq, heads, head_dim)."""
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> Tensor:
            empty = torch.empty((self.batch, self.seq, heads, self.head_dim), dtype=DTYPES[self.dtype])
            return empty.normal_(generator=generator)

        return normal(self.heads), normal(self.kv_heads), normal(self.kv_heads), normal(self.heads)

    @functools.cached_property
    def _arguments(self) -> dict[str, Any]:
        side = -1 if self.window is None else self.window
        offsets = torch.arange(self.batch + 1, dtype=torch.int32) * self.seq if self.packed else None
        return {
            "causal": self.causal, "window_size": (side, side), "cu_seqlens_q": offsets, "cu_seqlens_k": offsets,
        }  # fmt: skip

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """lcore.attention on this problem's tensors; those of a packed one are (tokens, heads, head_dim)."""
        return lcore.attention(q, k, v, **self._arguments)

    def attention_and_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return lcore.attention(q, k, v, **self._arguments, return_lse=True)

    def ours(self, x: Tensor) -> Tensor:
        """A view of a (batch, seq, heads, head_dim) tensor as `attention` takes it."""
        return x.flatten(0, 1) if self.packed else x

    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.fields().items())

    def fields(self) -> dict[str, Any]:
        """The columns of a row that say what was measured."""
        columns = ("dtype", "batch", "seq", "packed", "heads", "kv_heads", "head_dim", "causal", "window")
        return {"pass": self.which, **{name: getattr(self, name) for name in columns}}


def table(**choices: Any) -> list[Shape]:
    """Shapes for every combination: each argument is a list, the first one varies slowest."""
    return [Shape(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


def window_pair() -> tuple[Shape, Shape]:
    """A long sequence with a sliding window, and without."""
    full = Shape("forward", "bf16", 65536, 128, heads=2, kv_heads=2)
    return dataclasses.replace(full, window=1024), full


def packed_pair() -> tuple[Shape, Shape]:
    """As many tokens in short packed sequences as in one long sequence."""
    _, full = window_pair()
    return dataclasses.replace(full, seq=1024, batch=64, packed=True), full


def full_set() -> list[Shape]:
    """What is published. The longest sequences have two heads, so that the whole takes minutes."""
    floats = ["fp32", "bf16"]
    shapes = table(which=PASSES, dtype=floats, head_dim=[64, 128], seq=[128, 1024, 4096])
    shapes += table(which=PASSES, dtype=["bf16"], head_dim=[128], seq=[4096], heads=[8], kv_heads=[2])
    shapes += table(which=PASSES, dtype=["fp16"], head_dim=[128], seq=[4096])
    shapes += table(which=PASSES, dtype=["bf16"], head_dim=[128], seq=[4096], causal=[False])
    shapes += table(which=PASSES, dtype=["bf16"], head_dim=[128], seq=[8192], window=[1024], heads=[2], kv_heads=[2])
    shapes += table(which=["forward"], dtype=floats, head_dim=[64, 128], seq=[1024, 4096, 16384])
    shapes += table(which=["forward"], dtype=floats, head_dim=[64, 128], seq=[65536], heads=[2], kv_heads=[2])
    shapes += [*window_pair(), *packed_pair()]
    return list(dict.fromkeys(shapes))
