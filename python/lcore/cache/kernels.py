"""The ops that touch pages, on one layer of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.cache.formats import PageLayout
from lcore.cache.layer import Layer
from lcore.errors import dtype_name
from lcore.positions import Rotation


def append_(pool: Tensor, layer: Layer, k: Tensor, v: Tensor, layout: PageLayout, counts: Tensor | None) -> None:
    """Writes k and v behind each slot's tokens and moves its length.

    A page is encoded once, when it is full; the tokens behind the last full page go to the tail.
    The table must name a page for every page that fills up.

    Args:
        pool: (num_pages, page_bytes) uint8.
        k: (batch, new, kv_heads, head_dim); v: (batch, new, kv_heads, head_dim_v); any strides, the tails' dtype.
        counts: (batch,) int64, real tokens of right-padded rows; None for all.
    """
    torch.ops.lcore.cache_append_.default(
        pool,
        layer.table,
        layer.lengths,
        layer.tail_k,
        layer.tail_v,
        k,
        v,
        layout.k.name,
        layout.v.name,
        layout.page_size,
        counts,
        layer.plain_pages,
        layout.plain.parts,
    )


@torch.library.register_fake("lcore::cache_append_")
def _append_fake(*args: object) -> None:
    """Nothing is returned, and a fake pool has no bytes to write."""


def compact_(pool: Tensor, layer: Layer, layout: PageLayout, new_table: Tensor, keep: Tensor, offsets: Tensor) -> None:
    """Moves the tokens to keep to the front of each slot, in order, and sets its table and length.

    Bits stay where a token stays in pages or in the tail. One that returns from a page to the tail is as the page had
    it, and finite if it was; one that comes from the tail to a full page is rounded, for its first time.

    Args:
        new_table: (batch, kv_heads, width) int32, a page for each full page of kept tokens: the slot's own page of
            this index, or a page that no slot reads. Pages of other slots are never written.
        keep: int32, the tokens that stay of one slot after the other, rising; offsets: (batch * kv_heads + 1,) int64,
            where each slot's begin.
    """
    torch.ops.lcore.cache_compact_.default(
        pool,
        layer.table,
        layer.lengths,
        layer.tail_k,
        layer.tail_v,
        new_table,
        keep,
        offsets,
        layout.k.name,
        layout.v.name,
        layout.page_size,
    )


@torch.library.register_fake("lcore::cache_compact_")
def _compact_fake(*args: object) -> None:
    """As for append."""


def attend(
    pool: Tensor,
    layer: Layer,
    q: Tensor,
    layout: PageLayout,
    counts: Tensor | None,
    window_size: tuple[int, int],
    softmax_scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rope: Rotation | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of q (batch, new, heads, head_dim), the last tokens of each row, over all that a layer holds.

    Returns: out (batch, new, heads, head_dim_v) and the log-sum-exp of its scores, float32 (batch, heads, new).
    """
    return torch.ops.lcore.attention_paged.default(
        q,
        pool,
        layer.table,
        layer.lengths,
        layer.tail_k,
        layer.tail_v,
        layout.k.name,
        layout.v.name,
        layout.page_size,
        counts,
        list(window_size),
        softmax_scale,
        softcap,
        alibi_slopes,
        sinks,
        layer.plain_pages,
        layout.plain.parts,
        *_rope_arguments(rope),
        layer.places,
    )


def key_mass(
    pool: Tensor,
    layer: Layer,
    q: Tensor,
    layout: PageLayout,
    counts: Tensor | None,
    window_size: tuple[int, int],
    softmax_scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    lse: Tensor,
    reduction: str,
    rope: Rotation | None,
) -> Tensor:
    """The attention that each key of a layer receives from q: (batch, kv_heads, tokens of the longest head)."""
    return torch.ops.lcore.key_mass_paged.default(
        q,
        pool,
        layer.table,
        layer.lengths,
        layer.tail_k,
        layer.tail_v,
        layout.k.name,
        layout.v.name,
        layout.page_size,
        counts,
        list(window_size),
        softmax_scale,
        softcap,
        alibi_slopes,
        lse,
        reduction,
        int(layer.host_lengths.max()),
        layer.plain_pages,
        layout.plain.parts,
        *_rope_arguments(rope),
    )


def page_bounds(
    pool: Tensor, layer: Layer, layout: PageLayout, first: int, last: int, dtype: torch.dtype, rope: Rotation | None
) -> Tensor:
    """Least and greatest key channels of pages first .. last - 1: (batch, kv_heads, last - first, 2, head_dim)."""
    return torch.ops.lcore.page_bounds_paged.default(
        pool,
        layer.table,
        layer.lengths,
        layer.tail_k,
        layer.tail_v,
        layout.k.name,
        layout.v.name,
        layout.page_size,
        first,
        last,
        dtype_name(dtype),
        layer.plain_pages,
        layout.plain.parts,
        *_rope_arguments(rope),
    )


def _rope_arguments(rope: Rotation | None) -> tuple[Tensor | None, float, bool]:
    """inv_freq, attention_scaling and interleaved of keys that are stored before RoPE."""
    return (None, 1.0, False) if rope is None else (rope.frequencies, rope.attention_scaling, rope.interleaved)
