"""The WKV of RWKV-4 on the CPU: ``python -m bench.rwkv4_wkv [--json FILE]``.

M elements are batch x dim x len a second; a backward is timed alone, on a graph that is kept. GB/s count k, v and out
once (backward: k, v, their gradients and that of out), beside torch's clone of k. The speed-up is over the recurrence
in plain torch (lcore.reference), at --peer-len steps, forward alone or backward alone. Calls take turns.
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
from bench.machine import Row, peaks, result, write_json
from bench.shapes import DTYPES, PASSES
from bench.tables import show
from bench.timer import median_seconds
from lcore import reference

TENSORS = {"forward": 3, "backward": 5}  # of k's size, read or written


def timed(which: str, wkv: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], object]:
    if which == "forward":
        return torch.no_grad()(partial(wkv, *inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = wkv(*leaves)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def measure(which: str, dtype: str, batch: int, dim: int, length: int, peer_len: int, seconds: float) -> Row:
    w, u = -torch.rand(dim), torch.randn(dim)
    k, v = (torch.randn(batch, length, dim).to(DTYPES[dtype]) for _ in range(2))
    short = [w, u, k[:, :peer_len], v[:, :peer_len]]
    got, want = lcore.rwkv4_wkv(*short), reference.rwkv4_wkv(*short)
    torch.testing.assert_close(got, want)
    calls: dict[Any, Callable[[], object]] = {
        "lcore": timed(which, lcore.rwkv4_wkv, [w, u, k, v]),
        "loop": timed(which, reference.rwkv4_wkv, short),
        "copy": k.clone,
    }
    times = median_seconds(calls, seconds)
    moved, elements = TENSORS[which] * k.nbytes, k.numel()
    rate = elements / times["lcore"]
    return {
        "kind": "rwkv4_wkv", "which": which, "dtype": dtype, "batch": batch, "dim": dim, "len": length,
        "ms": times["lcore"] * 1e3, "melements_per_s": rate / 1e6, "gbytes_per_s": moved / times["lcore"] / 1e9,
        "of_copy": moved / times["lcore"] / (2 * k.nbytes / times["copy"]), "peer_len": short[2].shape[1],
        "speedup": rate / (short[2].numel() / times["loop"]),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--pass", dest="passes", choices=PASSES, nargs="+", default=list(PASSES))
    parser.add_argument("--peer-len", type=int, default=256, help="steps that the torch loop gets")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each figure, if its calls are short")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    ceilings = peaks()
    rows = [
        measure(which, dtype, args.batch, args.dim, args.len, args.peer_len, args.seconds)
        for which in args.passes for dtype in args.dtype
    ]  # fmt: skip
    content = result("rwkv4_wkv", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
