"""The paged KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore.cache.checks import check_geometry, check_layer, check_new_tokens, check_query, row_lengths
from lcore.cache.layer import CacheLayer
from lcore.cache.layout import PageLayout, check_page_size, parse_format
from lcore.cache.pool import PagePool
from lcore.errors import require
from lcore.ops.attention import check_scores


class PagedCache:
    """Keys and values of a decoder's layers in pages, for every sequence and kv head its own number of them.

    All pages of all layers and heads are rows of one uint8 tensor. A page holds `page_size` tokens of one kv head in
    `kv_format`; the tokens of a page that is not full yet wait in the model's dtype. A page is written once, when it is
    full, so its bytes do not depend on how the tokens arrived. Forks share pages by reference counts.

    Args:
        num_layers, num_kv_heads, head_dim: the model's geometry; head_dim_v when values differ from keys.
        batch_size: sequences.
        dtype: of keys, values and queries: float32, float16 or bfloat16.
        device: "cpu".
        kv_format: "fp32", "fp16" or "bf16", or a pair of them for keys and values.
        page_size: tokens a page.
        max_bytes: most bytes the pages may take, of this cache and its forks together; None for no limit.
    Raises:
        TypeError, ValueError: arguments. NotImplementedError: formats, devices, rotate and policy that are not there.
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
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "batch_size": batch_size}
        check_geometry(sizes, head_dim_v, dtype, device, rotate, policy, max_bytes)
        check_page_size("PagedCache", page_size)
        k_format, v_format = parse_format("PagedCache", kv_format)
        self.num_layers, self.num_kv_heads, self.batch_size, self.dtype = num_layers, num_kv_heads, batch_size, dtype
        self.layout = PageLayout(page_size, head_dim, head_dim if head_dim_v is None else head_dim_v, k_format, v_format)
        self._pool = PagePool(self.layout, max_bytes)
        self._layers = [CacheLayer(self._pool, batch_size, num_kv_heads, dtype) for _ in range(num_layers)]

    @property
    def kv_format(self) -> tuple[str, str]:
        """Formats of keys and values."""
        return self.layout.k_format, self.layout.v_format

    @property
    def page_size(self) -> int:
        return self.layout.page_size

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Adds new tokens to one layer.

        Args:
            layer: index of the layer.
            k, v: (batch, new, kv_heads, head_dim) and (.., head_dim_v), the cache's dtype, any strides.
            lengths: int64 (batch,), real tokens of each right-padded row; default: all.
        Raises:
            TypeError, ValueError: arguments. MemoryError: max_bytes; then nothing has changed.
        """
        check_layer("append", layer, self.num_layers)
        check_new_tokens(k, v, self.batch_size, self.num_kv_heads, self.layout, self.dtype)
        self._layers[layer].append(k, v, row_lengths("append", lengths, self.batch_size, k.shape[1]))

    def attend(
        self,
        layer: int,
        q: Tensor,
        lengths: Tensor | None = None,
        *,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the tokens appended last: causal among themselves, all older keys visible.

        Args:
            q: (batch, new, heads, head_dim), the cache's dtype; heads is a multiple of kv_heads.
            lengths: int64 (batch,), real tokens of each right-padded row; rows past it give 0.
            window_size, softmax_scale, softcap, alibi_slopes, sinks: as in lcore.attention.
        Returns:
            (batch, new, heads, head_dim_v). Inference only: no gradients.
        """
        check_layer("attend", layer, self.num_layers)
        check_query(q, self.batch_size, self.num_kv_heads, self.layout, self.dtype, alibi_slopes, sinks)
        check_scores("attend", window_size, softmax_scale, softcap)
        counts = row_lengths("attend", lengths, self.batch_size, q.shape[1])
        state = self._layers[layer]
        least, newest = state.shortest(), q.shape[1] if counts is None else int(counts.max())
        require(newest <= least or counts is not None, "attend", "q", f"have at most the {least} cached tokens", newest)
        out, _ = torch.ops.lcore.attention_paged(
            q,
            self._pool.memory,
            state.table,
            state.lengths,
            state.tail_k,
            state.tail_v,
            self.layout.k_format,
            self.layout.v_format,
            self.page_size,
            counts,
            list(window_size),
            self.layout.head_dim**-0.5 if softmax_scale is None else softmax_scale,
            softcap,
            alibi_slopes,
            None if sinks is None else sinks.float().contiguous(),
        )
        return out

    def seen(self, layer: int = 0) -> Tensor:
        """int64 (batch,): tokens each row has in this layer, which is the position of its next one."""
        check_layer("seen", layer, self.num_layers)
        return self._layers[layer].seen.clone()

    def lengths(self, layer: int) -> Tensor:
        """int32 (batch, kv_heads): tokens kept for each head."""
        check_layer("lengths", layer, self.num_layers)
        return self._layers[layer].lengths.clone()

    def reserve(self, tokens: int) -> None:
        """Makes room for this many tokens a row in every layer, those already held included, in one allocation.

        Raises:
            ValueError: tokens < 0. MemoryError: more than max_bytes, or than the machine has; nothing has changed.
        """
        require(tokens >= 0, "PagedCache.reserve", "tokens", "be >= 0", tokens)
        full = tokens // self.page_size
        missing = sum(layer.pages_missing(full) for layer in self._layers)
        for layer in self._layers:
            layer.widen(full)
        self._pool.reserve(missing)

    def crop(self, tokens: int | Tensor) -> None:
        """Keeps the first `tokens` of every row, one number or int64 (batch,), in every layer; shorter ones stay.

        The kept tokens of a page that is cut come back to the tail; pages that fall away are free again. Layers of
        unequal length, as an interrupted forward pass leaves them, are equal after a crop to the shortest.
        """
        rows = torch.as_tensor(tokens, dtype=torch.int64).expand(self.batch_size)
        require(bool((rows >= 0).all()), "PagedCache.crop", "tokens", "be >= 0", rows.tolist())
        for layer in self._layers:
            layer.crop(rows)

    def fork(self) -> PagedCache:
        """A cache with the same tokens that goes its own way: full pages are shared, tails are copied."""
        twin = object.__new__(PagedCache)
        twin.__dict__.update(self.__dict__)
        twin._layers = [layer.fork() for layer in self._layers]
        return twin

    def stats(self) -> dict[str, Any]:
        """What the cache holds.

        Returns:
            bytes: of every tensor of this cache as torch allocated them, the whole pool included (forks share it);
            pool_bytes: of the pool; page_bytes: of one page; pages: pages in use by this cache; free_pages: of the
            pool; tokens: kept over all rows, the mean over layers and heads; bits_per_value: of a full page.
        """
        lengths = sum(int(layer.lengths.sum()) for layer in self._layers)
        own = sum(layer.nbytes for layer in self._layers)
        return {
            "bytes": own + self._pool.memory.untyped_storage().nbytes(),
            "pool_bytes": self._pool.memory.untyped_storage().nbytes(),
            "page_bytes": self.layout.page_bytes,
            "pages": sum(layer.pages for layer in self._layers),
            "free_pages": self._pool.allocator.free_count,
            "tokens": lengths / (self.num_layers * self.num_kv_heads),
            "bits_per_value": self.layout.bits_per_value,
        }

    @staticmethod
    def bytes_per_token(
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        kv_format: str | tuple[str, str] = "bf16",
        page_size: int = 64,
        head_dim_v: int | None = None,
    ) -> float:
        """Bytes of pages that one token of one sequence takes in all layers."""
        k_format, v_format = parse_format("PagedCache.bytes_per_token", kv_format)
        layout = PageLayout(page_size, head_dim, head_dim if head_dim_v is None else head_dim_v, k_format, v_format)
        return num_layers * num_kv_heads * layout.page_bytes / page_size

    def save(self, path: str) -> None:
        raise NotImplementedError("lcore.PagedCache.save: sessions on disk are not there yet; keep the cache in memory")

    @classmethod
    def load(cls, path: str) -> PagedCache:
        raise NotImplementedError("lcore.PagedCache.load: sessions on disk are not there yet; read the prompt again")
