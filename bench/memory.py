"""Peak memory of one forward, in a process of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

import lcore
from bench.shapes import Shape
from bench.torch_peers import sdpa


def forward_bytes(shape: Shape, peer: bool = False) -> int | None:
    """Bytes that lcore's forward (peer: torch's) needs at its worst moment beside inputs and outputs.

    None where the system does not tell a process its largest resident set (Linux does), or torch cannot do the shape.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure, shape, peer).result()


def _measure(shape: Shape, peer: bool) -> int | None:
    q, k, v, _ = shape.inputs()
    if peer:
        calls = list(sdpa(shape).values())
        if not calls:
            return None
        inputs = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        before = _start(q)
        out = calls[-1](*inputs)
        outputs = out.nbytes
    else:
        before = _start(q)
        out, lse = shape.attention_and_lse(shape.ours(q), shape.ours(k), shape.ours(v))
        outputs = out.nbytes + lse.nbytes
    after = _status("VmHWM")
    if before is None or after is None:
        return None
    return max(0, after - before - outputs)


def _start(q: Tensor) -> int | None:
    """Runs both libraries once, so that their threads are not counted, and sets the mark to what is resident now."""
    small = q[:, :64, :1]
    lcore.attention(small, small, small)
    small = small.transpose(1, 2)
    F.scaled_dot_product_attention(small, small, small)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(values[0]) * 1024 if values else None
