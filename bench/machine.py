"""What a result file says about where it was measured, and the ceilings of that place."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import lcore


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The source's commit, with "+" when files differ from it; "unknown" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def peaks() -> dict[str, float]:
    """GFLOP/s of float32 multiply-adds and GB/s of reads, with as many threads as torch uses."""
    return {
        "fma_gflops": torch.ops.lcore._peak("fma") / 1e9,
        "read_gbytes": torch.ops.lcore._peak("read") / 1e9,
    }


def describe() -> dict[str, Any]:
    info = lcore.build_info()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "processor": processor(),
        "threads": info["threads"],
        "cpu_isa": info["cpu_isa"],
        "lcore": info["version"],
        "torch": info["torch"],
        "python": platform.python_version(),
    }


def write_json(target: str, result: dict[str, Any]) -> None:
    """Prints the result, or writes it to a file, as JSON."""
    text = json.dumps(result, indent=1) + "\n"
    if target == "-":
        print(text, end="")
    else:
        Path(target).write_text(text)
