"""Attention mass of keys on the CPU: ``python -m bench.key_mass [--json FILE]``.

GFLOP/s count the pairs that the mask allows, 2 * pairs * heads * head_dim: one matrix product, where the forward has
two. "of forward" is this rate over that of lcore.attention on the same queries and keys, in the same run. The
speed-up is over plain torch: softmax(Q K^T) summed over the queries, a chunk of rows at a time so that it fits, which
needs no lse but computes it again; of 16-bit products and products of what was made float32, the faster. --full-set
measures what is published.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lcore
from bench.machine import Peak, Row, ceiling, peaks, result, write_json
from bench.shapes import DTYPES
from bench.tables import show
from bench.timer import median_seconds

CHUNK_BYTES = 64 << 20  # of float32 scores that torch holds at once


@dataclass(frozen=True)
class Shape:
    """The last `queries` of `keys` tokens, causal."""

    dtype: str
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int

    def flops(self) -> float:
        pairs = self.queries * (2 * self.keys - self.queries + 1) // 2 * self.heads
        return 2 * pairs * self.head_dim


def by_torch(q: Tensor, k: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(kv_heads, keys) from q (queries, kv_heads, group, head_dim) and k (kv_heads, head_dim, keys): products in dtype.

    Sums and the softmax are float32.
    """
    queries, kv_heads, group, head_dim = q.shape
    keys = k.shape[2]
    k = k.to(dtype)
    mass = torch.zeros(kv_heads, keys)
    for first in range(0, queries, chunk):
        rows = q[first : first + chunk].permute(1, 2, 0, 3).to(dtype)
        scores = (rows.reshape(kv_heads, -1, head_dim) @ k).float() / math.sqrt(head_dim)
        scores = scores.view(kv_heads, group, -1, keys)
        at = torch.arange(first, first + rows.shape[2]) + keys - queries
        scores.masked_fill_(torch.arange(keys) > at[:, None], -math.inf)
        mass += scores.softmax(-1).sum((1, 2))
    return mass


def measure(shape: Shape, ceilings: dict[str, float], seconds: float) -> Row:
    generator = torch.Generator().manual_seed(0)

    def normal(seq: int, heads: int) -> Tensor:
        empty = torch.empty((1, seq, heads, shape.head_dim), dtype=DTYPES[shape.dtype])
        return empty.normal_(generator=generator)

    q, k, v = normal(shape.queries, shape.heads), normal(shape.keys, shape.kv_heads), normal(shape.keys, shape.kv_heads)
    _, lse = lcore.attention(q, k, v, causal=True, return_lse=True)
    ours = partial(lcore.key_mass, q, k, lse, causal=True)
    chunk = max(1, min(shape.queries, CHUNK_BYTES // (4 * shape.heads * shape.keys)))
    torch_q = q[0].unflatten(1, (shape.kv_heads, -1))
    torch_k = k[0].permute(1, 2, 0).contiguous()
    theirs = {dtype: partial(by_torch, torch_q, torch_k, chunk, dtype) for dtype in {q.dtype, torch.float32}}
    error = ((ours()[0] - theirs[torch.float32]()).norm() / ours().norm()).item()
    if not error <= 1e-4:
        raise AssertionError(f"bench: the mass is wrong: relative error {error:.2e}")
    name = ceiling(ceilings, shape.dtype)
    peak, read = Peak(name), Peak("read")
    calls: dict[Any, Callable[[], object]] = {
        "lcore": ours, "forward": partial(lcore.attention, q, k, v, causal=True), "peak": peak, "read": read,
    }  # fmt: skip
    times = median_seconds({**calls, **theirs}, seconds)
    torch_seconds = min(times[dtype] for dtype in theirs)
    rate, forward = (flops / 1e9 for flops in (shape.flops() / times["lcore"], 2 * shape.flops() / times["forward"]))
    gbytes = k.nbytes / times["lcore"] / 1e9
    return {
        "kind": "key_mass", **asdict(shape), "ms": times["lcore"] * 1e3, "gflops": rate, "ceiling": name,
        "peak_gflops": peak.median, "of_peak": rate / peak.median, "forward_gflops": forward,
        "of_forward": rate / forward, "gbytes_per_s": gbytes, "of_read_peak": gbytes / read.median,
        "torch_ms": torch_seconds * 1e3, "speedup": torch_seconds / times["lcore"],
    }  # fmt: skip


def full_set() -> list[Shape]:
    """All queries (H2O), a window of 64 (SnapKV), the last one (TOVA)."""
    shapes = [Shape(dtype, 4096, 4096, 8, 8, dim) for dtype in ("fp32", "bf16") for dim in (64, 128)]
    shapes += [Shape(dtype, new, 65536, 32, 8, 128) for dtype in ("fp32", "bf16") for new in (64, 1)]
    return shapes


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[4096, 64, 1])
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--full-set", action="store_true", help="the published set, instead of all of the above")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    todo = full_set() if args.full_set else [
        Shape(dtype, queries, args.keys, args.heads, args.kv_heads, args.head_dim)
        for dtype in args.dtype for queries in args.queries
    ]  # fmt: skip
    ceilings = peaks()
    rows = []
    for number, shape in enumerate(todo, 1):
        print(f"{number}/{len(todo)} {shape}", file=sys.stderr)
        rows.append(measure(shape, ceilings, args.seconds))
    content = result("key_mass", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
