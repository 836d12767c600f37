"""CPU attention against torch's scaled_dot_product_attention: ``python -m bench.attention [--json [FILE]]``.

GFLOP/s count the pairs that the mask allows: forward 4 * pairs * heads * head_dim, backward 2.5 times that. The
speed-up is torch's median time over lcore's on the same inputs in the same process; torch gets its own layout (batch,
heads, seq, head_dim), contiguous. A backward is forward and backward together, less the forward.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import lcore
from bench.machine import peaks, write_json
from bench.timer import median_seconds
from lcore.machine import describe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def allowed_pairs(seq: int, causal: bool) -> int:
    return seq * (seq + 1) // 2 if causal else seq * seq


def measure(seq: int, head_dim: int, heads: int, dtype: str, causal: bool, backward: bool) -> dict[str, Any]:
    """One row: lcore and torch on the same random normal inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, seq, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    torch_inputs = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    ours = lcore.attention(q, k, v, causal=causal)
    theirs = F.scaled_dot_product_attention(*torch_inputs, is_causal=causal).transpose(1, 2)
    # A wrong kernel must not get a time. bf16 keeps 8 bits: 2^-5 on outputs of size 1 is far above its error.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-5 if dtype == "bf16" else 1e-4)

    seconds = median_seconds(lambda: lcore.attention(q, k, v, causal=causal))
    torch_seconds = median_seconds(lambda: F.scaled_dot_product_attention(*torch_inputs, is_causal=causal))
    flops = 4 * allowed_pairs(seq, causal) * heads * head_dim
    if backward:
        seconds = backward_seconds(lambda *x: lcore.attention(*x, causal=causal), (q, k, v)) - seconds
        both = backward_seconds(lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal), torch_inputs)
        torch_seconds = both - torch_seconds
        flops = flops * 5 // 2
    return {
        "pass": "backward" if backward else "forward",
        "dtype": dtype,
        "seq": seq,
        "heads": heads,
        "head_dim": head_dim,
        "causal": causal,
        "ms": seconds * 1e3,
        "gflops": flops / seconds / 1e9,
        "torch_gflops": flops / torch_seconds / 1e9,
        "speedup": torch_seconds / seconds,
    }


def backward_seconds(call: Any, inputs: Any) -> float:
    """Seconds of forward and backward together."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn_like(call(*leaves))
    return median_seconds(lambda: torch.autograd.grad(call(*leaves), leaves, grad))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--pass", dest="passes", choices=["forward", "backward"], nargs="+",
                        default=["forward", "backward"])  # fmt: skip
    parser.add_argument("--full", action="store_true", help="without the causal mask")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    args = parser.parse_args(argv)

    ceiling = peaks()
    table = Table(title=f"attention, {'full' if args.full else 'causal'}; FMA peak {ceiling['fma_gflops']:.0f} GFLOP/s")
    for column in ("pass", "dtype", "seq", "head_dim", "ms", "GFLOP/s", "of FMA peak", "torch GFLOP/s", "speed-up"):
        table.add_column(column, justify="right")
    rows = []
    for which in args.passes:
        for dtype in args.dtype:
            for head_dim in args.head_dim:
                for seq in args.seq:
                    row = measure(seq, head_dim, args.heads, dtype, not args.full, which == "backward")
                    row["of_fma_peak"] = row["gflops"] / ceiling["fma_gflops"]
                    rows.append(row)
                    cells = [f"{row['ms']:.2f}", f"{row['gflops']:.0f}", f"{row['of_fma_peak']:.0%}"]
                    cells += [f"{row['torch_gflops']:.0f}", f"{row['speedup']:.2f}x"]
                    table.add_row(which, dtype, str(seq), str(head_dim), *cells)
    if args.json != "-":
        Console().print(table)
    if args.json:
        write_json(args.json, {"bench": "attention", "machine": describe(), "peaks": ceiling, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
