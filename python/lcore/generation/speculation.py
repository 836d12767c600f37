"""Speculation: drafts of the next tokens, judged by the model many at a time.

A drafter guesses how a row goes on. The loop feeds the row's next token and the guesses in one step of the model, which
costs little more than one token alone, and chooses the token of every position as it would have without drafts: from
the model's own logits and the position's own random number. A draft is accepted while it equals the token chosen, and
the cache is cut back to there. So the text is the same text, greedy or sampled, whatever the drafts were; it is sampled
from the model's distribution because every token of it is. Drafts therefore need no probabilities: sharing the random
number takes the place of the usual test of ratios (Leviathan et al. 2023, arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lcore.errors import require, require_type
from lcore.generation.draft_length import DraftLength

if TYPE_CHECKING:
    from lcore.cache import PagedCache
    from lcore.generation.sampling import Sampling
    from lcore.models import Decoder


NO_PAGES = 1 << 62  # page_size of a cache of states, which can be cut back to any place of its last step


class Drafter(Protocol):
    """Guesses tokens for the rows of one run. Rows are named by their index in the batch."""

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """`tokens` are the next of the row's text, for certain: its prompt first, then what is written."""

    def draft(self, most: Mapping[int, int]) -> Mapping[int, Sequence[int]]:
        """For some of the rows named, up to most[row] tokens that may follow the text. The cache holds all of the text
        but its last token, and must be left as it is."""


@runtime_checkable
class Speculate(Protocol):
    """What `Generator(speculate=...)` takes: settings that start a drafter for each run.

    most: the longest draft that it makes.
    """

    @property
    def most(self) -> int: ...

    def begin(self, model: Decoder, cache: PagedCache, sampling: Sampling) -> Drafter:
        """A drafter for a run over `cache`, before any work; raises what stands in its way."""


def room_in_tail(held: int, page_size: int) -> int:
    """How many drafts may follow the next token of a row that holds `held` tokens.

    A page is encoded once, when its last token arrives: from then on, and for the tokens of the same step already, it
    is read with rounded values, and cut open again it returns them. So no page may be filled by a token that can still
    be rejected. The next token is certain and may fill one; the drafts behind it must leave the last place of their
    page free. Then every token reads what it reads without drafts, and cutting back only shortens the tail.
    """
    return page_size - 1 - (held + 1) % page_size


class Speculation:
    """The drafts of one run: a drafter, and how much to ask of it in each step."""

    def __init__(self, drafter: Drafter, most: int, rows: int, page_size: int) -> None:
        self._drafter = drafter
        self._most = most
        self._length = DraftLength(rows)
        self._page_size = page_size
        self._width = 0  # of the step's longest draft

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """`tokens` are the next of the row's text, for certain."""
        self._drafter.extend(row, tokens)

    def draft(self, rows: Mapping[int, tuple[int, int]]) -> dict[int, list[int]]:
        """Drafts for the rows named, from (tokens that the cache holds, tokens wanted behind the next one) of each."""
        most = {
            row: min(self._most, room_in_tail(held, self._page_size), wanted) for row, (held, wanted) in rows.items()
        }
        self._width = self._length.begin(list(most.items()))
        asked = {row: min(self._width, limit) for row, limit in most.items() if min(self._width, limit) > 0}
        found = self._drafter.draft(asked) if asked else {}
        drafts = {row: list(found.get(row, ()))[: asked.get(row, 0)] for row in rows}
        self._width = self._length.cut([(row, len(draft)) for row, draft in drafts.items()])
        drafts = {row: draft[: self._width] for row, draft in drafts.items()}
        self._width = max((len(draft) for draft in drafts.values()), default=0)
        return drafts

    def took(self, seconds: float) -> None:
        """The time of the step that `draft` began, with all that belongs to it."""
        self._length.end(self._width, seconds)

    def judge(self, row: int, drafted: int, accepted: int) -> None:
        """How many tokens of a row's draft became part of the text."""
        self._length.judge(row, drafted, accepted)


def speculation_of(speculate: str | Speculate | None) -> Speculate | None:
    """The settings that `Generator(speculate=...)` names. Raises TypeError or ValueError."""
    from lcore.generation.ngram import Ngram
    from lcore.generation.self_speculation import SelfSpeculation

    if speculate is None:
        return None
    if isinstance(speculate, str):
        known: dict[str, type[Ngram] | type[SelfSpeculation]] = {"ngram": Ngram, "self": SelfSpeculation}
        require(speculate in known, "Generator", "speculate", "be 'ngram', 'self' or None", repr(speculate))
        return known[speculate]()
    fits = isinstance(speculate, Speculate) and not isinstance(speculate, type)
    rule = "be 'ngram', 'self', None, or settings with `most` and `begin` such as Ngram(...)"
    require_type(fits, "Generator", "speculate", rule, repr(speculate))
    return speculate
