"""Linear attention on the CPU: ``python -m bench.linear_attention [--json FILE]``.

GFLOP/s count what a chunk of 64 tokens needs, products of pairs i >= j and of states: 2 (2080 (K + V) + 128 K V) a
head, for the delta rule twice the pairs and 1.5 times the states, for RWKV-7 four times and twice; a backward twice the
forward, what it computes again not counted. A backward is timed alone, on a graph that is kept. The speed-up is over
the same recurrence in plain torch: by chunks of batched matrix products, and token by token (forward only), in float32.
"ssd gated" is with D and z. "step" is one token for each of `tokens` rows with a state each; its GB/s count the state
read and written once. lcore, torch and the machine's peak take turns. --full-set measures what is published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lcore
from bench.linear_peers import CHUNK, chunked, looped, mlstm
from bench.machine import Peak, Row, peaks, result, write_json
from bench.shapes import DTYPES
from bench.tables import show
from bench.timer import median_seconds

OPS = ("gla", "gla channel", "delta", "delta channel", "ssd", "ssd gated", "rwkv6", "rwkv7", "mlstm")
LOOP_TOKENS = 2048  # a longer loop takes seconds


@dataclass(frozen=True)
class Shape:
    """A pass over `tokens` tokens of one sequence; a step: one token for each of `tokens` sequences."""

    which: str  # forward, backward, step
    op: str
    dtype: str
    tokens: int
    heads: int
    key_dim: int
    value_dim: int

    def flops(self) -> float:
        """A multiply-add counts two."""
        pairs, states = {"delta": (2, 3), "delta channel": (2, 3), "rwkv7": (4, 4)}.get(self.op, (1, 2))
        a_chunk = pairs * CHUNK * (CHUNK + 1) // 2 * (self.key_dim + self.value_dim)
        a_chunk += states * CHUNK * self.key_dim * self.value_dim
        return 2 * a_chunk * self.heads * self.tokens / CHUNK * (2 if self.which == "backward" else 1)

    def state_bytes(self) -> int:
        return 2 * 4 * self.tokens * self.heads * self.key_dim * self.value_dim

    def inputs(self) -> dict[str, Tensor]:
        """Standard normal, keys of length 1, decays of e^-0.05 on average."""
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.empty(sizes).normal_(generator=generator)

        lead = (self.tokens, 1) if self.which == "step" else (1, self.tokens)
        one = (*lead, self.heads)
        inputs = {
            "q": normal(*one, self.key_dim), "k": F.normalize(normal(*one, self.key_dim), dim=-1),
            "v": normal(*one, self.value_dim),
        }  # fmt: skip
        inputs = {name: x.to(DTYPES[self.dtype]) for name, x in inputs.items()}
        if self.op == "mlstm":
            return {**inputs, "i": normal(*one), "f": normal(*one) + 3}
        channels = "channel" in self.op or self.op.startswith("rwkv")
        inputs["g"] = -0.05 * normal(*(one if not channels else (*one, self.key_dim))).abs()
        if self.op.startswith("delta"):
            inputs["beta"] = normal(*one).sigmoid()
        if self.op == "rwkv6":
            inputs["u"] = normal(self.heads, self.key_dim)
        if self.op == "rwkv7":
            inputs["a"] = -F.normalize(normal(*one, self.key_dim), dim=-1).to(DTYPES[self.dtype])
            inputs["b"] = -0.5 * inputs["a"]
        if self.op == "ssd gated":
            inputs["D"] = normal(self.heads)
            inputs["z"] = normal(*one, self.value_dim).to(DTYPES[self.dtype])
        return inputs


def ours(op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, **more: Any) -> Tensor:
    if g is None:
        return lcore.mlstm(q, k, v, **more, scale=1.0)
    if op.startswith("ssd"):  # dt = -g, A = -1
        return lcore.ssd(v, -g, -torch.ones(v.shape[2]), k, q, D=more.get("D"), z=more.get("z"))
    if op == "rwkv7":
        return lcore.rwkv7(q, g, k, v, **more)
    if op == "rwkv6":
        return lcore.rwkv6(q, k, v, g, **more)
    if op.startswith("delta"):
        return lcore.gated_delta_rule(q, k, v, g, **more, scale=1.0)
    return lcore.gated_linear_attention(q, k, v, g, scale=1.0)


def theirs(
    by: Callable[..., Tensor], op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, **more: Any
) -> Tensor:
    if g is None:
        return mlstm(by, q, k, v, **more)
    if not op.startswith("ssd"):
        return by(q, k, v, g, **more)
    out = by(q, k, v.float() * -g[..., None], g)
    if op == "ssd gated":
        out = (out + v * more["D"][:, None]) * F.silu(more["z"].float())
    return out.to(v.dtype)


def timed(shape: Shape, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], object]:
    """What is timed: a forward, or a backward alone."""
    if shape.which == "forward":
        return lambda: call(**inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = call(**leaves)
    dout = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)


def step(op: str, state: Tensor, **inputs: Any) -> Callable[[], object]:
    """The first token of each row; ssd's is that of gla."""
    token = {name: x if name == "u" else x[:, 0] for name, x in inputs.items()}
    if op == "mlstm":
        states = (state, torch.zeros(state.shape[:-1]), torch.zeros(state.shape[:2]))
        return lambda: lcore.mlstm_update(states, **token)
    if op == "rwkv7":
        token["w"] = token.pop("g")
    if op.startswith("rwkv"):
        token["r"] = token.pop("q")
    names = {"rwkv6": "rwkv6", "rwkv7": "rwkv7", "delta": "gated_delta_rule", "delta channel": "gated_delta_rule"}
    update = getattr(lcore, f"{names.get(op, 'gated_linear_attention')}_update")
    return lambda: update(state, **token)


