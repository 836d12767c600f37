"""The machine's own ceilings, and result files."""

from __future__ import annotations

import json
import statistics
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


def ceiling(ceilings: dict[str, float], dtype: str) -> str:
    """Name of the peak that a kernel on this dtype is held to."""
    return "dot_bf16" if dtype == "bf16" and ceilings["dot_bf16_gflops"] > 0 else "fma"


class Peak:
    """One of the machine's ceilings, measured in turn with the calls that are held to it."""

    def __init__(self, name: str) -> None:
        self._name = name.removesuffix("_bf16")
        self._rates: list[float] = []

    def __call__(self) -> None:
        self._rates.append(torch.ops.lcore._peak(self._name, 1) / 1e9)

    @property
    def median(self) -> float:
        """GFLOP/s, or GB/s."""
        return statistics.median(self._rates)


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
