"""Every kind of prompt as token ids: one int64 tensor a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from lcore.errors import dtype_name, message, require, require_type

if TYPE_CHECKING:
    from lcore.models import Tokenizer

Message: TypeAlias = Mapping[str, Any]
# A text, token ids, or a chat.
Prompt: TypeAlias = str | Sequence[int] | torch.Tensor | Sequence[Message]


def is_batch(prompt: object) -> bool:
    """Whether `prompt` is a list of prompts rather than one."""
    if isinstance(prompt, torch.Tensor):
        return prompt.dim() == 2
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or len(prompt) == 0:
        return False
    return not isinstance(prompt[0], (Integral, Mapping))


def encode_prompts(
    prompt: Prompt | Sequence[Prompt], tokenizer: Tokenizer | None, vocab_size: int, continues: bool
) -> list[torch.Tensor]:
    """Token ids of every row, checked against the vocabulary.

    A text begins with the tokenizer's begin-of-text token, unless it `continues` a cache. A chat goes through the chat
    template, which writes its own special tokens.

    Raises: ValueError for an empty prompt, an id outside the vocabulary, or text without a tokenizer; TypeError for
    anything that is not a prompt.
    """
    rows = list(cast("Sequence[Prompt]", prompt)) if is_batch(prompt) else [cast("Prompt", prompt)]
    return [_encode(row, tokenizer, vocab_size, continues) for row in rows]


def _encode(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, continues: bool) -> torch.Tensor:
    known = isinstance(prompt, (str, torch.Tensor, Sequence))
    require_type(known, "Generator", "prompt", "be text, token ids or messages", type(prompt).__name__)
    require(len(prompt) > 0, "Generator", "prompt", "not be empty", repr(prompt))
    ids: Sequence[int] | torch.Tensor
    if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
        if tokenizer is None:
            raise ValueError("lcore.Generator: prompt must be token ids because the model has no tokenizer, got text")
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt, add_special_tokens=not continues)
        else:
            text = tokenizer.apply_chat_template(cast("Sequence[Message]", prompt), add_generation_prompt=True)
            ids = tokenizer.encode(text, add_special_tokens=False)
        require(len(ids) > 0, "Generator", "prompt", "have at least one token", repr(prompt))
    else:
        ids = cast("Sequence[int] | torch.Tensor", prompt)
    tokens = _as_tensor(ids)
    low, high = int(tokens.min()), int(tokens.max())
    known = low >= 0 and high < vocab_size
    require(known, "Generator", "prompt", f"hold token ids in [0, {vocab_size})", low if low < 0 else high)
    return tokens


def _as_tensor(ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        odd = next((type(i).__name__ for i in ids if not isinstance(i, int)), "ids too large for 64 bits")
        raise TypeError(message("Generator", "prompt", "hold integers", odd)) from None
    integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    require_type(integers, "Generator", "prompt", "hold integers", dtype_name(tokens.dtype))
    require(tokens.dim() == 1, "Generator", "prompt", "be one-dimensional token ids", tuple(tokens.shape))
    return tokens.to(device="cpu", dtype=torch.int64)


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One stop string or several as a tuple, none of them empty."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        require_type(isinstance(text, str), "Generator", "stop", "hold strings", repr(text))
        require(text != "", "Generator", "stop", "hold strings that are not empty", repr(text))
    return stops
