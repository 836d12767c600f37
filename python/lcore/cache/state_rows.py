"""Some rows of a StateCache as a cache of their own."""

from __future__ import annotations

from torch import Tensor

from lcore.cache.state_places import LayerState, States
from lcore.cache.states import StateCache


class StateRows(StateCache):
    """Rows of another StateCache: reads copy them out, a step puts them back there and leaves its other rows alone."""

    def __init__(self, whole: StateCache, index: Tensor) -> None:
        self._whole, self._index = whole, index
        self.batch_size = len(index)
        self.checkpoint_every, self.max_checkpoints = whole.checkpoint_every, whole.max_checkpoints
        self.every_token = whole.every_token
        self._states = tuple(LayerState(*(x[index.to(x.device)] for x in state)) for state in whole._states)
        self._places = [whole._places[row] for row in index.tolist()]

    @property
    def _seen(self) -> Tensor:
        return self._whole._seen[self._index]

    @_seen.setter
    def _seen(self, seen: Tensor) -> None:
        self._whole._seen = self._whole._seen.index_copy(0, self._index, seen)

    def _replace(self, states: States) -> None:
        def spread(whole: LayerState, part: LayerState) -> LayerState:
            pairs = zip(whole, part, strict=True)
            return LayerState(*(old.index_copy(0, self._index.to(old.device), new) for old, new in pairs))

        self._states = states
        self._whole._replace(tuple(map(spread, self._whole._states, states)))
