"""The result file of a run on a GPU as markdown: ``python -m bench.gpu.tables FILE.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import Row

HIDDEN = ("part", "kind", "op", "errors", "tail", "peers", "seconds", "graphs", "packed", "window")


def cells(row: Row) -> dict[str, str]:
    """A row's columns; times in microseconds, lcore's first, then the peers'."""
    shown = {name: text(value) for name, value in row.items() if name not in HIDDEN}
    times = {"lcore": row.get("seconds"), **row.get("peers", {})}
    return {**shown, **{f"{name} µs": text(seconds and seconds * 1e6) for name, seconds in times.items()}}


def text(value: Any) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[Row]) -> str:
    """Without the columns that are empty throughout."""
    lines = [cells(row) for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    used = [name for name in names if any(line.get(name) for line in lines)]
    body = [[line.get(name, "") for name in used] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [used, ["---"] * len(used), *body])


def markdown(content: dict[str, Any]) -> str:
    machine, peaks = content["machine"], content["peaks"]
    facts = [str(machine["gpu"])]
    facts += [f"driver {machine['driver_version']}"] if "driver_version" in machine else []
    facts += (
        [f"copy {peaks['copy_gbytes']:.0f} GB/s", f"bf16 product {peaks['bf16_tflops']:.0f} TFLOP/s"] if peaks else []
    )
    facts += [f"torch {machine['torch']}", f"lcore {machine['commit']}", str(machine["date"])]
    parts = ["; ".join(facts)]
    for part, outcome in content["parts"].items():
        rows = [row for row in content["rows"] if row["part"] == part]
        parts.append(f"**{part}**: {outcome['status']}, {outcome['seconds']:.0f} s")
        if "error" in outcome:
            parts.append("```\n" + outcome["error"] + "\n```")
        if rows:
            parts.append(table(rows))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    for path in argv:
        print(markdown(json.loads(Path(path).read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
