"""The places in a text that the states of one row can go back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class LayerState(NamedTuple):
    """What one recurrent layer knows of the tokens so far; zeros before the first one.

    conv: (batch, channels, width - 1), the last inputs of its convolution, in the model's dtype.
    recurrent: (batch, ...), in the shape of the layer's kind, float32 (float64 in a float64 model).
    """

    conv: Tensor
    recurrent: Tensor


States: TypeAlias = tuple[LayerState, ...]  # of all layers


class Trail(NamedTuple):
    """One row's states after each token of its last step: those of place first + i are states[...][i, row]."""

    states: States  # with a leading dimension of tokens
    row: int
    first: int
    steps: int


class Places:
    """Of one row: checkpoints, the states after some numbers of tokens, and the trail of its last step."""

    def __init__(self) -> None:
        self.checkpoints: dict[int, States] = {}  # by tokens, rising; of batch 1
        self.trail: Trail | None = None

    def find(self, n: int) -> States | None:
        """The states after n tokens."""
        trail = self.trail
        if trail is not None and trail.first <= n < trail.first + trail.steps:
            step, row = n - trail.first, trail.row
            return tuple(LayerState(*(x[step, row : row + 1] for x in state)) for state in trail.states)
        return self.checkpoints.get(n)

    def last_before(self, n: int) -> int:
        """The most tokens, n or fewer, that there are states of; 0 when there are none."""
        found = max((place for place in self.checkpoints if place <= n), default=0)
        trail = self.trail
        if trail is not None and trail.first <= n and trail.steps > 0:
            found = max(found, min(n, trail.first + trail.steps - 1))
        return found

    def add(self, n: int, states: States, most: int) -> None:
        """A checkpoint behind all others. Beyond `most` the one goes that leaves the smallest gap for how far back it
        stands: what a crop has to read again is then at most about as much as it took back, in a text of any length."""
        self.checkpoints[n] = states
        if len(self.checkpoints) > most:
            at = list(self.checkpoints)
            gaps = [(after - before) / (n - place) for before, place, after in zip([0, *at], at, at[1:], strict=False)]
            del self.checkpoints[at[gaps.index(min(gaps))] if gaps else n]

    def crop(self, n: int) -> None:
        self.checkpoints = {place: states for place, states in self.checkpoints.items() if place <= n}
        if self.trail is not None:
            self.trail = self.trail._replace(steps=max(0, min(self.trail.steps, n + 1 - self.trail.first)))

    def copy(self) -> Places:
        copy = Places()
        copy.checkpoints, copy.trail = dict(self.checkpoints), self.trail
        return copy

    def tensors(self) -> list[Tensor]:
        """All that it refers to."""
        trail = () if self.trail is None else self.trail.states
        return [x for states in (*self.checkpoints.values(), trail) for state in states for x in state]


def row_of(states: States, row: int) -> States:
    """A row's states, of batch 1, that keep no other row's alive."""
    one = states[0].conv.shape[0] == 1
    return tuple(LayerState(*(x if one else x[row : row + 1].clone() for x in state)) for state in states)


def last_of(each: States, before: States, counts: Tensor) -> States:
    """Of states after each token, those after the last of each row; those before it of a row without tokens."""
    rows, last = torch.arange(len(counts)), (counts - 1).clamp(min=0)

    def pick(after: Tensor, old: Tensor) -> Tensor:
        new = after[last.to(after.device), rows.to(after.device)]
        stepped = (counts > 0).to(new.device).view(-1, *(1,) * (new.dim() - 1))
        return torch.where(stepped, new, old)

    return tuple(LayerState(*map(pick, new, old)) for new, old in zip(each, before, strict=True))


def storages(tensors: Sequence[Any]) -> dict[int, int]:
    """Bytes of each storage that some tensors are in, by its address; on the meta device too."""
    storages = [x.untyped_storage() for x in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}
