"""Columns of the tables of examples/hybrid: a row a case, side by side what each model reaches in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.machine import Row

Column = tuple[str, Callable[[Row], str]]

MODELS = ("attention", "delta", "mamba2", "hybrid")


def _cell(key: str, model: str, form: str, row: Row) -> str:
    return form.format(row[key][model]) if model in row[key] else ""


def _each(key: str, name: str, form: str) -> list[Column]:
    return [(f"{name}, {model}", partial(_cell, key, model, form)) for model in MODELS]


HYBRID: dict[str, list[Column]] = {
    "hybrid_recall": [
        ("tokens", lambda row: str(row["tokens"])), ("needles", lambda row: str(row["needles"])),
        *_each("recall", "found", "{:.0%}"), ("questions", lambda row: str(row["asked"])),
    ],
    "hybrid_speed": [
        ("tokens", lambda row: str(row["tokens"])), *_each("read_tokens_per_s", "read/s", "{:.0f}"),
        *_each("written_tokens_per_s", "written/s", "{:.0f}"), *_each("kbytes", "kB kept", "{:.0f}"),
    ],
}  # fmt: skip
