"""How long drafts should be: from how often they are right, and from what they cost on this machine.

A draft of k tokens, each right with probability p if those before it are, brings E(k) = 1 + p + ... + p^k tokens in a
step that takes 1 + s k times as long as a step without drafts. k is chosen to make E(k) / (1 + s k) largest. The cost s
of a token differs tenfold between machines and number types (a step that waits for memory has it for nothing, one that
waits for arithmetic does not), so it is measured while the text is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# What a row is credited with before anything is known: 8 of 10 drafts right, which a few failures outweigh.
_PRIOR_RIGHT, _PRIOR_JUDGED = 1.6, 2.0
_MEMORY = 0.9  # weight of what was known when a draft is judged
_PRIOR_COST = 0.1
_LEAST_COST = 0.02  # of a token, whatever was measured: a timer's noise must not make useless drafts look free
_SAMPLES = 9  # of the last steps, to measure with
_PLAIN_STEPS = 2  # at the beginning, to compare with: the first alone also pays for what is set up once
_LONGEST_RUN = 64  # steps with drafts before another plain one: the text grows, and with it what a step costs
_TRIES = 0.015  # share of the time for drafts that should not pay: without any, nothing would be learnt


class Chance:
    """The probability that a row's draft is right, each token given those before it; older drafts count less."""

    def __init__(self) -> None:
        self._right, self._judged = _PRIOR_RIGHT, _PRIOR_JUDGED

    def judge(self, drafted: int, accepted: int) -> None:
        self._right = _MEMORY * self._right + accepted
        self._judged = _MEMORY * self._judged + accepted + (accepted < drafted)

    def tokens(self, drafted: int) -> float:
        """E(drafted): expected tokens of a step, the one that needs no draft included."""
        p = self._right / self._judged
        return 1 + drafted if p == 1 else (1 - p ** (drafted + 1)) / (1 - p)


class DraftLength:
    """The width of each step of a run: rows are padded to one length, so the longest draft is what all of them cost."""

    def __init__(self, rows: int) -> None:
        self._chances = [Chance() for _ in range(rows)]
        self._plain: deque[float] = deque(maxlen=_SAMPLES)  # seconds of steps without drafts
        self._costs: deque[float] = deque(maxlen=_SAMPLES)  # s, of steps with drafts
        self._run = 0  # steps with drafts since the last plain one
        self._trying = False  # the step drafts a token although it should not pay
        self._wait = 0  # steps without drafts until the next try

    def begin(self, limits: Sequence[tuple[int, int]]) -> int:
        """How many tokens to draft in the step that begins, given (row, tokens that it may draft at most) of each."""
        self._trying = False
        if len(self._plain) < _PLAIN_STEPS or self._run >= _LONGEST_RUN:
            return 0
        width = self._best(limits)
        if width > 0:
            self._wait = 0
        elif self._wait > 0:
            self._wait -= 1
        else:
            self._trying = True
        return 1 if self._trying else width

    def cut(self, drafts: Sequence[tuple[int, int]]) -> int:
        """How many of the tokens drafted to feed, given (row, tokens drafted) of each row of the step."""
        return 1 if self._trying else self._best(drafts)

    def end(self, width: int, seconds: float) -> None:
        """What a step took with drafts of up to `width` tokens, the time to draft them included."""
        if width == 0:
            self._plain.append(seconds)
            self._run = 0
            return
        self._costs.append(max(0.0, seconds / _low(self._plain) - 1) / width)
        self._run += 1
        if self._trying:
            self._wait = round(self._cost / _TRIES)

    def judge(self, row: int, drafted: int, accepted: int) -> None:
        """What became of a draft that was not empty."""
        self._chances[row].judge(drafted, accepted)
        if accepted > 0 and self._cost < 1:  # a token was won for less than a step: no reason to wait for the next
            self._wait = 0

    @property
    def _cost(self) -> float:
        return max(_LEAST_COST, _low(self._costs)) if self._costs else _PRIOR_COST

    def _best(self, limits: Sequence[tuple[int, int]]) -> int:
        """The width that makes expected tokens by time largest; 0 when drafts do not pay."""
        widths = range(max((limit for _, limit in limits), default=0) + 1)

        def rate(width: int) -> float:
            return sum(self._chances[row].tokens(min(limit, width)) for row, limit in limits) / (1 + self._cost * width)

        return max(widths, key=rate)


def _low(values: Sequence[float]) -> float:
    """The lower quartile: what disturbs a step only makes it longer."""
    return sorted(values)[len(values) // 4]
