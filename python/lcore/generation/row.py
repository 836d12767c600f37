"""One sequence of a batch, as far as it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lcore.generation.events import Reason
from lcore.generation.text import TextStream


@dataclass
class Row:
    """One sequence of the batch."""

    index: int
    prompt: torch.Tensor  # (tokens,) int64
    position: int  # of the next token that is not certain, or not in the cache
    text: TextStream
    known: int = 0  # tokens of the cache that the caller knows of: not those of tokens that have not been yielded yet
    read: int = 0  # tokens of the prompt that the cache holds
    reused: int = 0  # those of them that it held from the start
    written: list[int] = field(default_factory=list)  # tokens generated
    logits: torch.Tensor | None = None  # (1 + drafts, vocab) float32, of the tokens from `position` on
    drafts: list[int] = field(default_factory=list)  # in the cache, from `position` on, and not judged yet
    next: int | None = None  # the token at `position`, when it is certain
    drafted: int = 0
    accepted: int = 0
    reason: Reason | None = None

    @property
    def left(self) -> int:
        return len(self.prompt) - self.read
