"""What reading a part of the cache gains and loses: ``python -m bench.selection [--json FILE]``.

Speed: one layer, the time of one new token with everything read and with a budget of pages; they take turns. Needles:
the bundled model reads a real text with hidden needles, InfLLM under its selection; then each question, and its answer,
reads a budget of pages of a fork, in all layers. "missed" is the certified upper bound of the attention mass that any
query missed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import lcore
from bench.decode import Geometry, filled_cache, tensors
from bench.machine import Row, peaks, result, write_json
from bench.tables import show
from bench.timer import median_seconds
from lcore import selection
from lcore.demo import ANSWER_TOKENS, hide, one
from lcore.evaluation.haystack import even_depths, is_correct, make_needles, question, stdlib_text
from lcore.evaluation.needle import BUNDLED_MODEL
from lcore.generation import Generator

NEEDLES = 8
LOCAL = 1024  # tokens of InfLLM's window here


def infllm(pages: int, page_size: int) -> selection.InfLLM:
    recent = min(LOCAL // page_size, pages // 2)
    return selection.InfLLM(pages, recent=recent, local_tokens=LOCAL, sinks=1)


def speed_rows(geometry: Geometry, kv_format: str, tokens: int, budget: int, seconds: float) -> list[Row]:
    q, k, v = tensors(geometry, "bf16", tokens, 1)
    dense = filled_cache(geometry, kv_format, k, v)
    caches = {"all": dense, "quest": dense.fork(), "infllm": dense.fork()}
    pages = budget // dense.page_size
    caches["quest"].select = selection.Quest(pages, dense_layers=0)
    caches["infllm"].select = infllm(pages, dense.page_size)
    times = median_seconds({name: partial(cache.attend, 0, q) for name, cache in caches.items()}, seconds)
    rows: list[Row] = [
        {
            "kind": "selection_speed", "select": name, "kv_format": kv_format, "tokens": tokens,
            "read_tokens": tokens if name == "all" else budget, "heads": geometry.heads,
            "kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim, "ms": times[name] * 1e3,
            "tokens_per_s": 1 / times[name], "speedup": times["all"] / times[name],
            "index_mbytes": cache.stats()["index_bytes"] / 1e6,
        }
        for name, cache in caches.items()
    ]  # fmt: skip
    for cache in caches.values():
        cache.close()
    return rows


def needle_rows(tokens: int, budgets: list[int]) -> list[Row]:
    model = lcore.load_model(BUNDLED_MODEL)
    needles = make_needles(NEEDLES, 0)
    document = hide(model, stdlib_text(tokens * 8), tokens, needles, even_depths(NEEDLES))
    size = model.new_cache().page_size
    cases: dict[tuple[str, int | None], selection.Selection | None] = {("all", None): None}
    for budget in budgets:
        pages = budget // size
        cases["quest", budget] = selection.Quest(pages, dense_layers=0, prefill=True)
        cases["infllm", budget] = infllm(pages, size)
    rows = []
    for (name, read_tokens), select in cases.items():
        print(f"needles, {name} {read_tokens or ''}", file=sys.stderr)
        found, missed = 0, 0.0
        generator = Generator(model, select=select)
        generator.generate(document, max_new_tokens=0)
        read = generator.cache
        assert read is not None
        for needle in needles:
            cache = read.fork()
            reply = one(generator.generate(question(needle), max_new_tokens=ANSWER_TOKENS, stop="\n", cache=cache))
            found += is_correct(needle, reply.text.strip())
            missed = max(missed, reply.stats.dropped_mass)
            cache.close()
        read.close()
        certified = select is None or select.certified
        rows.append({
            "kind": "selection_needles", "select": name, "tokens": tokens, "read_tokens": read_tokens or tokens,
            "found": found, "of": NEEDLES, "missed": missed if certified else None,
        })  # fmt: skip
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="that the cache of the speed rows holds")
    parser.add_argument("--budget", type=int, default=2048, help="tokens that a token reads in the speed rows")
    parser.add_argument("--kv-format", nargs="+", default=["bf16", "int4"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--needle-tokens", type=int, default=16384, help="that the model reads; 0: no needle rows")
    parser.add_argument("--needle-budgets", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    args = parser.parse_args(argv)
    if min([args.budget, *args.needle_budgets]) < 256:
        parser.error("budgets must be at least 256 tokens")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    ceilings = peaks()
    rows: list[Row] = []
    for kv_format in args.kv_format:
        geometry = Geometry(args.heads, args.kv_heads, args.head_dim)
        rows += speed_rows(geometry, kv_format, args.tokens, args.budget, args.seconds)
    if args.needle_tokens:
        rows += needle_rows(args.needle_tokens, args.needle_budgets)
    content = result("selection", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
