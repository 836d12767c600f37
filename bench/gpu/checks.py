"""What comes before the figures: the tests on the device, again under compute-sanitizer, and the device's ceilings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu.device import Device
from bench.machine import Row

ROOT = Path(__file__).resolve().parents[2]
FOUND = 77  # exit status when compute-sanitizer has found something
SMALL_SET = "values or gradients"  # of test names: under the sanitizer a test takes a hundred times as long


def pytest(*options: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit status and output of the tests marked gpu."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", *options]
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_gpu_*.py"))
    done = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def counts(output: str) -> dict[str, int]:
    words = ("passed", "failed", "skipped", "error")
    return {word: sum(int(n) for n in re.findall(rf"(\d+) {word}", output.splitlines()[-1])) for word in words}


def tests(device: Device, peaks: dict[str, float]) -> list[Row]:
    status, output = pytest()
    found = counts(output or "\n")
    word = "failed" if status != 0 else "ok" if found["passed"] else "none ran"
    return [{"kind": "gpu_tests", "status": word, **found, "tail": [] if word == "ok" else output.splitlines()[-40:]}]


def sanitizer(tool: str) -> list[Row]:
    program = shutil.which("compute-sanitizer")
    row = {"kind": "gpu_sanitizer", "tool": tool}
    if program is None:
        return [{**row, "status": "no compute-sanitizer on PATH"}]
    options = (program, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND))
    status, output = pytest("-k", SMALL_SET, "-x", before=options)
    word = {0: "ok", FOUND: "found errors"}.get(status, "failed")
    return [{**row, "status": word, "tail": output.splitlines()[-40:] if status != 0 else []}]


def memcheck(device: Device, peaks: dict[str, float]) -> list[Row]:
    return sanitizer("memcheck")


def racecheck(device: Device, peaks: dict[str, float]) -> list[Row]:
    return sanitizer("racecheck")


def ceilings(device: Device, peaks: dict[str, float]) -> list[Row]:
    """A large copy, bytes read and written, and a large product of bf16 matrices of random numbers."""
    side, numbers = (64, 1 << 16) if device.small else (8192, 1 << 30)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device.name) for _ in range(2))
    x = torch.randn(numbers, dtype=torch.bfloat16, device=device.name)
    y = torch.empty_like(x)
    times = device.seconds({"copy": lambda: y.copy_(x), "product": lambda: a @ b})
    return [{
        "kind": "gpu_ceilings", "status": "ok", "copy_gbytes": 2 * x.nbytes / times["copy"] / 1e9,
        "bf16_tflops": 2 * side**3 / times["product"] / 1e12,
    }]  # fmt: skip
