"""Recurrent ops on the CPU: ``python -m bench.recurrent [--json FILE]``.

Selective scan: M elements (batch x dim x len) a second, with D, gate, bias and softplus; a backward is timed alone, on
a graph that is kept. "of FMA peak" counts 11 multiply-adds a state and step forward (8 for the exponential, 3 for state
and output) and 19 backward (the forward again, and 8). The speed-ups are the ratio of elements a second over
transformers' Mamba-1 without its CUDA kernels, and over a plain torch loop (lcore.reference), both at --peer-len steps,
where they are at their best, forward alone or backward alone.
Convolution, width 4 with SiLU: bytes read and written over those of torch's clone of the input, which also allocates;
speed-up over torch's depthwise conv1d and silu. State update: bytes of the states read and written over those of a copy
of them; speed-up over the formula in torch. All calls of a row take turns. --full-set measures what is published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import lcore
from bench.machine import Peak, Row, peaks, result, write_json
from bench.shapes import DTYPES, PASSES
from bench.tables import show
from bench.timer import median_seconds
from lcore import reference

MULTIPLY_ADDS = {"forward": 11, "backward": 19}  # a state and step
CONV_LEN = 16384  # of the published set: far more than the caches hold
LAYOUTS = ("dim, len", "len, dim")  # the last is contiguous
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}  # of the largest value, transformers' own rounding included


@dataclass(frozen=True)
class Shape:
    dtype: str
    layout: str
    batch: int
    dim: int
    states: int
    len: int

    def activation(self, channels: int) -> Tensor:
        x = torch.randn(self.batch, channels, self.len).to(DTYPES[self.dtype])
        return x if self.layout == LAYOUTS[0] else x.transpose(1, 2).contiguous().transpose(1, 2)

    def scan_inputs(self) -> list[Any]:
        """u, delta, A, B, C, D, z, delta_bias as Mamba starts: decays of 1 to `states`, steps of 0.001 to 0.1."""
        u, delta, z = (self.activation(self.dim) for _ in range(3))
        B, C = (self.activation(self.states) for _ in range(2))
        A = -torch.arange(1.0, self.states + 1).repeat(self.dim, 1)
        steps = torch.exp(torch.rand(self.dim) * 4.6 - 6.9)
        return [u, delta * 0.1, A, B, C, torch.ones(self.dim), z, steps.expm1().log()]


def transformers_scan() -> Callable[..., Any] | None:
    """transformers' torch path, where it is installed."""
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError:
        return None
    return mamba_selective_scan


