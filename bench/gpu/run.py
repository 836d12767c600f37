"""The parts, and the result file that remembers which of them are done."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.gpu import attention, checks, recurrent
from bench.gpu.device import Device
from bench.machine import Row
from lcore.machine import describe

Run = Callable[[Device, dict[str, float]], list[Row]]
PARTS: dict[str, Run] = {
    "ceilings": checks.ceilings, "tests": checks.tests, "memcheck": checks.memcheck, "racecheck": checks.racecheck,
    "merge_states": attention.merge, "attention_forward": attention.forward, "attention_backward": attention.backward,
    "decode": attention.decode, "scan": recurrent.scan, "ssd": recurrent.ssd, "conv1d": recurrent.conv1d,
    "linear": recurrent.linear,
}  # fmt: skip
LIMIT = 480.0  # seconds a part
Runner = Callable[[str, Device, dict[str, float], float], list[Row]]


class Results:
    """A result file: "parts" says of each what became of it and when, "rows" holds the rows, each with its "part"."""

    def __init__(self, path: Path, device: Device) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        machine = {**describe(), **device.facts()}
        self.commit = machine["commit"]
        if self.content and self.content["machine"]["gpu"] != machine["gpu"]:
            raise ValueError(f"bench.gpu: {path} is of {self.content['machine']['gpu']}, this is {machine['gpu']}")
        self.content = {"bench": "gpu", "machine": machine, "peaks": {}, "parts": {}, "rows": [], **self.content}
        self.content["machine"] = machine

    @property
    def peaks(self) -> dict[str, float]:
        return self.content["peaks"]

    def done(self, part: str) -> bool:
        """Whether it ran to its end at this commit."""
        found = self.content["parts"].get(part, {})
        return found.get("status") == "done" and found.get("commit") == self.commit

    def put(self, part: str, outcome: dict[str, Any], rows: list[Row]) -> None:
        """Takes the place of what the file holds of the part, and writes the file whole."""
        self.content["parts"][part] = {**outcome, "commit": self.commit}
        kept = [row for row in self.content["rows"] if row["part"] != part]
        self.content["rows"] = kept + [{"part": part, **row} for row in rows]
        for row in rows:
            if row["kind"] == "gpu_ceilings":
                self.content["peaks"] = {name: row[name] for name in ("copy_gbytes", "bf16_tflops")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        beside.replace(self.path)


def here(part: str, device: Device, peaks: dict[str, float], limit: float) -> list[Row]:
    return PARTS[part](device, peaks)


def in_child(part: str, device: Device, peaks: dict[str, float], limit: float) -> list[Row]:
    """In a process of its own: a fault on the device, or a part that hangs, ends with it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.gpu", "--device", device.name, "--child", part, "--out", str(rows)]
        command += ["--peaks", json.dumps(peaks)]
        done = subprocess.run(command, timeout=limit, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{part} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(rows.read_text())


def run_parts(
    parts: Iterable[str], results: Results, device: Device, *, runner: Runner = in_child, again: bool = False,
    limit: float = LIMIT, say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Runs what is not done. Whether all parts are done now; one that fails does not keep the others from running."""
    well = True
    for part in parts:
        if results.done(part) and not again:
            say(f"{part}: done before")
            continue
        before, start = device.facts(), time.perf_counter()
        outcome: dict[str, Any] = {"status": "done", "date": describe()["date"]}
        rows: list[Row] = []
        try:
            rows = runner(part, device, dict(results.peaks), limit)
            bad = [row for row in rows if row.get("status") in ("wrong", "failed", "found errors", "none ran")]
            if bad:
                outcome.update(status="failed", error=f"{len(bad)} rows are wrong: see their status")
        except subprocess.TimeoutExpired:
            outcome.update(status="failed", error=f"took more than {limit:.0f} s")
        except Exception:
            outcome.update(status="failed", error=traceback.format_exc(limit=3)[-4000:])
        outcome.update(seconds=time.perf_counter() - start, before=before, after=device.facts())
        results.put(part, outcome, rows)
        well &= outcome["status"] == "done"
        say(f"{part}: {outcome['status']}, {len(rows)} rows, {outcome['seconds']:.0f} s")
    return well
