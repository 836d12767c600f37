"""Caches beside their model in plain torch, random tokens for them, and a look inside."""

from __future__ import annotations

from typing import Any

import torch
from tolerance import assert_close
from torch import Tensor

import lcore
from lcore.reference.cache import PagedCache as CacheModel

DTYPE_OF = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAME_OF = {dtype: name for name, dtype in DTYPE_OF.items()}


def random_kv(
    batch: int,
    new: int,
    kv_heads: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    return torch.randn(batch, new, kv_heads, head_dim).to(dtype), torch.randn(batch, new, kv_heads, head_dim_v).to(
        dtype
    )


class Twins:
    """A cache and its model; every call goes to both, and what they return is compared."""

    def __init__(self, layers: int = 1, kv_heads: int = 2, head_dim: int = 16, **options: Any) -> None:
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.head_dim_v = options.get("head_dim_v", head_dim)
        self.batch = options.get("batch_size", 1)
        self.dtype = options.setdefault("dtype", torch.float32)
        options.setdefault("kv_format", NAME_OF[self.dtype])
        self.cache = lcore.PagedCache(layers, kv_heads, head_dim, **options)
        for name in ("max_bytes", "select"):  # which change no value of the model
            options.pop(name, None)
        self.model = CacheModel(layers, kv_heads, head_dim, **options)

    def append(self, new: int, lengths: Tensor | None = None, layer: int | None = None) -> None:
        """Random tokens; padding is NaN, which nobody may read."""
        for i in range(self.layers) if layer is None else [layer]:
            k, v = random_kv(self.batch, new, self.kv_heads, self.head_dim, self.head_dim_v, self.dtype)
            if lengths is not None:
                for b, n in enumerate(lengths.tolist()):
                    k[b, n:], v[b, n:] = torch.nan, torch.nan
            self.cache.append(i, k, v, lengths=lengths)
            self.model.append(i, k, v, lengths=lengths)

    def check(
        self,
        new: int,
        group: int = 1,
        lengths: Tensor | None = None,
        layer: int = 0,
        *,
        slack_ulp: float = 16,
        **arguments: Any,
    ) -> Tensor:
        """attend() with random queries for the last `new` tokens, against the model; returns what the cache gave."""
        q = torch.randn(self.batch, new, self.kv_heads * group, self.head_dim).to(self.dtype)
        if lengths is not None:
            for b, n in enumerate(lengths.tolist()):
                q[b, n:] = torch.nan
        got = self.cache.attend(layer, q, lengths=lengths, **arguments)
        want = self.model.attend(layer, q, lengths=lengths, **arguments)
        working = self.model.attend(layer, q, lengths=lengths, precision=torch.float32, **arguments)
        assert got.dtype == self.dtype
        # Few values: the largest error of either side is one draw.
        assert_close(got, want, working.to(self.dtype), "attend", slack_ulp=slack_ulp)
        if lengths is not None:
            for b, n in enumerate(lengths.tolist()):
                assert not got[b, n:].any(), "padding rows must be 0"
        return got

    def crop(self, tokens: int | Tensor) -> None:
        self.cache.crop(tokens)
        self.model.crop(tokens)

    def evict(self, share: float, layer: int = 0) -> None:
        """Drops about this share of the tokens of a layer, other ones in each slot."""
        keep = torch.rand(self.batch, self.kv_heads, int(self.cache.lengths(layer).max())) >= share
        self.cache.evict(layer, keep)
        self.model.evict(layer, keep)

    def fork(self) -> Twins:
        twin = object.__new__(Twins)
        twin.__dict__.update(self.__dict__)
        twin.cache, twin.model = self.cache.fork(), self.model.fork()
        return twin

    def check_lengths(self) -> None:
        for layer in range(self.layers):
            assert torch.equal(self.cache.lengths(layer), self.model.lengths(layer))
            assert torch.equal(self.cache.seen(layer), self.model.seen[layer])


def pool_of(cache: lcore.PagedCache) -> Tensor:
    """(pages, page_bytes): the bytes of every page."""
    return cache._slots.pool.data


def allocator_of(cache: lcore.PagedCache) -> Any:
    return cache._slots.pool.allocator


def inside(cache: lcore.PagedCache, layer: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Page table, lengths and both tails of a layer."""
    slots = cache._slots.layers[layer]
    return slots.table, slots.lengths, slots.tail_k, slots.tail_v


def contents(cache: lcore.PagedCache, layer: int = 0) -> list[Tensor]:
    """Codes of the full pages (k, v) and the used tails (k, v), as bytes, slot by slot, wherever the pages are."""
    table, lengths, tail_k, tail_v = inside(cache, layer)
    k_bytes, v_bytes = (
        cache.page_size * tail.shape[-1] * DTYPE_OF[name].itemsize
        for tail, name in zip((tail_k, tail_v), cache.kv_format, strict=True)
    )
    v_begin = -(-k_bytes // 64) * 64
    found = []
    for b in range(lengths.shape[0]):
        for h in range(lengths.shape[1]):
            full, rest = divmod(int(lengths[b, h]), cache.page_size)
            pages = pool_of(cache)[table[b, h, :full].long()]
            found += [pages[:, :k_bytes], pages[:, v_begin : v_begin + v_bytes]]
            found += [tail[b, h, :rest].contiguous().view(torch.uint8) for tail in (tail_k, tail_v)]
    return found


def assert_same_contents(a: lcore.PagedCache, b: lcore.PagedCache, layer: int = 0) -> None:
    assert torch.equal(a.lengths(layer), b.lengths(layer))
    for i, (x, y) in enumerate(zip(contents(a, layer), contents(b, layer), strict=True)):
        assert torch.equal(x, y), f"slot {i // 4}: the {('pages of', 'tail of')[i % 4 // 2]} {'kv'[i % 2]} differ"


def poison(*caches: lcore.PagedCache) -> None:
    """Fills what these caches, all of one pool, do not use: pages and tails with NaN, tables with ids far outside."""
    pool, used = pool_of(caches[0]), set()
    for cache in caches:
        for layer in range(cache.num_layers):
            table, lengths, tail_k, tail_v = inside(cache, layer)
            for b in range(lengths.shape[0]):
                for h in range(lengths.shape[1]):
                    full, rest = divmod(int(lengths[b, h]), cache.page_size)
                    used.update(table[b, h, :full].tolist())
                    table[b, h, full:] = 2**31 - 1
                    tail_k[b, h, rest:], tail_v[b, h, rest:] = torch.nan, torch.nan
    free = [i for i in range(pool.shape[0]) if i not in used]
    pool[free] = 0xFF  # every float of ones only is a NaN


def all_pages_are_free(allocator: Any) -> bool:
    return allocator.free_count == allocator.num_pages
