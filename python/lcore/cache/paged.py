"""`lcore.PagedCache`: keys and values of a model's layers, in pages."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

from lcore.cache.checks import MAX_TOKENS, check_int, check_options, check_states, row_counts, row_limits
from lcore.cache.formats import page_layout
from lcore.cache.pool import PagePool
from lcore.cache.reading import LayerReader
from lcore.cache.slots import Slots


class PagedCache(LayerReader):
    """Keys and values of all layers for a batch of sequences, in pages of one pool.

    A page holds `page_size` tokens of one kv head: its K codes, then its V codes, each in its format. It is encoded
    once, when its last token arrives; tokens of a page that is not full yet wait, in the model's dtype, in the tail of
    their (layer, row, head). So what is stored does not depend on how a text was cut into chunks.

    Args:
        num_layers, num_kv_heads, head_dim: geometry of the model. head_dim_v: that of the values, default head_dim;
            both up to 512.
        batch_size: rows, that is sequences.
        dtype: of what is appended and of the queries: float32, float16 or bfloat16.
        device: "cpu".
        kv_format: "fp32", "fp16" or "bf16", or a pair of them for K and V. Rounding is to nearest even.
        rotate: False; a Hadamard rotation before coding is not there yet.
        page_size: tokens a page, 1 to 4096.
        max_bytes: limit on what this cache and its forks hold together; MemoryError before it is exceeded.
        policy: None; eviction is not there yet.

    Raises:
        TypeError, ValueError: arguments. NotImplementedError: what is not there yet. MemoryError: max_bytes or the
        system has no room. A call that raises one of these has changed nothing, and the cache can be used on.

    Memory: the pool grows to half more than it was by copying, so that for a moment both are held; `reserve` makes it
        exact and once. Forks share the pool and its full pages; tables and tails are their own. Pages go back to the
        pool when the last cache that holds them is closed or garbage-collected, the pool to the system with the last
        cache of the family.
    Threads: forks of one family may be used by different threads; one cache by one thread at a time.
    Gradients: none are kept.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        kv_format: str | tuple[str, str] = "bf16",
        rotate: bool = False,
        page_size: int = 64,
        max_bytes: int | None = None,
        policy: Any = None,
        head_dim_v: int | None = None,
    ) -> None:
        layout = page_layout("PagedCache", head_dim, head_dim_v, kv_format, page_size)
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "batch_size": batch_size}
        check_options("PagedCache", sizes, dtype, device, rotate, max_bytes, policy)
        self.num_layers, self.num_kv_heads, self.batch_size = num_layers, num_kv_heads, batch_size
        self.head_dim, self.head_dim_v = layout.head_dim, layout.head_dim_v
        self.dtype, self.device = dtype, torch.device("cpu")
        self.kv_format = (layout.k.name, layout.v.name)
        self.page_size, self.max_bytes = page_size, max_bytes
        pool = PagePool(layout.page_bytes, max_bytes)
        shape = (num_layers, batch_size, num_kv_heads)
        self._slots: Slots | None = Slots.empty("PagedCache", pool, layout, shape, dtype)

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Puts new tokens behind those that a layer holds.

        Args:
            layer: 0 .. num_layers - 1.
            k: (batch, new, kv_heads, head_dim), dtype, any strides. v: (batch, new, kv_heads, head_dim_v).
            lengths: (batch,) int64 or int32, the real tokens of each row when rows are padded on the right. What
                stands behind them is not read.

        Raises:
            MemoryError: the pages do not fit into max_bytes; they are taken before anything is written.
        """
        slots = self._layer("PagedCache.append", layer)
        batch, heads = self.batch_size, self.num_kv_heads
        names = "batch, new, kv_heads, head_dim"
        check_states("PagedCache.append", "k", k, self.dtype, (batch, "*", heads, self.head_dim), names)
        check_states("PagedCache.append", "v", v, self.dtype, (batch, k.shape[1], heads, self.head_dim_v), names + "_v")
        counts = row_counts("PagedCache.append", lengths, batch, k.shape[1])
        slots.append("PagedCache.append", layer, k.detach(), v.detach(), counts)

    def seen(self, layer: int = 0) -> Tensor:
        """(batch,) int64: tokens ever appended to a layer in each row, the position of the next one."""
        return self._layer("PagedCache.seen", layer).lengths[layer, :, 0].to(torch.int64)

    def lengths(self, layer: int) -> Tensor:
        """(batch, kv_heads) int32: tokens that a layer holds, a copy."""
        return self._layer("PagedCache.lengths", layer).lengths[layer].clone()

    def reserve(self, tokens: int) -> None:
        """Makes room for every row to hold `tokens` tokens in all layers, in one exact allocation.

        Forks draw on the same room. Raises MemoryError when it does not fit into max_bytes.
        """
        slots = self._open("PagedCache.reserve")
        check_int("PagedCache.reserve", "tokens", tokens, 0, MAX_TOKENS)
        slots.reserve("PagedCache.reserve", tokens)

    def crop(self, n: int | Tensor) -> None:
        """Keeps the first n tokens of every row in every layer; what holds no more than n is left as it is.

        So layers of unequal length, after a step that ended in the middle of the model, become equal again. Kept tokens
        of a page that is cut return to the tail with the values that the page had, and encode to the same bytes.

        Args:
            n: tokens to keep, one number or (batch,) int64 or int32.
        """
        self._open("PagedCache.crop").crop(row_limits("PagedCache.crop", n, self.batch_size))

    def fork(self) -> PagedCache:
        """A cache with the same content that goes its own way: full pages are shared, tables and tails are copied.

        Raises MemoryError when the copies do not fit into max_bytes, which holds for the family together.
        """
        slots = self._open("PagedCache.fork").fork("PagedCache.fork")
        fork = object.__new__(type(self))
        fork.__dict__.update(self.__dict__, _slots=slots)
        return fork

    def stats(self) -> dict[str, int | float]:
        """What the cache holds, in bytes as torch has allocated them.

        Returns:
            bytes: of all tensors that this cache refers to: pool_bytes (shared by the family, counted whole in each
                fork) + tail_bytes + table_bytes. tokens: of all rows, each counted in its longest layer and head.
            pages: that this cache holds, of all layers and heads, page_bytes each. free_pages: of the pool, that no
                cache holds.
            bits_per_value: that one value takes in a page, padding included.
        """
        return self._open("PagedCache.stats").stats()

    @staticmethod
    def bytes_per_token(
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        kv_format: str | tuple[str, str] = "bf16",
        *,
        head_dim_v: int | None = None,
        page_size: int = 64,
    ) -> int:
        """Bytes that a token of one row takes in full pages of all layers, rounded up."""
        check_int("PagedCache.bytes_per_token", "num_layers", num_layers, 1)
        check_int("PagedCache.bytes_per_token", "num_kv_heads", num_kv_heads, 1)
        layout = page_layout("PagedCache.bytes_per_token", head_dim, head_dim_v, kv_format, page_size)
        return -(-num_layers * num_kv_heads * layout.page_bytes // page_size)

    def save(self, path: str | os.PathLike[str]) -> NoReturn:
        """Not there yet."""
        raise NotImplementedError("lcore.PagedCache.save: no sessions on disk yet; keep the cache, or fork it")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NoReturn:
        """Not there yet."""
        raise NotImplementedError("lcore.PagedCache.load: no sessions on disk yet; append the tokens again")

    def close(self) -> None:
        """Gives pages and memory back; the cache cannot be used afterwards. Closing twice does nothing."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release()

    def __del__(self) -> None:
        # Nothing to close after an __init__ that refused; no one to give pages to when the interpreter ends.
        if getattr(self, "_slots", None) is not None and not sys.is_finalizing():
            self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("lcore.PagedCache: a cache cannot be copied or pickled; use fork()")
