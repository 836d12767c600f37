"""Attention of the last tokens over a long paged cache: ``python -m bench.decode [--json FILE] [--plot FILE]``.

One layer, `lcore.PagedCache.attend`; GB/s count every key and value once. torch's scaled_dot_product_attention runs on
contiguous K and V of the same dtype (1, kv_heads, tokens, head_dim) in the same process, in two ways: with enable_gqa,
and with the heads packed by hand, where the query heads that share a kv head stand as rows of one query. With more than
one new token torch gets the causal mask as a boolean mask. --full-set measures what is published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lcore
from bench import plot
from bench.check import PEER_SLACK, Checker
from bench.machine import Peak, Row, peaks, result, write_json
from bench.shapes import DTYPES
from bench.tables import show
from bench.timer import median_seconds

# A cache is filled as a prompt does it, so that its pages lie in memory as a prompt leaves them.
FILL_CHUNK = 2048


@dataclass(frozen=True)
class Geometry:
    heads: int
    kv_heads: int
    head_dim: int


def tensors(geometry: Geometry, kv_format: str, tokens: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, new, heads, head_dim), and k and v (1, tokens, kv_heads, head_dim), standard normal."""
    generator = torch.Generator().manual_seed(0)

    def normal(seq: int, heads: int) -> Tensor:
        return torch.empty((1, seq, heads, geometry.head_dim), dtype=DTYPES[kv_format]).normal_(generator=generator)

    return normal(new, geometry.heads), normal(tokens, geometry.kv_heads), normal(tokens, geometry.kv_heads)


def filled_cache(geometry: Geometry, kv_format: str, k: Tensor, v: Tensor, page_size: int = 64) -> lcore.PagedCache:
    options: dict[str, Any] = {"dtype": k.dtype, "kv_format": kv_format, "page_size": page_size}
    cache = lcore.PagedCache(1, geometry.kv_heads, geometry.head_dim, **options)
    cache.reserve(k.shape[1])
    for part_k, part_v in zip(k.split(FILL_CHUNK, 1), v.split(FILL_CHUNK, 1), strict=True):
        cache.append(0, part_k, part_v)
    return cache


def torch_calls(q: Tensor, k: Tensor, v: Tensor, checker: Checker) -> dict[str, Callable[[], object]]:
    """With enable_gqa, and with the heads packed by hand. k and v are (1, kv_heads, tokens, head_dim), contiguous."""
    new, heads, kv_heads, tokens = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    group = heads // kv_heads
    mask = None if new == 1 else torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    by_head = q.transpose(1, 2).contiguous()
    packed = by_head.reshape(1, kv_heads, group * new, -1)
    packed_mask = None if mask is None else mask.repeat(group, 1)

    def grouped() -> Tensor:
        return F.scaled_dot_product_attention(by_head, k, v, attn_mask=mask, enable_gqa=True)

    def by_hand() -> Tensor:
        return F.scaled_dot_product_attention(packed, k, v, attn_mask=packed_mask)

    checker.forward(grouped().transpose(1, 2), PEER_SLACK)
    checker.forward(by_hand().reshape(by_head.shape).transpose(1, 2), PEER_SLACK)
    return {"gqa": grouped, "packed": by_hand}


def measure(geometry: Geometry, kv_format: str, tokens: int, news: list[int], budget: float) -> list[Row]:
    """A row for each number of new tokens, over one cache. budget: seconds to spend on each figure."""
    queries, k, v = tensors(geometry, kv_format, tokens, max(news))
    cache = filled_cache(geometry, kv_format, k, v)
    torch_k, torch_v = (x.transpose(1, 2).contiguous() for x in (k, v))
    # The checker keeps its own copy of two heads.
    checkers = {new: Checker(queries[:, -new:], k, v, (tokens, 0)) for new in news}
    kv_bytes = k.nbytes + v.nbytes
    del k, v
    rows = []
    for new in news:
        q = queries[:, -new:].contiguous()
        checkers[new].forward(cache.attend(0, q))
        peak = Peak("read")
        calls: dict[str, Callable[[], object]] = {"lcore": partial(cache.attend, 0, q), "peak": peak}
        times = median_seconds({**calls, **torch_calls(q, torch_k, torch_v, checkers[new])}, budget)
        seconds, gqa, packed = times["lcore"], times["gqa"], times["packed"]
        rows.append({
            "kind": "decode", "kv_format": kv_format, "paged": True, "batch": 1, "tokens": tokens, "new_tokens": new,
            "heads": geometry.heads, "kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim, "ms": seconds * 1e3,
            "tokens_per_s": new / seconds, "gbytes_per_s": kv_bytes / seconds / 1e9,
            "read_gbytes_per_s": peak.median, "of_read_peak": kv_bytes / seconds / 1e9 / peak.median,
            "torch_gqa_ms": gqa * 1e3, "torch_packed_ms": packed * 1e3,
            "speedup_gqa": gqa / seconds, "speedup_packed": packed / seconds,
        })  # fmt: skip
    cache.close()
    return rows


def prefill_row(geometry: Geometry, kv_format: str, tokens: int, chunk: int, budget: float) -> Row:
    """The last chunk of a prompt over a paged cache against the same over contiguous keys."""
    q, k, v = tensors(geometry, kv_format, tokens, chunk)
    cache = filled_cache(geometry, kv_format, k, v)
    checker = Checker(q, k, v, (tokens, 0))
    calls = {"paged": partial(cache.attend, 0, q), "contiguous": partial(lcore.attention, q, k, v, causal=True)}
    for call in calls.values():
        checker.forward(call())
    times = median_seconds(calls, budget)
    cache.close()
    name = f"time, a chunk of {chunk} at {tokens} tokens: paged / contiguous"
    return {
        "kind": "ratio", "name": name, "dtype": kv_format, "head_dim": geometry.head_dim,
        "ratio": times["paged"] / times["contiguous"], "ideal": 1.0,
    }  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="that the cache holds")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--kv-format", choices=list(DTYPES), nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prefill chunk, paged against contiguous")
    parser.add_argument("--full-set", action="store_true", help="all lengths to 65536, formats and new tokens")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="draw GB/s over length; needs the extra lcore[bench]")
    args = parser.parse_args(argv)
    if args.full_set:
        args.tokens, args.new_tokens, args.kv_format = [4096, 16384, 65536], [1, 4, 16, 64], list(DTYPES)
    if max(args.new_tokens) > min(args.tokens):
        parser.error("--new-tokens must be at most --tokens")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.plot:
        plot.require()
    geometry = Geometry(args.heads, args.kv_heads, args.head_dim)
    ceilings = peaks()
    rows: list[Row] = []
    for kv_format in args.kv_format:
        for tokens in args.tokens:
            print(f"{kv_format} {tokens} tokens", file=sys.stderr)
            rows += measure(geometry, kv_format, tokens, args.new_tokens, args.seconds)
        longest = max(args.tokens)
        rows.append(prefill_row(geometry, kv_format, longest, min(args.chunk, longest), args.seconds))
    content = result("decode", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)
    if args.plot:
        plot.draw_decode(content, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
