"""Drafters whose guesses are known, to be judged by the generation loop."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Guesses:
    """Settings of a drafter that knows what will be written and tells it with mistakes.

    texts: what each row writes without speculation. right: share of the tokens told as they are; a token that is told
    wrong is followed by the right ones, which must not be accepted after it.
    """

    texts: list[list[int]]
    vocab: int
    right: float = 1.0
    most: int = 6
    asked: list[dict[int, int]] = field(default_factory=list)

    def begin(self, model, cache, sampling) -> Guesser:
        return Guesser(self, cache.batch_size)


class Guesser:
    def __init__(self, settings: Guesses, rows: int) -> None:
        self._settings = settings
        self._random = random.Random(0)
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self._prompts: dict[int, int] = {}

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        self._prompts.setdefault(row, len(tokens))
        self.rows[row].extend(tokens)

    def draft(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        self._settings.asked.append(dict(most))
        drafts = {}
        for row, count in most.items():
            written = len(self.rows[row]) - self._prompts[row]
            truth = self._settings.texts[row]
            assert self.rows[row][self._prompts[row] :] == truth[:written]
            # Rows differ in how much they draft, and some steps draft nothing for a row.
            coming = truth[written : written + self._random.choice([count, count, self._random.randint(0, count)])]
            drafts[row] = [
                t if self._random.random() < self._settings.right else (t + 1) % self._settings.vocab for t in coming
            ]
        return drafts
