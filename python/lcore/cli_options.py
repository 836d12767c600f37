"""Options that several commands have, and what their texts mean."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, cast

import torch
import typer

Chunk: TypeAlias = Annotated[int, typer.Option(help="Prompt tokens read at a time.")]
Context: TypeAlias = Annotated[
    str | None, typer.Option("-c", "--context", help="Tokens to make room for at once; auto: all that fit.")
]
Overflow: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Folder on a disk for the part of the cache that memory has no room for; auto: the system's."),
]
WeightDtype: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option("--dtype", help="Dtype of the weights.")
]


def parse_formats(text: str | None) -> str | tuple[str, str] | None:
    """A format, or two with a comma between them."""
    names = tuple(text.split(",")) if text else ()
    return cast("tuple[str, str]", names) if len(names) > 1 else text


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
