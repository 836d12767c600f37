"""The paged cache as what it means: for every (layer, sequence, kv head) a list of tokens."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lcore.reference.attention import attention
from lcore.reference.hadamard import hadamard
from lcore.reference.page_format import through_page


class PagedCache:
    """The values that lcore.PagedCache holds and attends to, without pages, tables or shared memory.

    A token waits in the cache's dtype until its page_size neighbours are there, and goes through the page format then,
    once. A page that crop cuts open returns its tokens as they were rounded.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        kv_format: str | tuple[str, str] = "bf16",
        page_size: int = 64,
        head_dim_v: int | None = None,
        rotate: bool = False,
    ) -> None:
        names = (kv_format, kv_format) if isinstance(kv_format, str) else kv_format
        self.dtype, self.page_size, self.rotate = dtype, page_size, rotate
        self.formats = names
        dims = (head_dim, head_dim if head_dim_v is None else head_dim_v)
        # tokens[layer][row][head] = [k (n, head_dim), v (n, head_dim_v)], float64
        self.tokens = [
            [
                [[torch.empty((0, dim), dtype=torch.float64) for dim in dims] for _ in range(num_kv_heads)]
                for _ in range(batch_size)
            ]
            for _ in range(num_layers)
        ]

    def lengths(self, layer: int) -> Tensor:
        """int32 (batch, kv_heads)."""
        return torch.tensor([[len(head[0]) for head in row] for row in self.tokens[layer]], dtype=torch.int32)

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """k (batch, new, kv_heads, head_dim), v (.., head_dim_v); lengths (batch,) real tokens of each row."""
        if self.rotate:
            k, v = hadamard(k), hadamard(v)
        for b, row in enumerate(self.tokens[layer]):
            new = k.shape[1] if lengths is None else int(lengths[b])
            for h, head in enumerate(row):
                full_before = len(head[0]) // self.page_size * self.page_size
                full = (len(head[0]) + new) // self.page_size * self.page_size
                for side, x in enumerate((k, v)):
                    values = torch.cat([head[side], x[b, :new, h].double()])
                    for begin in range(full_before, full, self.page_size):
                        page = slice(begin, begin + self.page_size)
                        values[page] = through_page(values[page].to(self.dtype), self.formats[side], side == 1)
                    head[side] = values

    def attend(
        self,
        layer: int,
        q: Tensor,
        lengths: Tensor | None = None,
        *,
        precision: torch.dtype = torch.float64,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the last tokens of each row, every step in `precision`; padding rows give 0.

        Returns:
            (batch, new, heads, head_dim_v) in precision.
        """
        rows = self.tokens[layer]
        q = hadamard(q.to(precision)) if self.rotate else q
        group = q.shape[2] // len(rows[0])
        out = torch.zeros((*q.shape[:3], rows[0][0][1].shape[1]), dtype=precision)
        for b, row in enumerate(rows):
            new = q.shape[1] if lengths is None else int(lengths[b])
            for h, (k, v) in enumerate(row):
                heads = slice(h * group, (h + 1) * group)
                slopes = None if alibi_slopes is None else alibi_slopes.expand(len(rows), -1)[b, heads]
                out[b, :new, heads] = attention(
                    q[b : b + 1, :new, heads].to(precision),
                    k[None, :, None].to(precision),
                    v[None, :, None].to(precision),
                    causal=True,
                    window_size=window_size,
                    softmax_scale=softmax_scale,
                    softcap=softcap,
                    alibi_slopes=slopes,
                    sinks=None if sinks is None else sinks[heads],
                )[0][0]
        return hadamard(out, inverse=True) if self.rotate else out

    def crop(self, tokens: int | Tensor) -> None:
        """Keeps the first tokens of every row: one number, or (batch,) numbers."""
        limit = torch.finfo(self.dtype).max
        for layer in self.tokens:
            keep = torch.as_tensor(tokens).expand(len(layer)).tolist()
            for row, n in zip(layer, keep, strict=True):
                for head in row:
                    for side, values in enumerate(head):
                        kept = values[:n].clone()
                        tail = kept[len(kept) // self.page_size * self.page_size :]
                        # The page format may have rounded beyond the largest number of the cache's dtype.
                        tail.copy_(torch.where(tail.isinf(), tail, tail.clamp(-limit, limit)))
                        head[side] = kept

    def fork(self) -> PagedCache:
        """A copy."""
        return copy.deepcopy(self)
