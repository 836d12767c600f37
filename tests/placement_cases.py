"""Caches that may hold little in memory beside equal ones that may hold all, and what the system says of their file."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_cases import inside, pool_of
from numpy.typing import NDArray
from torch import Tensor

import lcore

_LIBC = ctypes.CDLL(None, use_errno=True)
SYSTEM_PAGE = os.sysconf("SC_PAGESIZE")


class Pair:
    """A cache with `hot` bytes for its pages in memory, and one without a limit; every call goes to both.

    forks: how many there may be at once: max_bytes has room for their tails too.
    """

    def __init__(
        self, layers: int = 2, kv_heads: int = 2, head_dim: int = 64, *, hot: int, forks: int = 0, **options: Any
    ) -> None:
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.batch = options.get("batch_size", 1)
        self.plain = lcore.PagedCache(layers, kv_heads, head_dim, **options)
        self.most = int(self.plain.stats()["bytes"]) * (1 + forks) + hot
        self.placed = lcore.PagedCache(layers, kv_heads, head_dim, **options, max_bytes=self.most, overflow=True)

    @property
    def both(self) -> tuple[lcore.PagedCache, lcore.PagedCache]:
        return self.plain, self.placed

    def step(self, new: int, lengths: Tensor | None = None, **arguments: Any) -> None:
        """Appends to every layer and attends: the same bits, and never more in memory than max_bytes."""
        for layer in range(self.layers):
            k, v = (torch.randn(self.batch, new, self.kv_heads, self.head_dim).bfloat16() for _ in range(2))
            for cache in self.both:
                cache.append(layer, k, v, lengths)
            self.check_bytes()
            self.check(layer, new, lengths, **arguments)

    def check(self, layer: int, new: int, lengths: Tensor | None = None, **arguments: Any) -> None:
        q = torch.randn(self.batch, new, 2 * self.kv_heads, self.head_dim).bfloat16()
        want, got = (cache.attend(layer, q, lengths, return_lse=True, **arguments) for cache in self.both)
        assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
        self.check_bytes()

    def check_bytes(self) -> None:
        stats = self.placed.stats()
        assert stats["bytes"] <= self.most
        assert resident_bytes(pool_of(self.placed)) <= stats["pool_bytes"]

    def check_contents(self) -> None:
        """The bits of every page in use."""
        for layer in range(self.layers):
            (a, lengths, *_), (b, *_) = (inside(cache, layer) for cache in self.both)
            for row, head in np.ndindex(*lengths.shape):
                full = int(lengths[row, head]) // self.plain.page_size
                want, got = (
                    _pages(cache, table[row, head, :full]) for cache, table in zip(self.both, (a, b), strict=True)
                )
                assert torch.equal(want, got)

    def fork(self) -> Pair:
        other = object.__new__(Pair)
        other.__dict__.update(self.__dict__)
        other.plain, other.placed = self.plain.fork(), self.placed.fork()
        return other


def _pages(cache: lcore.PagedCache, ids: Tensor) -> Tensor:
    """Copies of these pages."""
    with cache._slots.pool.using(ids.numpy()):
        return pool_of(cache)[ids.long()]


def resident_bytes(memory: Tensor | NDArray[np.uint8]) -> int:
    """Of a mapped file, in the system's page cache, whether this process has it mapped or not."""
    address = memory.data_ptr() if isinstance(memory, Tensor) else memory.ctypes.data
    found = (ctypes.c_ubyte * -(-memory.nbytes // SYSTEM_PAGE))()
    assert _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(memory.nbytes), found) == 0
    return int((np.frombuffer(found, np.uint8) & 1).sum()) * SYSTEM_PAGE


def mapped_bytes(memory: Tensor) -> int:
    """Rss of the mapping that begins with this tensor."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(f"{memory.data_ptr():x}-") for line in lines)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def open_files() -> tuple[int, int]:
    """Descriptors, and mappings of files without a name."""
    return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("(deleted)")
