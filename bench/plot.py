"""Speed over length, as a picture."""

from __future__ import annotations

import importlib.util
from typing import Any

from bench.machine import Row


def require() -> None:
    """Refuses before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("bench: --plot needs matplotlib, which is not installed: pip install 'lcore[bench]'")


def _figure(title: str, unit: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no window system is asked for

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="tokens", ylabel=unit)
    axes.set_xscale("log", base=2)
    return figure, axes


def _lines(axes: Any, rows: list[Row], label: tuple[str, ...], x: str, ours: str, theirs: str) -> None:
    """One solid line a combination of label columns, and torch's dashed in its colour."""
    for number, key in enumerate(dict.fromkeys(tuple(row[name] for name in label) for row in rows)):
        points: dict[int, Row] = {}
        for row in rows:
            if tuple(row[name] for name in label) == key:
                points.setdefault(row[x], row)
        text = " ".join(str(part) for part in key)
        for column, style, who in ((ours, "o-", "lcore"), (theirs, "x--", "torch")):
            line = [(at, row[column]) for at, row in sorted(points.items()) if row[column] is not None]
            if line:
                axes.plot(*zip(*line, strict=True), style, color=f"C{number}", label=f"{who} {text}")


def _finish(figure: Any, axes: Any, levels: dict[str, float], path: str) -> None:
    for name, level in levels.items():
        if level > 0:
            axes.axhline(level, color="grey", linestyle=":")
            axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def draw_attention(result: dict[str, Any], path: str) -> None:
    """Forward GFLOP/s (backward where nothing else was measured) over length, a line a (dtype, head_dim)."""
    rows = [row for row in result["rows"] if row["kind"] == "attention" and not row["packed"] and row["window"] is None]
    which = "forward" if any(row["pass"] == "forward" for row in rows) else "backward"
    causal = any(row["causal"] for row in rows)
    rows = [row for row in rows if row["pass"] == which and row["causal"] == causal]
    mask = "causal" if causal else "full"
    figure, axes = _figure(f"attention {which}, {mask}: {result['machine']['processor']}", "GFLOP/s")
    _lines(axes, rows, ("dtype", "head_dim"), "seq", "gflops", "torch_gflops")
    levels = {"FMA peak": result["peaks"]["fma_gflops"], "bf16 dot-product peak": result["peaks"]["dot_bf16_gflops"]}
    _finish(figure, axes, levels, path)


def draw_decode(result: dict[str, Any], path: str) -> None:
    """GB/s of keys and values over length for the fewest new tokens measured, a line a format; torch with its heads
    packed by hand."""
    rows = [row for row in result["rows"] if row["kind"] == "decode"]
    fewest = min(row["new_tokens"] for row in rows)
    rows = [row for row in rows if row["new_tokens"] == fewest]
    for row in rows:
        ratio = row["speedup_packed"]
        row["torch_gbytes_per_s"] = None if ratio is None else row["gbytes_per_s"] / ratio
    figure, axes = _figure(f"decode, {fewest} new: {result['machine']['processor']}", "GB/s of keys and values")
    _lines(axes, rows, ("kv_format",), "tokens", "gbytes_per_s", "torch_gbytes_per_s")
    _finish(figure, axes, {"read bandwidth": result["peaks"]["read_gbytes"]}, path)


def draw_cache(result: dict[str, Any], path: str) -> None:
    """Mean KL divergence over bits a value, a point a format; rotated ones beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(title="what a format loses", xlabel="bits a value", ylabel="mean KL divergence")
    bits = {row["kv_format"]: row["bits_per_value"] for row in result["rows"] if row["kind"] == "cache_speed"}
    for rotate, style in ((False, "o"), (True, "x")):
        rows = [row for row in result["rows"] if row["kind"] == "cache_quality" and row["rotate"] == rotate]
        points = [(bits[row["kv_format"]], row["kl_mean"], row["kv_format"]) for row in rows if row["kl_mean"] > 0]
        if points:
            axes.plot(
                [x for x, _, _ in points], [y for _, y, _ in points], style, label="rotated" if rotate else "plain"
            )
        for x, y, name in points:
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def draw_hybrid(result: dict[str, Any], path: str) -> None:
    """Recall by length, and by needles at one length; speed of reading and of writing, and bytes kept, by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(f"attention, recurrent, hybrid: {result['machine']['processor']}")
    recall = [row for row in result["rows"] if row["kind"] == "hybrid_recall"]
    usual = recall[0]["needles"]
    loaded = [row["tokens"] for row in recall if row["needles"] != usual]
    speed = [row for row in result["rows"] if row["kind"] == "hybrid_speed"]
    panels = (
        ("tokens", "recall", f"share of {usual} needles found", [row for row in recall if row["needles"] == usual]),
        ("needles", "recall", "share found by needles", [row for row in recall if row["tokens"] in loaded]),
        ("tokens", "kbytes", "kB kept", speed),
        ("tokens", "read_tokens_per_s", "tokens/s read", speed),
        ("tokens", "written_tokens_per_s", "tokens/s written", speed),
    )
    for place, (x, y, title, rows) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 3, place, title=title, xlabel=x)
        axes.set_xscale("log", base=2)
        for number, model in enumerate(rows[0][y] if rows else ()):
            line = sorted((row[x], row[y][model]) for row in rows)
            axes.plot(*zip(*line, strict=True), "o-", color=f"C{number}", label=model)
        if y == "kbytes":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
