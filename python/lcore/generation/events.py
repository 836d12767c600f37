"""What a generation stream yields, in order: `Prefill`* , then `Token`* and one `Done` for every row of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Reason: TypeAlias = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Prefill:
    """A chunk of the prompt has been read.

    done:   prompt tokens read so far, over all rows; never falls, and the last event always has done == total.
    total:  prompt tokens to read in this call, over all rows, without those that an earlier call has read.
    eta:    seconds still needed for the rest of the prompt, None while nothing has been measured.
    """

    done: int
    total: int
    eta: float | None


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    id:    its id; an end-of-text or stop token is reported too.
    text:  the text that this token decided: "" while a character is incomplete or a stop string is possible. The texts
           of a row, joined, are its whole output without the stop string.
    row:   row of the batch, 0 for a single prompt.
    """

    id: int
    text: str
    row: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts and times of one row.

    Seconds are those of the generator's own steps, which the rows of a batch share, without what the caller does
    between events. cache_bytes is what the whole cache holds, with the pool that it shares; peak_bytes the process's
    largest resident set so far. reused_tokens of the prompt were not read: they were in the session file, or their
    pages in the index of prefixes. drafted counts tokens that speculation proposed, accepted those of them that became
    part of the text. dropped_mass bounds the attention mass that any query of the cache has missed because
    of its selection, where that is one whose scores are bounds.
    """

    prompt_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float
    cache_bytes: int
    peak_bytes: int
    reused_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    dropped_mass: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read per second."""
        read = self.prompt_tokens - self.reused_tokens
        return read / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """A row has ended.

    reason:  "eos" the model ended its text, "stop" a stop string or stop id came, "length" max_new_tokens were made.
    """

    reason: Reason
    stats: Stats
    row: int = 0


@dataclass(frozen=True)
class Completion:
    """What `Generator.generate` returns for a row: the text without the stop string, all token ids, why it ended."""

    text: str
    tokens: list[int]
    reason: Reason
    stats: Stats


Event: TypeAlias = Prefill | Token | Done
