"""Scores of pages from their bounds on the CPU: ``python -m bench.page_bounds [--json FILE]``.

One token against all pages of one layer. "page_bounds" reads K once and counts its bytes; "page_scores" counts those of
the bounds, in bfloat16. "of dense" is the time over that of attention over the whole cache for the same token. The
speed-up is over plain torch on contiguous tensors: amin and amax over the tokens of a page; the sum of
maximum(q * least, q * greatest) as matrix products of the positive and negative parts of q, the largest of a group.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lcore
from bench.decode import Geometry, filled_cache, tensors
from bench.machine import Peak, Row, peaks, result, write_json
from bench.shapes import DTYPES
from bench.tables import show
from bench.timer import median_seconds


def torch_bounds(k: Tensor, page_size: int) -> Tensor:
    """(kv_heads, pages, 2 * head_dim) from k (kv_heads, tokens, head_dim)."""
    pages = k.unflatten(1, (-1, page_size))
    return torch.cat([pages.amin(dim=2), pages.amax(dim=2)], dim=-1)


def torch_scores(q: Tensor, bounds: Tensor) -> Tensor:
    """(kv_heads, pages) from q (kv_heads, group, head_dim) and bounds (kv_heads, pages, 2 * head_dim)."""
    parts = torch.cat([q.clamp(max=0), q.clamp(min=0)], dim=-1) * q.shape[-1] ** -0.5
    return (parts @ bounds.transpose(1, 2)).amax(dim=1)


def measure(geometry: Geometry, kv_format: str, tokens: int, page_size: int, seconds: float) -> list[Row]:
    """A row for the bounds of all pages and one for the scores of a token."""
    q, k, v = tensors(geometry, kv_format, tokens, 1)
    cache = filled_cache(geometry, kv_format, k, v, page_size)
    bounds = cache.page_bounds(0)
    torch_k = k[0].transpose(0, 1).contiguous()
    torch_q = q[0, 0].unflatten(0, (geometry.kv_heads, -1))
    wide = bounds[0].flatten(2).float()
    error = (lcore.page_scores(q, bounds)[0] - torch_scores(torch_q.float(), wide)).abs().max().item()
    if not error <= 1e-3 or not torch.equal(torch_bounds(torch_k, page_size).bfloat16(), bounds[0].flatten(2)):
        raise AssertionError(f"bench: the bounds or the scores are wrong: error {error:.2e}")
    peak = Peak("read")
    calls: dict[Any, Callable[[], object]] = {
        "page_bounds": partial(cache.page_bounds, 0),
        "page_scores": partial(lcore.page_scores, q, bounds),
        "dense": partial(cache.attend, 0, q),
        "peak": peak,
        ("page_bounds", "torch"): partial(torch_bounds, torch_k, page_size),
        ("page_scores", "torch"): partial(torch_scores, torch_q.float(), wide),
        ("page_scores", "torch 16"): partial(torch_scores, torch_q.bfloat16(), bounds[0].flatten(2)),
    }
    times = median_seconds(calls, seconds)
    rows = []
    for op, read in (("page_bounds", k.nbytes), ("page_scores", bounds.nbytes)):
        theirs = min(time for key, time in times.items() if isinstance(key, tuple) and key[0] == op)
        rows.append({
            "kind": "page_bounds", "op": op, "kv_format": kv_format, "tokens": tokens, "page_size": page_size,
            "heads": geometry.heads, "kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim,
            "ms": times[op] * 1e3, "gbytes_per_s": read / times[op] / 1e9,
            "of_read_peak": read / times[op] / 1e9 / peak.median, "dense_ms": times["dense"] * 1e3,
            "of_dense": times[op] / times["dense"], "torch_ms": theirs * 1e3, "speedup": theirs / times[op],
        })  # fmt: skip
    cache.close()
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--page-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-format", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    geometry = Geometry(args.heads, args.kv_heads, args.head_dim)
    ceilings = peaks()
    rows = []
    for page_size in args.page_size:
        rows += measure(geometry, args.kv_format, args.tokens, page_size, args.seconds)
    content = result("page_bounds", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
