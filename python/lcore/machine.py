"""What a result file says about where it was measured."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lcore.info import build_info


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The source's commit, with "+" when tracked files differ from it; "unknown" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def describe() -> dict[str, Any]:
    """Date, commit, processor, threads, instruction set, and the versions of lcore, torch and Python."""
    info = build_info()
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
