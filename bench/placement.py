"""Attention over a cache several times larger than what may be in memory: ``python -m bench.placement [--json FILE]``.

`PagedCache(max_bytes=, overflow=)` beside the same cache all in memory; they take turns. A step is one new token's
attention in every layer: over all that it holds, or over some pages of each head, as a selection would choose them, of
which a part is the same from step to step. What a step fetches is what the kernel counts for this process. The disk's
own speed is measured on a file of the same folder, dropped from memory: in order, and page by page in any order.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lcore
from bench.decode import FILL_CHUNK, Geometry
from bench.machine import Row, peaks, result, write_json
from bench.tables import show
from bench.timer import median_seconds
from lcore.cache import kernels, parts

PAGE_SIZE = 64
Places: TypeAlias = NDArray[np.int64]


def disk_gbytes(folder: str, size: int, block: int, ordered: bool) -> float:
    """GB/s of reads of `block` bytes of a file of `size` bytes that is not in memory."""
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor = file.fileno()
        for begin in range(0, size, 8 << 20):
            os.pwrite(descriptor, os.urandom(8 << 20), begin)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL if ordered else os.POSIX_FADV_RANDOM)
        blocks = np.arange(size // block)
        blocks = blocks if ordered else np.random.default_rng(0).permutation(blocks)[: len(blocks) // 8]
        start = time.perf_counter()
        for index in blocks.tolist():
            os.pread(descriptor, block, index * block)
        return len(blocks) * block / (time.perf_counter() - start) / 1e9


def fetched_bytes() -> int:
    """What this process has had read from disks so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


class Steps:
    """One new token's attention in all layers of a cache; counts what its steps fetch.

    chosen: for each step and layer the pages to read; without it all are read.
    """

    def __init__(self, cache: lcore.PagedCache, q: Tensor, chosen: list[list[Places]] | None) -> None:
        self.fetched: list[int] = []
        self._cache, self._q = cache, q
        self._chosen = None if chosen is None else iter(chosen)

    def __call__(self) -> None:
        before = fetched_bytes()
        if self._chosen is None:
            for layer in range(self._cache.num_layers):
                self._cache.attend(layer, self._q)
        else:
            for layer, places in enumerate(next(self._chosen)):
                self._attend_chosen(layer, places)
        self.fetched.append(fetched_bytes() - before)

    def _attend_chosen(self, layer: int, places: Places) -> None:
        slots = self._cache._slots
        assert slots is not None
        pages, view = slots.snapshot(layer)
        table = torch.from_numpy(np.take_along_axis(view.host_table, places, -1))
        lengths = torch.full_like(view.lengths, places.shape[-1] * PAGE_SIZE)
        few = view._replace(table=table, lengths=lengths, host_table=table.numpy(), host_lengths=lengths.numpy())

        def kernel(part: parts.Queries) -> tuple[Tensor, Tensor]:
            scores = ((-1, -1), self._q.shape[-1] ** -0.5, 0.0, None, None, None)
            return kernels.attend(pages, part.view, part.q, slots.layout, None, *scores)

        parts.attend(slots.pool, slots.layout, parts.Queries(few, self._q, None, None, None), -1, kernel)


def selections(steps: int, layers: int, kv_heads: int, total: int, count: int, reuse: float) -> list[list[Places]]:
    """For each step and layer (1, kv_heads, count) of `total` pages: of those of the step before, `reuse` of them."""
    generator = np.random.default_rng(0)

    def following(before: NDArray[np.int64]) -> NDArray[np.int64]:
        old = generator.permutation(before)[: round(reuse * count)]
        others = np.setdiff1d(np.arange(total), old)
        return np.sort(np.concatenate([old, generator.permutation(others)[: count - len(old)]]))

    chosen = [[[generator.permutation(total)[:count] for _ in range(kv_heads)] for _ in range(layers)]]
    for _ in range(steps - 1):
        chosen.append([[following(head) for head in layer] for layer in chosen[-1]])
    return [[np.stack(layer)[None] for layer in step] for step in chosen]


