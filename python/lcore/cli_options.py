"""Options that several commands have, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

import torch
import typer

Chunk: TypeAlias = Annotated[int, typer.Option(help="Prompt tokens read at a time.")]
Context: TypeAlias = Annotated[
    str | None, typer.Option("-c", "--context", help="Tokens to make room for at once; auto: all that fit.")
]
KvFormat: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Format of the cache: fp32, fp16, bf16, fp8, int8, int4, int2 (K,V for two); default: the dtype."
    ),
]
Overflow: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Folder on a disk for the part of the cache that memory has no room for; auto: the system's."),
]
Policy: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Keep a part of the text: NAME:budget=TOKENS[,key=value], as snapkv:budget=2048,reindex=true."),
]
Select: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Read a part of the cache: quest:budget=PAGES, or a fraction of attention that may be missed."),
]
SessionFile: TypeAlias = Annotated[
    Path | None, typer.Option(help="File that keeps what was read: a prompt that begins like it goes on from there.")
]
WeightDtype: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option("--dtype", help="Dtype of the weights.")
]


def parse_formats(text: str | None) -> str | tuple[str, str] | None:
    """A format, or two with a comma between them."""
    names = tuple(text.split(",")) if text else ()
    return cast("tuple[str, str]", names) if len(names) > 1 else text


def parse_layers(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise typer.BadParameter(f"--skip-layers must be numbers with commas between them, got {text!r}") from None


def parse_overflow(text: str | None) -> str | bool | None:
    """A folder, True for "auto"."""
    return True if text == "auto" else text


def parse_dtype(name: str) -> torch.dtype | None:
    """None for "auto"."""
    return None if name == "auto" else cast("torch.dtype", getattr(torch, name))


def parse_context(text: str | None) -> int | Literal["auto"] | None:
    """A number of tokens, or "auto"."""
    if text is None or text == "auto":
        return cast("Literal['auto'] | None", text)
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"--context must be a number of tokens or auto, got {text!r}") from None
