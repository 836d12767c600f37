"""The machine's own ceilings, and result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import lcore  # noqa: F401  (defines torch.ops.lcore)
from lcore.machine import describe

Row = dict[str, Any]


def peaks() -> dict[str, float]:
    """GFLOP/s of float32 multiply-adds and of bfloat16 dot products (0: the instruction set has none), and GB/s of
    reads, with as many threads as torch uses.
    """
    return {
        "fma_gflops": torch.ops.lcore._peak("fma") / 1e9,
        "dot_bf16_gflops": torch.ops.lcore._peak("dot") / 1e9,
        "read_gbytes": torch.ops.lcore._peak("read") / 1e9,
    }


def ceiling(ceilings: dict[str, float], dtype: str) -> tuple[str, float]:
    """Name and GFLOP/s of the peak that a kernel on this dtype is held to."""
    if dtype == "bf16" and ceilings["dot_bf16_gflops"] > 0:
        return "dot_bf16", ceilings["dot_bf16_gflops"]
    return "fma", ceilings["fma_gflops"]


def result(bench: str, ceilings: dict[str, float], rows: list[Row]) -> dict[str, Any]:
    """What a result file holds."""
    return {"bench": bench, "machine": describe(), "peaks": ceilings, "rows": rows}


def write_json(target: str, content: dict[str, Any]) -> None:
    """Prints the result, or writes it to a file, as JSON."""
    text = json.dumps(content, indent=1) + "\n"
    if target == "-":
        print(text, end="")
    else:
        Path(target).write_text(text)
