"""CPU attention against torch's: ``python -m bench.attention [--json FILE] [--plot FILE]``.

GFLOP/s count the pairs that the mask allows: forward 4 * pairs * heads * head_dim, backward 2.5 times that. A backward
is timed alone, on a graph that is kept. The speed-up is the median time of torch's scaled_dot_product_attention over
lcore's on the same inputs in the same process; torch gets its own layout (batch, heads, seq, head_dim), contiguous, a
window as a boolean mask, packed sequences as a batch, and for grouped heads the faster of enable_gqa and expanding K
and V by hand. lcore, torch and the machine's peak take turns: on a shared machine the speed of all three moves
together. --full-set measures what is published.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import plot, shapes, torch_peers
from bench.check import PEER_SLACK, Checker
from bench.machine import Peak, Row, ceiling, peaks, result, write_json
from bench.memory import forward_bytes
from bench.shapes import Shape
from bench.tables import show
from bench.timer import median_seconds

# Longer sequences take torch half a minute a row.
TORCH_SEQ = 16384


@dataclass(frozen=True)
class Settings:
    ceilings: dict[str, float]
    flex: bool  # measure flex_attention too
    torch_seq: int  # the longest sequence that torch gets
    seconds: float  # to spend on each figure, if its calls are short


def timed(shape: Shape, call: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> Callable[[], object]:
    """What is timed: a forward, or a backward alone."""
    if shape.which == "forward":
        return lambda: call(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def check(shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Checker:
    """Raises AssertionError when lcore's results are wrong."""
    checker = Checker(q, k, v, shape.bounds)
    leaves = tuple(shape.ours(x).detach().requires_grad_(shape.which == "backward") for x in (q, k, v))
    out, lse = shape.attention_and_lse(*leaves)
    batched = out.detach().reshape(dout.shape)
    checker.forward(batched)
    if shape.which == "backward":
        grads = torch.autograd.grad(out, leaves, shape.ours(dout))
        if shape.packed:
            lse = lse.unflatten(1, (shape.batch, shape.seq)).transpose(0, 1)
        dq, dk, dv = (grad.reshape(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
        checker.backward(batched, lse.detach(), dout, (dq, dk, dv))
    return checker


def measure(shape: Shape, settings: Settings) -> Row:
    """One row: lcore and torch on the same random normal inputs."""
    q, k, v, dout = shape.inputs()
    checker = check(shape, q, k, v, dout)
    ours = timed(shape, shape.attention, [shape.ours(x) for x in (q, k, v)], shape.ours(dout))
    inputs, dout = [x.transpose(1, 2).contiguous() for x in (q, k, v)], dout.transpose(1, 2).contiguous()
    del q, k, v
    name = ceiling(settings.ceilings, shape.dtype)
    peak = Peak(name)
    calls: dict[Any, Callable[[], object]] = {"lcore": ours, "peak": peak}
    for way, call in torch_peers.sdpa(shape).items() if shape.seq <= settings.torch_seq else ():
        checker.forward(call(*inputs).transpose(1, 2), PEER_SLACK)
        calls["torch", way] = timed(shape, call, inputs, dout)
    flex_error = None
    if settings.flex:
        try:  # compiling it on a CPU needs more than torch
            flex = torch_peers.flex(shape)
            checker.forward(flex(*inputs).transpose(1, 2), PEER_SLACK)
            calls["flex"] = timed(shape, flex, inputs, dout)
        except Exception as error:
            flex_error = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    times = median_seconds(calls, settings.seconds)
    seconds = times["lcore"]
    gflops = shape.flops() / seconds / 1e9
    row = {
        "kind": "attention", **shape.fields(), "ms": seconds * 1e3, "gflops": gflops, "ceiling": name,
        "peak_gflops": peak.median, "of_peak": gflops / peak.median, "torch_gflops": None, "torch_gqa": None,
        "speedup": None, "flex_speedup": times["flex"] / seconds if "flex" in times else None, "flex_error": flex_error,
    }  # fmt: skip
    ways = [key for key in times if isinstance(key, tuple)]
    if ways:
        best = min(ways, key=times.__getitem__)
        row.update(torch_gflops=shape.flops() / times[best] / 1e9, torch_gqa=best[1], speedup=times[best] / seconds)
    return row


def memory_row(shape: Shape, settings: Settings) -> Row:
    """What a forward allocates beside its inputs and outputs."""
    output = 2 if shape.dtype != "fp32" else 4
    output_bytes = shape.batch * shape.seq * shape.heads * (shape.head_dim * output + 4)
    ours = forward_bytes(shape)
    peer = forward_bytes(shape, peer=True) if shape.seq <= settings.torch_seq else None
    return {
        "kind": "memory",
        **shape.fields(),
        "output_mbytes": output_bytes / 1e6,
        "extra_mbytes": None if ours is None else ours / 1e6,
        "torch_extra_mbytes": None if peer is None else peer / 1e6,
    }


def ratio_rows(rows: dict[Shape, Row]) -> list[Row]:
    """A window against all keys, and short packed sequences against a long one: where both were measured."""
    ratios = []
    pairs = [(shapes.window_pair(), "time, {full} causal / window {short.window}", "ms")]
    pairs += [(shapes.packed_pair(), "GFLOP/s, {short.batch} packed of {short.seq} / one of {full}", "gflops")]
    for (short, full), name, column in pairs:
        if short in rows and full in rows:
            one, other = rows[short][column], rows[full][column]
            ratios.append({
                "kind": "ratio", "name": name.format(short=short, full=full.seq), "dtype": full.dtype,
                "head_dim": full.head_dim, "ratio": other / one if column == "ms" else one / other,
                "ideal": full.pairs() / short.pairs() if column == "ms" else 1.0,
            })  # fmt: skip
    return ratios


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--dtype", choices=list(shapes.DTYPES), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--pass", dest="passes", choices=shapes.PASSES, nargs="+", default=list(shapes.PASSES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--packed", action="store_true", help="the batch as packed sequences, with cu_seqlens")
    parser.add_argument("--full", action="store_true", help="without the causal mask")
    parser.add_argument("--window", type=int, help="keys to the left of its own that a query sees")
    parser.add_argument("--full-set", action="store_true", help="the published set, instead of all of the above")
    parser.add_argument("--memory", action="store_true", help="also the memory of the longest forward")
    parser.add_argument("--flex", action="store_true", help="also torch.compile(flex_attention)")
    parser.add_argument("--torch-long", action="store_true", help=f"torch beyond {TORCH_SEQ} tokens too")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="draw speed over length; needs the extra lcore[bench]")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.plot:
        plot.require()
    if args.full_set:
        todo = shapes.full_set()
    else:
        todo = shapes.table(
            which=args.passes, dtype=args.dtype, head_dim=args.head_dim, seq=args.seq, batch=[args.batch],
            packed=[args.packed], heads=[args.heads], kv_heads=[args.kv_heads or args.heads],
            causal=[not args.full], window=[args.window],
        )  # fmt: skip
    torch_seq = sys.maxsize if args.torch_long else TORCH_SEQ
    settings = Settings(peaks(), args.flex, torch_seq, args.seconds)
    rows: dict[Shape, Row] = {}
    for number, shape in enumerate(todo, 1):
        print(f"{number}/{len(todo)} {shape.label()}", file=sys.stderr)
        rows[shape] = measure(shape, settings)
    extra = ratio_rows(rows)
    if args.memory or args.full_set:
        longest = dataclasses.replace(max(todo, key=lambda shape: (shape.seq, shape.head_dim)), which="forward")
        extra.append(memory_row(longest, settings))
    content = result("attention", settings.ceilings, [*rows.values(), *extra])
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)
    if args.plot:
        plot.draw_attention(content, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
