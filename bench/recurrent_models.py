"""Models with recurrent layers against transformers: ``python -m bench.recurrent_models [--json FILE]``.

Whole models with random weights and a vocabulary of 4096. prefill: a prompt of --tokens, logits of its last token.
decode: one token after it, over the cache. transformers reads the same folder with its own torch code, which has no
compiled kernels on the CPU; its logits are compared first. Calls of a row take turns. reuse: seconds until the first
token of a second question on a document of --tokens, with the states of the first call (and of a hybrid its pages) and
without, where transformers has nothing to compare. --full-set measures what is published.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.machine import Row, peaks, result, write_json
from bench.shapes import DTYPES
from bench.tables import show
from bench.timer import median_seconds
from lcore.generation import Generator
from lcore.models import JambaConfig, MambaConfig, Qwen3NextConfig
from lcore.models.loading import new_model

VOCAB = 4096
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of the largest logit, both sides' rounding through all layers included


def config_of(kind: str, layers: int, hidden: int) -> Any:
    heads = hidden // 64
    if kind in ("mamba", "mamba2"):
        more: dict[str, Any] = (
            {"num_heads": 2 * heads, "head_dim": 64, "n_groups": 1, "state_size": 64} if kind == "mamba2" else {}
        )
        return MambaConfig(VOCAB, hidden, layers, model_type=kind, **more)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_layers": layers,
        "num_heads": heads, "num_kv_heads": max(1, heads // 4), "head_dim": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 1 << 20,
    }  # fmt: skip
    if kind == "jamba":
        return JambaConfig(**sizes, attn_layer_period=4, attn_layer_offset=3)
    return Qwen3NextConfig(
        **sizes, key_dim=64, value_dim=64, num_key_heads=heads, num_value_heads=2 * heads, moe_intermediate_size=hidden,
        shared_expert_intermediate_size=hidden,
    )  # fmt: skip


def transformers_model(model: Any) -> Any | None:
    """transformers' own model of the same weights, where it is installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, overwrite=True)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()


def step(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    with torch.inference_mode():
        return model(tokens, cache, last_only=True)


def peer_step(peer: Any, tokens: Tensor, cache: Any) -> Any:
    with torch.inference_mode():
        return peer(tokens, cache=cache, use_cache=True, logits_to_keep=1)


def speed_rows(kind: str, layers: int, hidden: int, dtype: str, tokens: int, seconds: float) -> list[Row]:
    torch.manual_seed(0)
    model = new_model(config_of(kind, layers, hidden), dtype=DTYPES[dtype]).eval()
    peer = transformers_model(model)
    prompt = torch.randint(0, VOCAB, (1, tokens))
    cache = model.new_cache()
    logits = step(model, prompt, cache)[0, -1]
    calls: dict[str, dict[Any, Callable[[], object]]] = {
        "prefill": {"lcore": lambda: step(model, prompt, model.new_cache())},
        "decode": {"lcore": partial(step, model, prompt[:, :1], cache)},
    }
    if peer is not None:
        out = peer_step(peer, prompt, None)
        error = ((out.logits[0, -1] - logits).abs().max() / logits.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"bench: {kind} is wrong: relative error {error:.2e}")
        calls["prefill"]["transformers"] = partial(peer_step, peer, prompt, None)
        calls["decode"]["transformers"] = partial(peer_step, peer, prompt[:, :1], out.cache)
    rows = []
    for which, both in calls.items():
        times = median_seconds(both, seconds)
        count = tokens if which == "prefill" else 1
        rates = {name: count / time for name, time in times.items()}
        theirs = rates.get("transformers")
        rows.append({
            "kind": "recurrent_model", "model": kind, "pass": which, "layers": layers, "hidden": hidden, "dtype": dtype,
            "tokens": tokens, "tokens_per_s": rates["lcore"], "transformers_tokens_per_s": theirs,
            "speedup": rates["lcore"] / theirs if theirs else None,
        })  # fmt: skip
    return rows


def reuse_row(kind: str, layers: int, hidden: int, dtype: str, tokens: int) -> Row:
    torch.manual_seed(0)
    model = new_model(config_of(kind, layers, hidden), dtype=DTYPES[dtype]).eval()
    document = torch.randint(0, VOCAB, (tokens,)).tolist()
    questions = [[at, *range(30)] for at in range(4)]
    times: dict[bool, list[float]] = {True: [], False: []}
    known = Generator(model)
    known.generate(document + questions[0], max_new_tokens=0)
    texts = []
    for question in questions[1:]:
        for reuse, seconds in times.items():
            generator = known if reuse else Generator(model, prefix_reuse=False)
            done: Any = generator.generate(document + question, max_new_tokens=1)
            seconds.append(done.stats.prefill_seconds)
            texts.append(done.tokens)
        if texts[-1] != texts[-2]:
            raise AssertionError(f"bench: {kind} writes another token with reuse")
    assert known.prefixes is not None
    states = known.prefixes.stats()
    with_states, without = (statistics.median(times[reuse]) for reuse in (True, False))
    return {
        "kind": "recurrent_reuse", "model": kind, "layers": layers, "hidden": hidden, "dtype": dtype, "tokens": tokens,
        "seconds": with_states, "seconds_without": without, "speedup": without / with_states,
        "states": states["states"], "state_mbytes": states["state_bytes"] / 1e6,
    }  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["mamba", "mamba2", "jamba", "qwen3_next"]
    parser.add_argument("--model", choices=kinds, nargs="+", default=["mamba2", "jamba"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=list(TOLERANCE), nargs="+", default=["fp32"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--full-set", action="store_true", help="the published set, instead of all of the above")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    args = parser.parse_args(argv)
    if args.full_set:
        args.model, args.layers, args.hidden, args.tokens = kinds, 8, 512, 512
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    ceilings, rows = peaks(), []
    for kind in args.model:
        for dtype in args.dtype:
            print(f"{kind} {dtype}", file=sys.stderr)
            rows += speed_rows(kind, args.layers, args.hidden, dtype, args.tokens, args.seconds)
    for kind in args.model:
        rows.append(reuse_row(kind, args.layers, args.hidden, args.dtype[0], 8 * args.tokens))
    content = result("recurrent_models", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
