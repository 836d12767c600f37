"""What a KV cache costs and loses, by format and by policy: ``python -m bench.cache [--json FILE] [--plot FILE]``.

Speed: one layer, bytes a token, the time of one new token and of a prefill chunk, each against bf16; the formats take
turns, with bf16 keys before RoPE, which attention rotates, beside them. Quality: the bundled model reads real text in
chunks through the cache, so that every prediction is made from stored keys and values; KL divergence from the same
reading over an fp32 cache, and perplexity. Outliers: random normal keys and values of which a few channels are many
times larger, the error of attention's output over exact attention. Policies: see bench/policies.py.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from torch import Tensor

import lcore
from bench import plot, policies
from bench.decode import FILL_CHUNK, Geometry
from bench.machine import Row, peaks, result, write_json
from bench.tables import show
from bench.timer import median_seconds
from lcore.cache.formats import FORMATS
from lcore.evaluation.haystack import stdlib_text
from lcore.evaluation.needle import BUNDLED_MODEL
from lcore.positions import RopeConfig, Rotation

Case = tuple[str, bool]  # format, rotate
QUALITY_CHUNK = 64  # tokens a step: what is predicted from the chunk's own tokens is predicted from the tail
OUTLIERS = (3, 40, 77)  # channels of 128


def speed_rows(geometry: Geometry, formats: list[str], tokens: int, chunk: int, seconds: float) -> list[Row]:
    generator = torch.Generator().manual_seed(0)

    def normal(seq: int, heads: int) -> Tensor:
        return torch.empty(1, seq, heads, geometry.head_dim, dtype=torch.bfloat16).normal_(generator=generator)

    caches = {}
    plain = ("bf16", False)
    for case in (*((name, False) for name in formats), ("bf16", True)):
        rope = Rotation.of(RopeConfig(), geometry.head_dim) if case[1] else None
        cache = lcore.PagedCache(1, geometry.kv_heads, geometry.head_dim, kv_format=case[0], rope=rope)
        cache.reserve(tokens)
        caches[case] = cache
    for begin in range(0, tokens, FILL_CHUNK):
        k, v = (normal(min(FILL_CHUNK, tokens - begin), geometry.kv_heads) for _ in range(2))
        for cache in caches.values():
            cache.append(0, k, v)
    one, many = normal(1, geometry.heads), normal(chunk, geometry.heads)
    decode = median_seconds({case: partial(cache.attend, 0, one) for case, cache in caches.items()}, seconds)
    prefill = median_seconds({case: partial(cache.attend, 0, many) for case, cache in caches.items()}, seconds)
    rows = []
    for case, cache in caches.items():
        stats = cache.stats()
        rows.append({
            "kind": "cache_speed", "kv_format": case[0], "before_rope": case[1], "tokens": tokens,
            "heads": geometry.heads,
            "kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim, "bits_per_value": stats["bits_per_value"],
            "mbytes": stats["bytes"] / 1e6, "decode_ms": decode[case] * 1e3, "tokens_per_s": 1 / decode[case],
            "decode_speedup": decode[plain] / decode[case], "chunk": chunk, "chunk_ms": prefill[case] * 1e3,
            "chunk_ratio": prefill[case] / prefill[plain],
        })  # fmt: skip
        cache.close()
    return rows


def log_probabilities(model: lcore.models.Decoder, tokens: Tensor, case: Case) -> Tensor:
    """(tokens, vocab) after each token, read QUALITY_CHUNK at a time through a cache."""
    cache = model.new_cache(1, kv_format=case[0], rotate=case[1])
    with torch.no_grad():
        parts = [model(part[None], cache)[0].log_softmax(-1) for part in tokens.split(QUALITY_CHUNK)]
    cache.close()
    return torch.cat(parts)


def quality_rows(cases: list[Case], tokens: int) -> list[Row]:
    model = lcore.load_model(BUNDLED_MODEL)
    assert model.tokenizer is not None
    ids = torch.tensor(model.tokenizer.encode(stdlib_text(tokens * 8), add_special_tokens=False)[: tokens + 1])
    exact = log_probabilities(model, ids[:-1], ("fp32", False))
    rows = []
    base = None
    for case in cases:
        print(f"quality of {case[0]}{', rotated' if case[1] else ''}", file=sys.stderr)
        got = log_probabilities(model, ids[:-1], case)
        divergence = (exact.exp() * (exact - got)).sum(-1).double()
        loss = -got.gather(1, ids[1:, None]).double().mean()
        base = -exact.gather(1, ids[1:, None]).double().mean() if base is None else base
        rows.append({
            "kind": "cache_quality", "kv_format": case[0], "rotate": case[1], "tokens": tokens,
            "kl_mean": divergence.mean().item(), "kl_99": divergence.quantile(0.99).item(),
            "same_top_1": (got.argmax(-1) == exact.argmax(-1)).double().mean().item(),
            "perplexity": loss.exp().item(), "perplexity_change": (loss - base).exp().item() - 1,
        })  # fmt: skip
    return rows


def outlier_rows(cases: list[Case], tokens: int) -> list[Row]:
    """Causal attention of the last 64 of `tokens` tokens, 2 kv heads of 128 with 4 query heads each."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, 128, generator=generator) for heads in (8, 2, 2))
    k[..., OUTLIERS] *= 10
    v[..., OUTLIERS] *= 10
    q = q[:, -64:] / 3  # scores as spread as a model's
    want = lcore.attention(q.double(), k.double(), v.double(), causal=True)
    rows = []
    for kv_format, rotate in cases:
        cache = lcore.PagedCache(1, 2, 128, dtype=torch.float32, kv_format=kv_format, rotate=rotate)
        cache.append(0, k, v)
        error = (cache.attend(0, q) - want).square().sum().sqrt() / want.square().sum().sqrt()
        rows.append({"kind": "cache_outliers", "kv_format": kv_format, "rotate": rotate, "error": error.item()})
        cache.close()
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="that the cache of the speed rows holds")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-format", choices=list(FORMATS), nargs="+", default=list(FORMATS))
    parser.add_argument("--quality-tokens", type=int, default=8192, help="that the model reads; 0: no quality rows")
    parser.add_argument("--policy-tokens", type=int, default=16384, help="of a prompt under a policy; 0: no such rows")
    parser.add_argument("--policy-budget", type=int, default=2048, help="tokens that it keeps of each head")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="draw loss over bits a value; needs the extra lcore[bench]")
    args = parser.parse_args(argv)
    if args.chunk > args.tokens:
        parser.error("--chunk must be at most --tokens")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.plot:
        plot.require()
    ceilings = peaks()
    formats = list(dict.fromkeys(["bf16", *args.kv_format]))
    rows = speed_rows(
        Geometry(args.heads, args.kv_heads, args.head_dim), formats, args.tokens, args.chunk, args.seconds
    )
    cases = [(name, rotate) for name in formats for rotate in (False, True)[: 1 + (FORMATS[name].dtype is None)]]
    rows += outlier_rows(cases, min(args.tokens, 4096))
    if args.quality_tokens:
        rows += quality_rows(cases, args.quality_tokens)
    if args.policy_tokens:
        geometry = Geometry(args.heads, args.kv_heads, args.head_dim)
        rows += policies.speed_rows(geometry, args.policy_tokens, args.policy_budget, args.seconds)
        rows += policies.needle_rows(args.policy_tokens, args.policy_budget)
    content = result("cache", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)
    if args.plot:
        plot.draw_cache(content, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
