"""Rows of `bench.cache` for eviction policies: what each keeps, what it costs, and what the model still finds.

Speed: one layer reads a prompt in chunks, then single tokens, with and without the policy. Needles: the bundled model
reads a real text with hidden needles under the policy, then answers a question on each over a fork: the text is
compressed before the questions are known.
"""

from __future__ import annotations

import sys
import time
from functools import partial

import torch

import lcore
from bench.decode import Geometry, filled_cache, tensors
from bench.machine import Row
from bench.timer import median_seconds
from lcore import policies
from lcore.demo import ANSWER_TOKENS, hide, one
from lcore.evaluation.haystack import even_depths, is_correct, make_needles, question, stdlib_text
from lcore.evaluation.needle import BUNDLED_MODEL
from lcore.generation import Generator

NEEDLES = 8
CHUNK = 1024


def cases(budget: int) -> dict[str, policies.Policy | None]:
    return {
        "none": None,
        "StreamingLLM": policies.StreamingLLM(budget),
        "H2O": policies.H2O(budget),
        "TOVA": policies.TOVA(budget),
        "SnapKV": policies.SnapKV(budget),
        "PyramidKV": policies.PyramidKV(budget),
        "AdaKV": policies.AdaKV(policies.SnapKV(budget)),
        "KeyNorm": policies.KeyNorm(budget),
        "KeyDiff": policies.KeyDiff(budget),
        "VATP": policies.VATP(budget),
        "CaM": policies.CaM(budget),
    }


def speed_rows(geometry: Geometry, tokens: int, budget: int, seconds: float) -> list[Row]:
    """A prompt of `tokens` tokens in chunks, then one token; every policy keeps `budget` tokens a head."""
    q, k, v = tensors(geometry, "bf16", tokens, tokens)
    rows: list[Row] = []
    caches = {}
    for name, policy in cases(budget).items():
        cache = lcore.PagedCache(1, geometry.kv_heads, geometry.head_dim, policy=policy)
        start = time.perf_counter()
        for part_q, part_k, part_v in zip(q.split(CHUNK, 1), k.split(CHUNK, 1), v.split(CHUNK, 1), strict=True):
            cache.append(0, part_k, part_v)
            cache.attend(0, part_q)
        prefill = time.perf_counter() - start
        cache.trim()
        caches[name] = cache
        stats = cache.stats()
        kept = float(cache.lengths(0).float().mean())
        rows.append({
            "kind": "policy_speed", "policy": name, "tokens": tokens, "kept": kept, "heads": geometry.heads,
            "kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim, "mbytes": stats["bytes"] / 1e6,
            "prefill_seconds": prefill,
        })  # fmt: skip
    one_q = q[:, -1:].contiguous()
    # A copy without the policy: the same tokens are read at every turn.
    plain = {name: filled_cache(geometry, "bf16", k[:, : int(row["kept"])], v[:, : int(row["kept"])])
             for name, row in zip(caches, rows, strict=True)}  # fmt: skip
    decode = median_seconds({name: partial(cache.attend, 0, one_q) for name, cache in plain.items()}, seconds)
    full = caches["none"].stats()["bytes"] / 1e6
    for name, row in zip(caches, rows, strict=True):
        row["tokens_per_s"] = 1 / decode[name]
        row["of_bytes"] = row["mbytes"] / full
        row["of_tokens"] = row["kept"] / tokens
        row["prefill_ratio"] = row["prefill_seconds"] / rows[0]["prefill_seconds"]
        plain[name].close()
        caches[name].close()
    return rows


def needle_rows(tokens: int, budget: int) -> list[Row]:
    model = lcore.load_model(BUNDLED_MODEL)
    needles = make_needles(NEEDLES, 0)
    document = hide(model, stdlib_text(tokens * 8), tokens, needles, even_depths(NEEDLES))
    rows = []
    for name, policy in cases(budget).items():
        print(f"needles, {name}", file=sys.stderr)
        generator = Generator(model, policy=policy, prefill_chunk=CHUNK)
        generator.generate(document, max_new_tokens=0)
        read = generator.cache
        assert read is not None
        kept = float(torch.stack([read.lengths(layer).float().mean() for layer in range(read.num_layers)]).mean())
        found = 0
        for needle in needles:
            cache = read.fork()
            reply = one(generator.generate(question(needle), max_new_tokens=ANSWER_TOKENS, stop="\n", cache=cache))
            found += is_correct(needle, reply.text.strip())
            cache.close()
        rows.append({
            "kind": "policy_needles", "policy": name, "tokens": tokens, "kept": kept, "found": found, "of": NEEDLES,
            "mbytes": read.stats()["bytes"] / 1e6,
        })  # fmt: skip
        read.close()
    return rows
