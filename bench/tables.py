"""Result rows as tables, on the console and as markdown: ``python -m bench.tables FILE.json [FILE.json ...]``.

Prints what README and docs show, so that no figure is typed by hand. Reads the files of the Python benchmarks and of
those in bench/cpp alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.hybrid_tables import HYBRID
from bench.machine import Row

Column = tuple[str, Callable[[Row], str]]


def _show(key: str, form: str = "{}") -> Callable[[Row], str]:
    return lambda row: "" if row[key] is None else form.format(row[key])


def _yes(key: str) -> Callable[[Row], str]:
    return lambda row: "yes" if row[key] else ""


def _heads(row: Row) -> str:
    heads, kv_heads = row["heads"], row["kv_heads"]
    return str(heads) if heads == kv_heads else f"{heads}/{kv_heads}"


def _mask(row: Row) -> str:
    window = "" if row["window"] is None else f", window {row['window']}"
    return ("causal" if row["causal"] else "full") + window


def _tokens(row: Row) -> str:
    if row["batch"] == 1:
        return str(row["seq"])
    return f"{row['batch']} × {row['seq']}" + (" packed" if row["packed"] else "")


def _torch(row: Row) -> str:
    if row["torch_gflops"] is None:
        return ""
    return f"{row['torch_gflops']:.0f}" + (f" ({row['torch_gqa']})" if row["torch_gqa"] else "")


def _flex(row: Row) -> str:
    return (row["flex_error"] or "").partition(":")[0] or _show("flex_speedup", "{:.2f}×")(row)


_SHAPE: list[Column] = [
    ("dtype", _show("dtype")), ("tokens", _tokens), ("head_dim", _show("head_dim")), ("heads", _heads), ("mask", _mask),
]  # fmt: skip

_SERIES: list[Column] = [
    ("dtype", _show("dtype")), ("contiguous in", _show("layout")), ("batch", _show("batch")), ("dim", _show("dim")),
    ("len", _show("len")),
]  # fmt: skip

COLUMNS: dict[str, list[Column]] = {
    "attention": [
        ("pass", _show("pass")), *_SHAPE, ("ms", _show("ms", "{:.2f}")), ("GFLOP/s", _show("gflops", "{:.0f}")),
        ("of peak", _show("of_peak", "{:.0%}")), ("peak", _show("ceiling")), ("torch SDPA", _torch),
        ("speed-up", _show("speedup", "{:.2f}×")), ("over flex_attention", _flex),
    ],
    "decode": [
        ("cache", lambda row: "paged" if row["paged"] else "dense"), ("format", _show("kv_format")),
        ("tokens", _show("tokens")), ("new", _show("new_tokens")), ("heads", _heads), ("head_dim", _show("head_dim")),
        ("ms", _show("ms", "{:.2f}")), ("tokens/s", _show("tokens_per_s", "{:.0f}")),
        ("GB/s", _show("gbytes_per_s", "{:.1f}")), ("of read peak", _show("of_read_peak", "{:.0%}")),
        ("over enable_gqa", _show("speedup_gqa", "{:.1f}×")), ("over packed heads", _show("speedup_packed", "{:.2f}×")),
    ],
    "cache_speed": [
        ("format", _show("kv_format")), ("before RoPE", _yes("before_rope")), ("tokens", _show("tokens")),
        ("heads", _heads), ("head_dim", _show("head_dim")),
        ("bits a value", _show("bits_per_value", "{:.2f}")), ("MB", _show("mbytes", "{:.1f}")),
        ("decode ms", _show("decode_ms", "{:.2f}")), ("tokens/s", _show("tokens_per_s", "{:.0f}")),
        ("over bf16", _show("decode_speedup", "{:.2f}×")), ("chunk", _show("chunk")),
        ("chunk ms", _show("chunk_ms", "{:.0f}")), ("time over bf16", _show("chunk_ratio", "{:.2f}×")),
    ],
    "cache_outliers": [
        ("format", _show("kv_format")), ("rotated", _yes("rotate")), ("error of the output", _show("error", "{:.2%}")),
    ],
    "cache_quality": [
        ("format", _show("kv_format")), ("rotated", _yes("rotate")), ("tokens", _show("tokens")),
        ("mean KL", _show("kl_mean", "{:.6f}")), ("99 % KL", _show("kl_99", "{:.5f}")),
        ("same best token", _show("same_top_1", "{:.2%}")), ("perplexity", _show("perplexity", "{:.4f}")),
        ("change", _show("perplexity_change", "{:+.3%}")),
    ],
    "policy_speed": [
        ("policy", _show("policy")), ("tokens", _show("tokens")), ("heads", _heads), ("head_dim", _show("head_dim")),
        ("kept", _show("kept", "{:.0f}")), ("of tokens", _show("of_tokens", "{:.1%}")),
        ("MB", _show("mbytes", "{:.1f}")), ("of bytes", _show("of_bytes", "{:.1%}")),
        ("prompt s", _show("prefill_seconds", "{:.2f}")), ("over none", _show("prefill_ratio", "{:.2f}×")),
        ("tokens/s", _show("tokens_per_s", "{:.0f}")),
    ],
    "policy_needles": [
        ("policy", _show("policy")), ("tokens", _show("tokens")), ("kept", _show("kept", "{:.0f}")),
        ("MB", _show("mbytes", "{:.1f}")), ("needles found", lambda row: f"{row['found']} of {row['of']}"),
    ],
    "selection_speed": [
        ("reads", _show("select")), ("format", _show("kv_format")), ("tokens", _show("tokens")),
        ("of them read", _show("read_tokens")), ("heads", _heads), ("head_dim", _show("head_dim")),
        ("ms", _show("ms", "{:.2f}")), ("tokens/s", _show("tokens_per_s", "{:.0f}")),
        ("over all", _show("speedup", "{:.1f}×")), ("index MB", _show("index_mbytes", "{:.1f}")),
    ],
    "selection_needles": [
        ("reads", _show("select")), ("tokens", _show("tokens")), ("of them read", _show("read_tokens")),
        ("needles found", lambda row: f"{row['found']} of {row['of']}"), ("missed at most", _show("missed", "{:.2%}")),
    ],
    "recurrent_model": [
        ("model", _show("model")), ("pass", _show("pass")), ("layers", _show("layers")), ("hidden", _show("hidden")),
        ("dtype", _show("dtype")), ("tokens", _show("tokens")), ("tokens/s", _show("tokens_per_s", "{:.0f}")),
        ("transformers", _show("transformers_tokens_per_s", "{:.1f}")), ("speed-up", _show("speedup", "{:.1f}×")),
    ],
    "recurrent_reuse": [
        ("model", _show("model")), ("layers", _show("layers")), ("hidden", _show("hidden")), ("dtype", _show("dtype")),
        ("tokens", _show("tokens")), ("s", _show("seconds", "{:.2f}")),
        ("s without", _show("seconds_without", "{:.2f}")), ("speed-up", _show("speedup", "{:.1f}×")),
        ("states", _show("states")), ("MB of states", _show("state_mbytes", "{:.1f}")),
    ],
    "placement": [
        ("format", _show("kv_format")), ("tokens", _show("tokens")), ("layers", _show("layers")), ("heads", _heads),
        ("head_dim", _show("head_dim")), ("content MB", _show("content_mbytes", "{:.0f}")),
        ("max_bytes MB", _show("max_mbytes", "{:.0f}")), ("a step", _show("what")), ("reads", _show("read_tokens")),
        ("reuse", _show("reuse", "{:.0%}")), ("all in memory ms", _show("memory_ms", "{:.2f}")),
        ("ms", _show("ms", "{:.2f}")), ("tokens/s", _show("tokens_per_s", "{:.1f}")),
        ("of memory's", _show("of_memory", "{:.0%}")), ("fetched MB", _show("fetched_mbytes", "{:.1f}")),
        ("GB/s", _show("fetched_gbytes_per_s", "{:.2f}")), ("of disk", _show("of_disk", "{:.0%}")),
    ],
    "key_mass": [
        ("dtype", _show("dtype")), ("queries", _show("queries")), ("keys", _show("keys")), ("heads", _heads),
        ("head_dim", _show("head_dim")), ("ms", _show("ms", "{:.2f}")), ("GFLOP/s", _show("gflops", "{:.0f}")),
        ("of peak", _show("of_peak", "{:.0%}")), ("of forward", _show("of_forward", "{:.0%}")),
        ("GB/s", _show("gbytes_per_s", "{:.1f}")), ("of read peak", _show("of_read_peak", "{:.0%}")),
        ("speed-up", _show("speedup", "{:.2f}×")),
    ],
    "linear_attention": [
        ("pass", _show("which")), ("op", _show("op")), ("dtype", _show("dtype")), ("tokens", _show("tokens")),
        ("heads", _show("heads")), ("K", _show("key_dim")), ("V", _show("value_dim")), ("ms", _show("ms", "{:.2f}")),
        ("tokens/s", _show("tokens_per_s", "{:.0f}")), ("GFLOP/s", _show("gflops", "{:.0f}")),
        ("of peak", _show("of_peak", "{:.0%}")), ("GB/s", _show("gbytes_per_s", "{:.1f}")),
        ("of read peak", _show("of_read_peak", "{:.0%}")), ("over torch chunks", _show("speedup", "{:.1f}×")),
        ("over a loop", _show("loop_speedup", "{:.0f}×")),
    ],
    "page_bounds": [
        ("op", _show("op")), ("format", _show("kv_format")), ("tokens", _show("tokens")),
        ("page", _show("page_size")), ("heads", _heads), ("head_dim", _show("head_dim")),
        ("ms", _show("ms", "{:.3f}")), ("GB/s", _show("gbytes_per_s", "{:.1f}")),
        ("of read peak", _show("of_read_peak", "{:.0%}")), ("of dense", _show("of_dense", "{:.1%}")),
        ("speed-up", _show("speedup", "{:.2f}×")),
    ],
    "rwkv4_wkv": [
        ("pass", _show("which")), ("dtype", _show("dtype")), ("batch", _show("batch")), ("dim", _show("dim")),
        ("len", _show("len")), ("ms", _show("ms", "{:.2f}")), ("M elements/s", _show("melements_per_s", "{:.0f}")),
        ("GB/s", _show("gbytes_per_s", "{:.1f}")), ("of clone", _show("of_copy", "{:.0%}")),
        ("over a torch loop", _show("speedup", "{:.0f}×")),
    ],
    "selective_scan": [
        ("pass", _show("pass")), *_SERIES, ("states", _show("states")), ("ms", _show("ms", "{:.2f}")),
        ("M elements/s", _show("melements_per_s", "{:.1f}")), ("of FMA peak", _show("of_peak", "{:.0%}")),
        ("over transformers", _show("speedup_transformers", "{:.0f}×")),
        ("over a torch loop", _show("speedup_loop", "{:.0f}×")),
    ],
    "causal_conv1d": [
        *_SERIES, ("ms", _show("ms", "{:.2f}")), ("GB/s", _show("gbytes_per_s", "{:.1f}")),
        ("of clone", _show("of_copy", "{:.0%}")), ("over torch conv1d", _show("speedup", "{:.2f}×")),
    ],
    "state_update": [
        ("batch", _show("batch")), ("dim", _show("dim")), ("states", _show("states")), ("ms", _show("ms", "{:.2f}")),
        ("GB/s of states", _show("gbytes_per_s", "{:.1f}")), ("of copy", _show("of_copy", "{:.0%}")),
        ("over torch", _show("speedup", "{:.2f}×")),
    ],
    "memory": [
        *_SHAPE, ("outputs MB", _show("output_mbytes", "{:.1f}")), ("extra MB", _show("extra_mbytes", "{:.1f}")),
        ("torch extra MB", _show("torch_extra_mbytes", "{:.1f}")),
    ],
    "speculation": [
        ("text", _show("text")), ("drafts", _show("method")), ("layers", _show("layers")), ("hidden", _show("hidden")),
        ("dtype", _show("dtype")), ("prompt", _show("tokens")), ("written", _show("new_tokens")),
        ("plain tokens/s", _show("plain_tokens_per_s", "{:.1f}")), ("tokens/s", _show("tokens_per_s", "{:.1f}")),
        ("speed-up", _show("speedup", "{:.2f}×")), ("drafted", _show("drafted", "{:.0f}")),
        ("accepted", _show("acceptance", "{:.0%}")), ("tokens a step", _show("tokens_per_step", "{:.2f}")),
    ],
    "ratio": [
        ("what", _show("name")), ("dtype", _show("dtype")), ("head_dim", _show("head_dim")),
        ("ratio", _show("ratio", "{:.2f}")), ("ideal", _show("ideal", "{:.2f}")),
    ],
    **HYBRID,
}  # fmt: skip


def tabulate(rows: list[Row]) -> list[tuple[list[str], list[list[str]]]]:
    """(headers, lines) for each kind of row, without the columns that are empty throughout."""
    tables = []
    for kind, columns in COLUMNS.items():
        lines = [[cell(row) for _, cell in columns] for row in rows if row["kind"] == kind]
        used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
        if lines:
            tables.append(([columns[i][0] for i in used], [[line[i] for i in used] for line in lines]))
    return tables


def headline(result: dict[str, Any]) -> str:
    """One line on the machine, its ceilings and the versions."""
    machine, peaks = result["machine"], result["peaks"]
    parts = [f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_isa']}"]
    parts.append(f"FMA peak {peaks['fma_gflops']:.0f} GFLOP/s")
    if peaks["dot_bf16_gflops"]:
        parts.append(f"bf16 dot-product peak {peaks['dot_bf16_gflops']:.0f} GFLOP/s")
    parts.append(f"read {peaks['read_gbytes']:.1f} GB/s, measured in the same run")
    parts.append(f"lcore {machine['commit']}" + (f", torch {machine['torch']}" if machine["torch"] else ""))
    return "; ".join(parts)


def markdown(result: dict[str, Any]) -> str:
    parts = [headline(result)]
    for headers, lines in tabulate(result["rows"]):
        parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in [headers, ["---"] * len(headers), *lines]))
    return "\n\n".join(parts) + "\n"


def show(result: dict[str, Any]) -> None:
    """The same on the console."""
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe
    console.print(f"{result['bench']}: {headline(result)}", highlight=False)
    for headers, lines in tabulate(result["rows"]):
        table = Table()
        for header in headers:
            table.add_column(header, justify="right")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    for path in parser.parse_args(argv).files:
        print(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
