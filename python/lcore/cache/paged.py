"""`lcore.PagedCache`: keys and values of a model's layers, in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcore.cache import sessions
from lcore.cache.accounts import stats
from lcore.cache.checks import check_int, check_options, check_states, row_counts
from lcore.cache.formats import page_layout
from lcore.cache.key_rope import check_rope
from lcore.cache.overflow import Folder, Overflow, overflow_folder
from lcore.cache.policies.base import Policy, check_policy
from lcore.cache.pool import PagePool
from lcore.cache.reading import LayerReader
from lcore.cache.selection.base import Selection, check_selection
from lcore.cache.sessions import Path, Strings
from lcore.cache.slots import Slots
from lcore.ops.hadamard import hadamard
from lcore.positions import Rotation


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
        kv_format: "fp32", "fp16", "bf16", "fp8", "int8", "int4" or "int2", or a pair of them for K and V; what they
            mean is told by `lcore.cache.formats.Format`. Rounding is to nearest even.
        rotate: applies `lcore.hadamard` to q, k and v, and its inverse to the output: what is cached is rotated, so
            that outlier channels do not set the scale of coded pages. Products are the same but for rounding.
        skip_layers: layers whose pages hold values of dtype where kv_format is coded. fp_prefix: so many tokens at the
            begin of every slot, attention sinks among them, do too, in whole pages; they are never evicted.
        page_size: tokens a page, 1 to 4096; 16, 32, 64, 128 or 256 where pages are coded (fp8 and integers).
        max_bytes: limit on what this cache and its forks hold in memory together; MemoryError before it is exceeded.
        overflow: a folder on a disk, or True for $TMPDIR or else /var/tmp: pages that max_bytes leaves no room for are
            in a file there, without a name, that is gone with the cache. Those used last stay in memory, and what a
            call reads is fetched. Needs max_bytes, and Linux.
        rope: keys are given and stored before RoPE, and so are queries given: `attend` and `key_mass` read key i of a
            head as rotated to position i, its place in the cache, and the last query of a head that holds m tokens as
            rotated to m - 1. Where tokens were evicted, the others close up. A `lcore.positions.Rotation`, or one or
            None for each layer; not with rotate. None: RoPE is the caller's.
        policy: of `lcore.policies`, or one's own: `attend` asks it what to drop. Forks have it too. None keeps all.
        select: of `lcore.selection`, or one's own: which pages `attend` reads of those that are kept. Forks have it
            too. With rope page_size must be a multiple of 16. None reads all.

    Raises:
        TypeError, ValueError: arguments. NotImplementedError: what is not there yet. MemoryError: max_bytes or the
        system has no room. OSError: the folder or the disk of overflow. A call that raises one of these has changed
        nothing, and the cache can be used on.

    Memory: the pool grows to half more than it was by copying, so that for a moment both are held; `reserve` makes it
        exact and once. Forks share the pool and its full pages; tables and tails are their own. Pages go back to the
        pool when the last cache that holds them is closed or garbage-collected, the pool to the system with the last
        cache of the family. With overflow the pool grows without a copy; while a call works, what it reads of one head
        is in memory even where that alone exceeds max_bytes.
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
        overflow: Folder = None,
        policy: Policy | None = None,
        select: Selection | None = None,
        head_dim_v: int | None = None,
        skip_layers: Sequence[int] = (),
        fp_prefix: int = 0,
        rope: Rotation | Sequence[Rotation | None] | None = None,
    ) -> None:
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "batch_size": batch_size}
        check_options("PagedCache", sizes, dtype, device, rotate, max_bytes)
        plain: dict[str, Any] = {"skip_layers": skip_layers, "fp_prefix": fp_prefix, "dtype": dtype}
        layout = page_layout("PagedCache", head_dim, head_dim_v, kv_format, page_size, num_layers=num_layers, **plain)
        check_policy("PagedCache", policy, num_layers, num_kv_heads, layout)
        check_selection("PagedCache", select, rope, page_size)
        self.rope = check_rope("PagedCache", rope, num_layers, head_dim, rotate=rotate, policy=policy)
        self.num_layers, self.num_kv_heads, self.batch_size = num_layers, num_kv_heads, batch_size
        self.head_dim, self.head_dim_v = layout.head_dim, layout.head_dim_v
        self.dtype, self.device = dtype, torch.device("cpu")
        self.kv_format = (layout.k.name, layout.v.name)
        self.page_size, self.max_bytes, self.rotate, self.policy = page_size, max_bytes, rotate, policy
        self._select, self.skip_layers, self.fp_prefix = select, tuple(skip_layers), fp_prefix
        self.overflow = overflow_folder("PagedCache", overflow, max_bytes)
        pool = PagePool(layout.page_bytes, max_bytes, Overflow.of("PagedCache", self.overflow, layout.page_bytes))
        shape = (num_layers, batch_size, num_kv_heads)
        self._slots = Slots.empty("PagedCache", pool, layout, shape, dtype)

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
        k, v = k.detach(), v.detach()
        if self.rotate:
            k, v = hadamard(k), hadamard(v)
        slots.append("PagedCache.append", layer, k, v, counts)

    @property
    def select(self) -> Selection | None:
        """Which pages `attend` reads. It may be set anew between calls; what was known of pages is then forgotten."""
        return self._select

    @select.setter
    def select(self, select: Selection | None) -> None:
        check_selection("PagedCache", select, self.rope, self.page_size)
        self._open("PagedCache.select").forget_index()
        self._select = select

    def seen(self, layer: int = 0) -> Tensor:
        """(batch,) int64: tokens appended to a layer in each row, evicted or not: the next one's place in the text."""
        return self._layer("PagedCache.seen", layer).seen[layer].clone()

    def lengths(self, layer: int) -> Tensor:
        """(batch, kv_heads) int32: tokens that a layer holds, a copy."""
        return self._layer("PagedCache.lengths", layer).lengths[layer].clone()

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
            bytes: in memory, of all tensors that this cache refers to: pool_bytes (shared by the family, counted whole
                in each fork) + tail_bytes + table_bytes + score_bytes (what a policy remembers)
                + index_bytes (what a selection knows of pages).
            file_bytes: that the file of overflow takes of the disk, whatever part of it is in pool_bytes too.
            tokens: of all rows, each counted in its longest layer and head.
            pages: that this cache holds, of all layers and heads, page_bytes each. free_pages: of the pool, that no
                cache holds.
            bits_per_value: that one value takes in a page, padding included.
            dropped_mass: the largest `dropped_mass` of any query so far; 0 without a selection that bounds it.
        """
        return stats(self._open("PagedCache.stats"))

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

    def save(self, path: Path, *, tokens: Sequence[Tensor] | None = None, metadata: Strings | None = None) -> None:
        """Writes the cache to one file, which appears whole or not at all; see `lcore.cache.sessions.save`."""
        sessions.save(self, path, tokens, metadata)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        metadata: Strings | None = None,
        max_bytes: int | None = None,
        overflow: Folder = None,
    ) -> PagedCache:
        """The cache that `save` wrote, after every byte has been checked; see `lcore.cache.sessions.load`."""
        return sessions.load(cls, path, metadata, max_bytes, overflow)