def measure(shape: Shape, seconds: float) -> Row:
    inputs = shape.inputs()
    peak, read = Peak("fma"), Peak("read")
    calls: dict[Any, Callable[[], object]] = {"peak": peak, "read": read}
    if shape.which == "step":
        state = torch.zeros(shape.tokens, shape.heads, shape.key_dim, shape.value_dim)
        calls["lcore"] = step(shape.op, state, **inputs)
    else:
        want = theirs(chunked, shape.op, **inputs)
        error = ((ours(shape.op, **inputs) - want).float().norm() / want.float().norm()).item()
        if not error <= (1e-4 if shape.dtype == "fp32" else 2e-2):
            raise AssertionError(f"bench: {shape.op} is wrong: relative error {error:.2e}")
        calls["lcore"] = timed(shape, lambda **tensors: ours(shape.op, **tensors), inputs)
        calls["chunked"] = timed(shape, lambda **tensors: theirs(chunked, shape.op, **tensors), inputs)
        if shape.which == "forward" and shape.tokens <= LOOP_TOKENS:
            calls["looped"] = timed(shape, lambda **tensors: theirs(looped, shape.op, **tensors), inputs)
    times = median_seconds(calls, seconds)
    spent = times["lcore"]
    row: Row = {
        "kind": "linear_attention", **asdict(shape), "ms": spent * 1e3, "tokens_per_s": shape.tokens / spent,
        "gflops": None, "peak_gflops": peak.median, "of_peak": None, "gbytes_per_s": None, "of_read_peak": None,
        "chunked_ms": None, "speedup": None, "loop_speedup": None,
    }  # fmt: skip
    if shape.which == "step":
        row["gbytes_per_s"] = shape.state_bytes() / spent / 1e9
        row["of_read_peak"] = row["gbytes_per_s"] / read.median
        return row
    row["gflops"] = shape.flops() / spent / 1e9
    row["of_peak"] = row["gflops"] / peak.median
    row["chunked_ms"], row["speedup"] = times["chunked"] * 1e3, times["chunked"] / spent
    if "looped" in times:
        row["loop_speedup"] = times["looped"] / spent
    return row


def full_set() -> list[Shape]:
    passes = ("forward", "backward")
    sizes = ((64, 64), (128, 128))
    shapes = [Shape(which, op, "fp32", 2048, 8, *dims) for which in passes for op in OPS for dims in sizes]
    shapes += [Shape(which, op, "bf16", 2048, 8, 128, 128) for which in passes for op in OPS]
    return shapes + [Shape("step", op, "bf16", 64, 16, 128, 128) for op in OPS if not op.startswith("ssd")]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, nargs="+", default=["gla", "delta"])
    parser.add_argument("--pass", dest="passes", choices=["forward", "backward", "step"], nargs="+",
                        default=["forward", "backward"])  # fmt: skip
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 64; of a step: rows")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-dim", type=int, default=128)
    parser.add_argument("--value-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=["fp32"])
    parser.add_argument("--full-set", action="store_true", help="the published set, instead of all of the above")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    todo = full_set() if args.full_set else [
        Shape(which, op, dtype, args.tokens, args.heads, args.key_dim, args.value_dim)
        for which in args.passes for op in args.op for dtype in args.dtype
    ]  # fmt: skip
    ceilings = peaks()
    rows = []
    for number, shape in enumerate(todo, 1):
        print(f"{number}/{len(todo)} {shape}", file=sys.stderr)
        rows.append(measure(shape, args.seconds))
    content = result("linear_attention", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
