"""The states after beginnings of texts, for texts that begin the same: what a PrefixCache keeps of recurrent layers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lcore.cache.state_places import States
from lcore.cache.states import StateCache

# Kept at most where no bytes are said; one stands for the checkpoints of a long text, which are 16.
MOST = 64


@dataclass(frozen=True)
class _Snapshot:
    namespace: bytes
    tokens: NDArray[np.int32]
    states: States

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(x.nbytes for state in self.states for x in state)


class Snapshots:
    """States of one row after texts, found by all their tokens, compared one by one; the longest unused go first.

    Args:
        max_bytes: limit on what they take; None for MOST of them, whatever they take.

    Threads: any number may use it.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.nbytes = self.hits = self.misses = self.evictions = 0
        self._lock = threading.Lock()
        self._held: OrderedDict[int, _Snapshot] = OrderedDict()  # the last used last
        self._next = 0

    def __len__(self) -> int:
        return len(self._held)

    def find(
        self, namespace: bytes, prompts: Sequence[Tensor], limits: Sequence[int]
    ) -> list[tuple[int, States | None]]:
        """`longest` of each prompt, never with its last token, whose logits somebody needs."""
        rows = zip(prompts, limits, strict=True)
        return [self.longest(namespace, prompt, min(limit, len(prompt) - 1)) for prompt, limit in rows]

    def keep(self, namespace: bytes, cache: StateCache, row: int, tokens: Tensor) -> int:
        """Remembers a row's checkpoints among `tokens`, which are the first that it has read; how many are new."""
        found = cache.checkpoints(row).items()
        return sum(self.insert(namespace, tokens[:n], states) for n, states in found if n <= len(tokens))

    def longest(self, namespace: bytes, tokens: Tensor, most: int) -> tuple[int, States | None]:
        """How many tokens, at most `most`, the longest known beginning of a text has, and the states after it."""
        text = tokens.numpy()
        with self._lock:
            found = max(self._fitting(namespace, text, 1, most), default=(0, -1))
            if not found[0]:
                self.misses += 1
                return 0, None
            self.hits += 1
            self._held.move_to_end(found[1])
            return found[0], self._held[found[1]].states

    def insert(self, namespace: bytes, tokens: Tensor, states: States) -> bool:
        """Remembers the states after `tokens`; False where they are known, or larger than all that may be kept."""
        text = tokens.numpy()
        with self._lock:
            known = self._fitting(namespace, text, len(text), len(text))
            if known:
                self._held.move_to_end(known[0][1])
                return False
            own = tuple(type(state)(*map(_alone, state)) for state in states)
            new = _Snapshot(namespace, text.astype(np.int32), own)
            if self.max_bytes is not None and new.nbytes > self.max_bytes:
                return False
            self._held[self._next] = new
            self._next += 1
            self.nbytes += new.nbytes
            while len(self._held) > MOST if self.max_bytes is None else self.nbytes > self.max_bytes:
                self.nbytes -= self._held.popitem(last=False)[1].nbytes
                self.evictions += 1
            return True

    def clear(self) -> None:
        with self._lock:
            self._held.clear()
            self.nbytes = 0

    def _fitting(self, namespace: bytes, text: NDArray[np.int64], least: int, most: int) -> list[tuple[int, int]]:
        """(tokens, key) of those with so many tokens that a text begins with."""
        return [
            (size, key)
            for key, held in self._held.items()
            if held.namespace == namespace
            and least <= (size := len(held.tokens)) <= min(most, len(text))
            and np.array_equal(held.tokens, text[:size])
        ]


def _alone(x: Tensor) -> Tensor:
    """x, or a copy where x is a part of something larger that it would keep alive."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