def fill(cache: lcore.PagedCache, tokens: int) -> float:
    """Seconds that `append` takes for all of them."""
    generator, seconds = torch.Generator().manual_seed(0), 0.0
    for begin in range(0, tokens, FILL_CHUNK):
        shape = (1, min(FILL_CHUNK, tokens - begin), cache.num_kv_heads, cache.head_dim)
        k, v = (torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator) for _ in range(2))
        start = time.perf_counter()
        for layer in range(cache.num_layers):
            cache.append(layer, k, v)
        seconds += time.perf_counter() - start
    return seconds


def measure(args: argparse.Namespace) -> list[Row]:
    geometry = Geometry(args.heads, args.kv_heads, args.head_dim)
    sizes = (args.layers, geometry.kv_heads, geometry.head_dim)
    content = args.tokens * lcore.PagedCache.bytes_per_token(*sizes, args.kv_format)
    memory = lcore.PagedCache(*sizes, kv_format=args.kv_format)
    most = int(content / args.times)
    placed = lcore.PagedCache(*sizes, kv_format=args.kv_format, max_bytes=most, overflow=args.overflow or True)
    assert placed.overflow is not None
    page = int(placed.stats()["page_bytes"])
    disk = {
        "disk_gbytes": disk_gbytes(placed.overflow, args.disk_mbytes << 20, 8 << 20, True),
        "disk_page_gbytes": disk_gbytes(placed.overflow, args.disk_mbytes << 20, page, False),
    }
    common = {
        "kind": "placement", "kv_format": args.kv_format, "layers": args.layers, "heads": geometry.heads,
        "kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim, "tokens": args.tokens,
        "content_mbytes": content / 1e6, "max_mbytes": most / 1e6, **disk,
    }  # fmt: skip
    for cache in (memory, placed):
        cache.reserve(args.tokens)
    appending = (fill(memory, args.tokens) / args.tokens, fill(placed, args.tokens) / args.tokens)
    rows = [row(common, "append", None, None, appending, 0.0, placed)]
    q = torch.randn(1, 1, geometry.heads, geometry.head_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    count = args.selected // PAGE_SIZE
    for reuse in (None, *args.reuse):
        print("all" if reuse is None else f"{count} pages a head, {reuse:.0%} as before", file=sys.stderr)
        chosen = None
        if reuse is not None:
            total = args.tokens // PAGE_SIZE
            chosen = selections(args.steps + 1, args.layers, geometry.kv_heads, total, count, reuse)
        steps = [Steps(cache, q, chosen) for cache in (memory, placed)]
        calls = dict(enumerate(steps))
        times = median_seconds(calls, args.seconds) if chosen is None else median_seconds(calls, 0, least=args.steps)
        fetched = float(np.median(steps[1].fetched[1:] or steps[1].fetched))
        what, tokens = ("all", args.tokens) if chosen is None else ("selected", count * PAGE_SIZE)
        rows.append(row(common, what, tokens, reuse, (times[0], times[1]), fetched, placed))
    return rows


def row(
    common: Row,
    what: str,
    read: int | None,
    reuse: float | None,
    seconds: tuple[float, float],
    fetched: float,
    cache: lcore.PagedCache,
) -> Row:
    """seconds: all in memory, and of `cache`."""
    memory, placed = seconds
    gbytes = fetched / placed / 1e9
    return {
        **common, "what": what, "read_tokens": read, "reuse": reuse, "memory_ms": memory * 1e3,
        "ms": placed * 1e3, "tokens_per_s": 1 / placed, "of_memory": memory / placed,
        "fetched_mbytes": fetched / 1e6, "fetched_gbytes_per_s": gbytes, "of_disk": gbytes / common["disk_gbytes"],
        "resident_mbytes": cache.stats()["bytes"] / 1e6,
    }  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="that the cache holds")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-format", default="bf16")
    parser.add_argument("--times", type=float, default=4.0, help="the content over max_bytes")
    parser.add_argument("--selected", type=int, default=2048, help="tokens of each head that a selection reads")
    parser.add_argument("--reuse", type=float, nargs="+", default=[0.0, 0.5, 0.9], help="of it, as the step before")
    parser.add_argument("--overflow", metavar="FOLDER", help="of the file; $TMPDIR or /var/tmp")
    parser.add_argument("--steps", type=int, default=40, help="with a selection, of which the median is taken")
    parser.add_argument("--disk-mbytes", type=int, default=512, help="of the file that measures the disk")
    parser.add_argument("--seconds", type=float, default=5.0, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    content = result("placement", peaks(), measure(args))
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
