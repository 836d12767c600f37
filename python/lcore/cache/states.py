"""The states of recurrent layers between calls: what they keep of a text instead of its keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcore.cache.checks import check_int
from lcore.errors import check_tensor, message, require


class LayerState(NamedTuple):
    """What one recurrent layer knows of the tokens so far; zeros before the first one.

    conv: (batch, channels, width - 1), the last inputs of its convolution, in the model's dtype.
    recurrent: (batch, ...), in the shape of the layer's kind, float32 (float64 in a float64 model).
    """

    conv: Tensor
    recurrent: Tensor


class StateCache:
    """The states of all layers of a recurrent model, for a batch of rows: of one size for a text of any length.

    A step replaces the tensors of all layers together and writes none of them, so a step that fails leaves the cache
    where it was, and forks share tensors until their next step.

    Args:
        states: one LayerState a layer, of equal batch; zeros where nothing has been read. See `model.new_cache`.

    Raises: TypeError and ValueError for tensors that do not fit together.
    """

    policy = select = None  # as PagedCache: every token is kept, and read

    def __init__(self, states: Sequence[LayerState]) -> None:
        require(len(states) > 0, "StateCache", "states", "hold at least one layer", len(states))
        self._states = tuple(states)
        self.batch_size = int(states[0].conv.shape[0])
        for layer, pair in enumerate(states):
            for name, tensor in zip(LayerState._fields, pair, strict=True):
                shape = (self.batch_size, *tensor.shape[1:])
                check_tensor("StateCache", f"{name} of layer {layer}", tensor, shape=shape, names="batch, ...")
        self._seen = torch.zeros(self.batch_size, dtype=torch.int64)

    @property
    def num_layers(self) -> int:
        return len(self._states)

    def layer(self, index: int) -> LayerState:
        """The state of one layer; its tensors are shared and must not be written."""
        check_int("StateCache.layer", "index", index, 0, self.num_layers - 1)
        return self._states[index]

    def seen(self, layer: int = 0) -> Tensor:
        """(batch,) int64: tokens read in each row, the same in all layers."""
        check_int("StateCache.seen", "layer", layer, 0, self.num_layers - 1)
        return self._seen.clone()

    def advance(self, states: Sequence[LayerState], counts: Tensor | int) -> None:
        """Replaces the present states by those after `counts` more tokens, (batch,) or one number for all rows.

        Raises: TypeError and ValueError unless states have the layers, shapes and dtypes of the present ones.
        """
        owner = "StateCache.advance"
        require(len(states) == self.num_layers, owner, "states", f"hold {self.num_layers} layers", len(states))
        for layer, (new, old) in enumerate(zip(states, self._states, strict=True)):
            for name, after, before in zip(LayerState._fields, new, old, strict=True):
                what = f"{name} of layer {layer}"
                check_tensor(owner, what, after, dtypes=(before.dtype,), shape=before.shape, device=before.device)
        self._replace(tuple(LayerState(*(tensor.detach() for tensor in state)) for state in states))
        self._seen = self._seen + torch.as_tensor(counts).to(self._seen)

    def fork(self) -> StateCache:
        """A cache with the same content that goes its own way; tensors are shared until one of them steps on."""
        fork = StateCache(self._states)
        fork._seen = self._seen
        return fork

    def crop(self, n: int | Tensor) -> None:
        """Takes back all tokens of a row, where n is 0, or none, where n is at least the tokens seen.

        n: a number, or (batch,) integers, for each row its own.

        Raises: NotImplementedError for any other length, which a state does not remember: `fork` before the tokens
            that may have to be taken back.
        """
        limits = torch.as_tensor(n).to(self._seen).expand(self.batch_size)
        require(bool((limits >= 0).all()), "StateCache.crop", "n", "not be negative", limits.tolist())
        if bool(((limits > 0) & (limits < self._seen)).any()):
            rule = f"be 0 or the tokens seen, {self._seen.tolist()}: a state holds no way back; fork() before them"
            raise NotImplementedError(message("StateCache.crop", "n", rule, limits.tolist()))
        gone = (limits == 0) & (self._seen > 0)
        if bool(gone.any()):
            self._replace(tuple(LayerState(*(_zero_rows(x, gone) for x in state)) for state in self._states))
            self._seen = self._seen.masked_fill(gone, 0)

    def reset(self) -> None:
        """Forgets all tokens of all rows."""
        self.crop(0)

    def rows(self, index: Tensor) -> StateRows:
        """Some rows as a cache of their own, whose steps are steps of this one; index: (rows,) int64, no row twice."""
        return StateRows(self, index)

    def stats(self) -> dict[str, int]:
        """What the cache holds, in bytes as torch has allocated them.

        Returns: bytes, of all tensors that this cache refers to (shared ones whole in each fork) = conv_bytes +
            recurrent_bytes; tokens, seen in all rows.
        """
        conv, recurrent = (sum(x.untyped_storage().nbytes() for x in part) for part in zip(*self._states, strict=True))
        return {
            "bytes": conv + recurrent,
            "conv_bytes": conv,
            "recurrent_bytes": recurrent,
            "tokens": int(self._seen.sum()),
        }

    def _replace(self, states: tuple[LayerState, ...]) -> None:
        self._states = states


class StateRows(StateCache):
    """Rows of another StateCache: reads copy them out, a step puts them back there and leaves its other rows alone."""

    def __init__(self, whole: StateCache, index: Tensor) -> None:
        self._whole, self._index = whole, index
        self.batch_size = len(index)
        self._states = tuple(LayerState(*(x[index.to(x.device)] for x in state)) for state in whole._states)

    @property
    def _seen(self) -> Tensor:
        return self._whole._seen[self._index]

    @_seen.setter
    def _seen(self, seen: Tensor) -> None:
        self._whole._seen = self._whole._seen.index_copy(0, self._index, seen)

    def _replace(self, states: tuple[LayerState, ...]) -> None:
        def spread(whole: LayerState, part: LayerState) -> LayerState:
            pairs = zip(whole, part, strict=True)
            return LayerState(*(old.index_copy(0, self._index.to(old.device), new) for old, new in pairs))

        self._states = states
        self._whole._replace(tuple(map(spread, self._whole._states, states)))


def _zero_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.masked_fill(rows.to(x.device).view(-1, *(1,) * (x.dim() - 1)), 0)
