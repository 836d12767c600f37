"""The paged cache as what it means: for every (layer, sequence, kv head) a list of tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lcore.positions import Rotation
from lcore.reference.attention import attention
from lcore.reference.hadamard import hadamard
from lcore.reference.page_format import through_page
from lcore.reference.rope import rope

_PLAIN = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class PagedCache:
    """The values that lcore.PagedCache holds and attends to, without pages, tables or shared memory.

    A token waits in the cache's dtype until its page_size neighbours are there, and goes through the page format then,
    once. A page of values that crop cuts open returns its tokens as they were rounded; one of codes, as they came. With
    rope, keys are held before it and read as rotated to their places in the list, the last query to the last place.
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
        skip_layers: Sequence[int] = (),
        fp_prefix: int = 0,
        rope: Rotation | None = None,
    ) -> None:
        names = (kv_format, kv_format) if isinstance(kv_format, str) else kv_format
        self.dtype, self.page_size, self.rotate, self.rope = dtype, page_size, rotate, rope
        self.formats = names
        self.skip_layers, self.fp_prefix = skip_layers, fp_prefix
        dims = (head_dim, head_dim if head_dim_v is None else head_dim_v)
        # tokens[layer][row][head] = [k (n, head_dim), v (n, head_dim_v)], float64
        self.tokens = [
            [
                [[torch.empty((0, dim), dtype=torch.float64) for dim in dims] for _ in range(num_kv_heads)]
                for _ in range(batch_size)
            ]
            for _ in range(num_layers)
        ]
        self.raw = copy.deepcopy(self.tokens)  # the same as they came
        # positions[layer][row][head] (n,): which of the tokens seen they are
        self.positions = [[[torch.arange(0) for _ in row] for row in layer] for layer in self.tokens]
        self.seen = torch.zeros(num_layers, batch_size, dtype=torch.int64)

    def lengths(self, layer: int) -> Tensor:
        """int32 (batch, kv_heads)."""
        return torch.tensor([[len(head[0]) for head in row] for row in self.tokens[layer]], dtype=torch.int32)

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """k (batch, new, kv_heads, head_dim), v (.., head_dim_v); lengths (batch,) real tokens of each row."""
        if self.rotate:
            k, v = hadamard(k), hadamard(v)
        for b, row in enumerate(self.tokens[layer]):
            new = k.shape[1] if lengths is None else int(lengths[b])
            seen = int(self.seen[layer, b])
            self.seen[layer, b] += new
            for h, head in enumerate(row):
                self.positions[layer][b][h] = torch.cat([self.positions[layer][b][h], seen + torch.arange(new)])
                full_before = len(head[0]) // self.page_size * self.page_size
                full = (len(head[0]) + new) // self.page_size * self.page_size
                for side, x in enumerate((k, v)):
                    values = torch.cat([head[side], x[b, :new, h].double()])
                    raw = self.raw[layer][b][h]
                    raw[side] = torch.cat([raw[side][: len(head[side])], x[b, :new, h].double()])
                    for begin in range(full_before, full, self.page_size):
                        page = slice(begin, begin + self.page_size)
                        form = self._format(layer, begin, side)
                        values[page] = through_page(values[page].to(self.dtype), form, side == 1)
                    head[side] = values

    def _format(self, layer: int, begin: int, side: int) -> str:
        """Of the page at token `begin`."""
        plain = layer in self.skip_layers or begin < self.fp_prefix
        return _PLAIN[self.dtype] if plain else self.formats[side]

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
                    self._turned(q[b : b + 1, :new, heads].to(precision), len(k) - new),
                    self._turned(k[None, :, None].to(precision), 0),
                    v[None, :, None].to(precision),
                    causal=True,
                    window_size=window_size,
                    softmax_scale=softmax_scale,
                    softcap=softcap,
                    alibi_slopes=slopes,
                    sinks=None if sinks is None else sinks[heads],
                )[0][0]
        return hadamard(out, inverse=True) if self.rotate else out

    def _turned(self, x: Tensor, first: int) -> Tensor:
        """x (1, n, heads, head_dim) at places first, first + 1, ..."""
        if self.rope is None:
            return x
        places, turn = first + torch.arange(x.shape[1]), self.rope
        scaling, interleaved = turn.attention_scaling, turn.interleaved
        return rope(x, places, turn.frequencies, attention_scaling=scaling, interleaved=interleaved)

    def crop(self, tokens: int | Tensor) -> None:
        """Takes what stands behind the first tokens seen of every row: one number, or (batch,) numbers."""
        for layer, rows in enumerate(self.positions):
            for b, n in enumerate(torch.as_tensor(tokens).expand(len(rows)).tolist()):
                for h, positions in enumerate(rows[b]):
                    self._keep(layer, b, h, positions < n)
                self.seen[layer, b] = min(n, int(self.seen[layer, b]))

    def can_crop(self, tokens: int | Tensor) -> bool:
        """Whether all that crop takes away is there, or all that is there is taken away."""
        for layer, rows in enumerate(self.positions):
            for b, n in enumerate(torch.as_tensor(tokens).expand(len(rows)).tolist()):
                taken = max(0, int(self.seen[layer, b]) - n)
                if n > 0 and any(int((positions >= n).sum()) < taken for positions in rows[b]):
                    return False
        return True

    def unbroken(self, layer: int) -> Tensor:
        """(batch, kv_heads): tokens at the end between which none is missing, up to the last one seen."""
        ages = [
            [int(seen) - 1 - p for p in row] for seen, row in zip(self.seen[layer], self.positions[layer], strict=True)
        ]
        return torch.tensor([[int((age.flip(0) == torch.arange(len(age))).sum()) for age in row] for row in ages])

    def evict(self, layer: int, keep: Tensor) -> None:
        """Keeps the tokens that keep (batch, kv_heads, tokens) names."""
        for b, row in enumerate(self.positions[layer]):
            for h, positions in enumerate(row):
                self._keep(layer, b, h, keep[b, h, : len(positions)])

    def _keep(self, layer: int, b: int, h: int, mask: Tensor) -> None:
        head, limit = self.tokens[layer][b][h], torch.finfo(self.dtype).max
        coded = torch.arange(len(mask))[mask] < len(mask) // self.page_size * self.page_size
        in_page = torch.arange(int(mask.sum())) < int(mask.sum()) // self.page_size * self.page_size
        self.positions[layer][b][h] = self.positions[layer][b][h][mask]
        raw = self.raw[layer][b][h]
        for side, values in enumerate(head):
            kept, raw[side] = values[mask], raw[side][mask]
            if self.formats[side] not in _PLAIN.values():  # whole pages go and stay; the tail is as it came
                head[side] = torch.where(in_page[:, None], kept, raw[side])
                continue
            fresh = through_page(kept.to(self.dtype), self.formats[side], side == 1)
            kept = torch.where((in_page & ~coded)[:, None], fresh, kept)
            # The page format may have rounded beyond the largest number of the cache's dtype.
            bounded = torch.where(kept.isinf(), kept, kept.clamp(-limit, limit))
            head[side] = torch.where(in_page[:, None], kept, bounded)

    def fork(self) -> PagedCache:
        """A copy."""
        return copy.deepcopy(self)
