"""What has run where, op by op: ``python -m bench.status`` writes it into README.md between two marks.

Of each op with a kernel: on the CPU, the best figure of the newest result file that has one; on CUDA, whether the
kernels run emulated in the tests, and the best figure measured on a GPU. Nothing in the table is typed by hand.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.machine import Row
from lcore.errors import KERNEL_DEVICES

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, TESTS = ROOT / "README.md", ROOT / "bench" / "results", ROOT / "tests"
BEGIN, END = "<!-- written by python -m bench.status -->", "<!-- end of bench.status -->"

# The op and the figure of a row by its kind; an op of "" stands in the row itself.
FIGURES: dict[str, tuple[str, str, str]] = {
    "attention": ("attention", "gflops", "{:.0f} GFLOP/s"),
    "decode": ("attention_paged", "gbytes_per_s", "{:.1f} GB/s of KV"),
    "key_mass": ("key_mass", "gflops", "{:.0f} GFLOP/s"),
    "page_bounds": ("", "gbytes_per_s", "{:.1f} GB/s"),
    "selective_scan": ("selective_scan", "melements_per_s", "{:.0f} M elements/s"),
    "causal_conv1d": ("causal_conv1d", "gbytes_per_s", "{:.1f} GB/s"),
    "state_update": ("selective_state_update", "gbytes_per_s", "{:.1f} GB/s of states"),
    "linear_attention": ("", "tokens_per_s", "{:.0f} tokens/s"),
}
# bench.linear_attention's names.
LONG_NAMES = {"gla": "gated_linear_attention", "delta": "gated_delta_rule"}
GPU_FIGURES = {  # by the column that a row has
    "tflops": "{:.0f} TFLOP/s", "gbytes_per_s": "{:.0f} GB/s", "elements_per_s": "{:.2g} elements/s",
    "tokens_per_s": "{:.2g} tokens/s",
}  # fmt: skip
Figure = tuple[float, str]  # of its kind the larger, the better; and what the table says


def emulated() -> set[str]:
    """The ops whose CUDA kernels the tests run: names given to cuda_kernels, or collected in a tuple OPS."""
    found = set()
    for path in TESTS.glob("test_emulator_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            values: Iterable[ast.expr] = ()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cuda_kernels":
                values = node.args
            elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "OPS" for t in node.targets):
                values = node.value.elts if isinstance(node.value, (ast.Tuple, ast.List)) else ()
            found |= {v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    return found


def cpu_figure(row: Row) -> tuple[str, Figure] | None:
    if row["kind"] not in FIGURES:
        return None
    op, column, form = FIGURES[row["kind"]]
    value = row.get(column)
    if value is None:
        return None
    name = op or row["op"].partition(" ")[0]
    return LONG_NAMES.get(name, name), (value, form.format(value))


def gpu_figure(row: Row) -> tuple[str, Figure] | None:
    column = next((name for name in GPU_FIGURES if row.get(name)), None)
    if column is None or row.get("status") != "ok":
        return None
    return row["op"], (row[column], GPU_FIGURES[column].format(row[column]))


def results() -> Iterator[dict[str, Any]]:
    """Contents of the result files, oldest first."""
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if "machine" in content and isinstance(content.get("rows"), list):
            yield content


def best(figure: Callable[[Row], tuple[str, Figure] | None], on_gpu: bool) -> dict[str, str]:
    """By op, the best figure of the newest file with its machine and date."""
    said: dict[str, str] = {}
    for content in results():
        machine = content["machine"]
        if ("gpu" in machine) != on_gpu:
            continue
        found: dict[str, Figure] = {}
        for op, value in filter(None, map(figure, content["rows"])):
            found[op] = max(found.get(op, value), value)
        where = f" on {machine['gpu']}" if on_gpu else ""
        said.update({op: f"{words}{where}, {machine['date']}" for op, (_, words) in found.items()})
    return said


def table() -> str:
    runs, cpu, gpu = emulated(), best(cpu_figure, False), best(gpu_figure, True)
    lines = ["| op | CPU | CUDA, emulated in the tests | CUDA, measured |", "|---|---|---|---|"]
    for op, devices in sorted(KERNEL_DEVICES.items()):
        both = op in runs and f"{op}_backward" in runs
        emulation = "forward and backward" if both else "yes" if op in runs else "–"
        measured = gpu.get(op, "not yet" if "cuda" in devices else "–")
        lines.append(f"| `{op}` | {cpu.get(op, 'tested')} | {emulation} | {measured} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The text with the table between its marks renewed."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"bench.status: README.md has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    README.write_text(page(README.read_text()))


if __name__ == "__main__":
    main()
