"""Drafts from the text itself: what followed the last tokens the last time they occurred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcore._runtime import NgramIndex
from lcore.cache.checks import check_int

if TYPE_CHECKING:
    from lcore.cache import PagedCache
    from lcore.generation.sampling import Sampling
    from lcore.models import Decoder

_LONGEST = 64  # csrc/runtime/ngram_index.h has the same number


@dataclass(frozen=True)
class Ngram:
    """Prompt look-up: finds the last n tokens earlier in the row's text and drafts what came after them there.

    Good where a text quotes its prompt or itself: answers about a document, code that is edited, tables, loops. It
    costs no step of the model and about a microsecond a token.

    n_min, n_max:  tokens that must agree; the longest that occurred before is taken, and of its places the latest.
    most:          the longest draft, in tokens.

    Source: prompt look-up decoding, as in transformers' `prompt_lookup_num_tokens`. Raises TypeError or ValueError.
    """

    n_min: int = 2
    n_max: int = 5
    most: int = 16

    def __post_init__(self) -> None:
        check_int("generation.Ngram", "n_min", self.n_min, 1)
        check_int("generation.Ngram", "n_max", self.n_max, self.n_min, _LONGEST)
        check_int("generation.Ngram", "most", self.most, 1)

    def begin(self, model: Decoder, cache: PagedCache, sampling: Sampling) -> NgramDrafter:
        return NgramDrafter(self, cache.batch_size)


class NgramDrafter:
    """An index a row."""

    def __init__(self, settings: Ngram, rows: int) -> None:
        self._indexes = [NgramIndex(settings.n_min, settings.n_max) for _ in range(rows)]

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        self._indexes[row].extend(np.asarray(tokens, dtype=np.int64))

    def draft(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        return {row: self._indexes[row].propose(count) for row, count in most.items()}