def timed(which: str, scan: Callable[..., Any], inputs: list[Any]) -> Callable[[], object]:
    def out(values: list[Any]) -> Tensor:
        results = scan(*values, True)
        return results[0] if isinstance(results, tuple) else results

    if which == "forward":
        return torch.no_grad()(partial(out, inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = out(leaves)
    dout = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, dout, retain_graph=True)


def check(shape: Shape, inputs: list[Any], peer: Callable[..., Any]) -> None:
    """A wrong kernel, or another question, must not get a time."""
    ours: Callable[..., Any] = lcore.selective_scan
    got, want = ours(*inputs, True), peer(*inputs, True)
    want = want[0] if isinstance(want, tuple) else want
    error = ((got - want).abs().max() / want.abs().max()).item()
    if not error <= TOLERANCE[shape.dtype]:
        raise AssertionError(f"bench: the scan is wrong: relative error {error:.2e}")


def scan_row(which: str, shape: Shape, peer_len: int, seconds: float) -> Row:
    inputs = shape.scan_inputs()
    short = Shape(**{**asdict(shape), "len": min(peer_len, shape.len)})
    short_inputs = short.scan_inputs()
    peers = {"transformers": transformers_scan(), "loop": reference.selective_scan}
    peak = Peak("fma")
    calls: dict[Any, Callable[[], object]] = {"lcore": timed(which, lcore.selective_scan, inputs), "peak": peak}
    for name, peer in peers.items():
        if peer is not None:
            check(short, short_inputs, peer)
            calls[name] = timed(which, peer, short_inputs)
    times = median_seconds(calls, seconds)
    elements = shape.batch * shape.dim * shape.len
    rate = elements / times["lcore"] / 1e6
    rates = {name: elements / shape.len * short.len / times[name] / 1e6 for name in peers if name in times}
    gflops = 2 * MULTIPLY_ADDS[which] * shape.states * rate / 1e3
    return {
        "kind": "selective_scan", "pass": which, **asdict(shape), "ms": times["lcore"] * 1e3, "melements_per_s": rate,
        "peak_gflops": peak.median, "of_peak": gflops / peak.median, "peer_len": short.len,
        "transformers_melements": rates.get("transformers"), "loop_melements": rates["loop"],
        "speedup_transformers": rate / rates["transformers"] if "transformers" in rates else None,
        "speedup_loop": rate / rates["loop"],
    }  # fmt: skip


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.silu(functional.conv1d(x, weight, bias, padding=3, groups=x.shape[1])[..., : x.shape[2]])


def conv_row(shape: Shape, seconds: float) -> Row:
    x, weight, bias = shape.activation(shape.dim), torch.randn(shape.dim, 4), torch.randn(shape.dim)
    call = partial(lcore.causal_conv1d, x, weight, bias, activation="silu")
    theirs = partial(torch_conv, x, weight[:, None].to(x.dtype), bias.to(x.dtype))
    error = ((call() - theirs()).abs().max() / call().abs().max()).item()
    if not error <= TOLERANCE[shape.dtype]:
        raise AssertionError(f"bench: the convolution is wrong: relative error {error:.2e}")
    times = median_seconds({"lcore": call, "copy": x.clone, "torch": theirs}, seconds)
    return {
        "kind": "causal_conv1d", **asdict(shape), "ms": times["lcore"] * 1e3,
        "gbytes_per_s": 2 * x.nbytes / times["lcore"] / 1e9, "copy_gbytes_per_s": 2 * x.nbytes / times["copy"] / 1e9,
        "of_copy": times["copy"] / times["lcore"], "torch_ms": times["torch"] * 1e3,
        "speedup": times["torch"] / times["lcore"],
    }  # fmt: skip


def torch_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    state.mul_(torch.exp(dt[..., None] * A)).add_((dt * x)[..., None] * B[:, None])
    return torch.einsum("bdn,bn->bd", state, C) + D * x


def update_row(batch: int, dim: int, states: int, seconds: float) -> Row:
    state, other = (torch.randn(batch, dim, states) for _ in range(2))
    x, dt = torch.randn(batch, dim), torch.rand(batch, dim)
    A, B, C = -torch.rand(dim, states), torch.randn(batch, states), torch.randn(batch, states)
    arguments = (x, dt, A, B, C, torch.ones(dim))
    torch.testing.assert_close(
        lcore.selective_state_update(state.clone(), *arguments), torch_update(state.clone(), *arguments)
    )
    calls: dict[Any, Callable[[], object]] = {
        "lcore": partial(lcore.selective_state_update, state, *arguments),
        "torch": partial(torch_update, state, *arguments),
        "copy": partial(other.copy_, state),
    }
    times = median_seconds(calls, seconds)
    return {
        "kind": "state_update", "batch": batch, "dim": dim, "states": states, "ms": times["lcore"] * 1e3,
        "gbytes_per_s": 2 * state.nbytes / times["lcore"] / 1e9, "of_copy": times["copy"] / times["lcore"],
        "torch_ms": times["torch"] * 1e3, "speedup": times["torch"] / times["lcore"],
    }  # fmt: skip


def full_set() -> list[Shape]:
    """Mamba-130m's inner width at 16 states in each dtype and layout, then more states, and a batch of short rows."""
    shapes = [Shape(dtype, layout, 1, 1536, 16, 2048) for dtype in ("fp32", "bf16") for layout in LAYOUTS]
    shapes += [Shape("fp32", LAYOUTS[0], 1, 512, states, 2048) for states in (8, 32, 64, 128)]
    return [*shapes, Shape("fp32", LAYOUTS[0], 16, 1536, 16, 128)]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--states", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--pass", dest="passes", choices=PASSES, nargs="+", default=list(PASSES))
    parser.add_argument("--peer-len", type=int, default=128, help="steps that transformers and the torch loop get")
    parser.add_argument("--full-set", action="store_true", help="the published set, instead of all of the above")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    torch.manual_seed(0)
    if args.full_set:
        todo = full_set()
    else:
        todo = [
            Shape(dtype, layout, args.batch, args.dim, states, args.len)
            for states in args.states for dtype in args.dtype for layout in args.layout
        ]  # fmt: skip
    ceilings = peaks()
    rows = []
    for number, shape in enumerate(todo, 1):
        print(f"{number}/{len(todo)} {shape}", file=sys.stderr)
        rows += [scan_row(which, shape, args.peer_len, args.seconds) for which in args.passes]
    length = CONV_LEN if args.full_set else args.len
    convolutions = [
        Shape(dtype, layout, args.batch, args.dim, 0, length) for dtype in args.dtype for layout in args.layout
    ]
    rows += [conv_row(shape, args.seconds) for shape in convolutions]
    updates = [(64, 1536, 16), (16, 1536, 128)] if args.full_set else [(16, args.dim, n) for n in args.states]
    rows += [update_row(batch, dim, states, args.seconds) for batch, dim, states in updates]
    content = result("recurrent", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
