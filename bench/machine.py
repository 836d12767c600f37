"""The machine's own ceilings, and result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import lcore  # noqa: F401  (defines torch.ops.lcore)


def peaks() -> dict[str, float]:
    """GFLOP/s of float32 multiply-adds and GB/s of reads, with as many threads as torch uses."""
    return {
        "fma_gflops": torch.ops.lcore._peak("fma") / 1e9,
        "read_gbytes": torch.ops.lcore._peak("read") / 1e9,
    }


def write_json(target: str, result: dict[str, Any]) -> None:
    """Prints the result, or writes it to a file, as JSON."""
    text = json.dumps(result, indent=1) + "\n"
    if target == "-":
        print(text, end="")
    else:
        Path(target).write_text(text)
