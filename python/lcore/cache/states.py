"""The states of recurrent layers between calls: what they keep of a text instead of its keys and values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcore.cache.checks import check_int
from lcore.cache.state_places import LayerState, Places, States, Trail, last_of, row_of, storages
from lcore.errors import check_tensor, message, require

if TYPE_CHECKING:
    from lcore.cache.state_rows import StateRows

MAX_CHECKPOINTS = 16
# Between checkpoints, where a Generator makes the cache: what a prompt that begins as one before reads again at most.
CHECKPOINT_TOKENS = 512


class StateCache:
    """The states of all layers of a recurrent model, for a batch of rows: of one size for a text of any length.

    A step replaces the tensors of all layers together and writes none of them, so a step that fails leaves the cache
    where it was, and forks, checkpoints and earlier steps share tensors.

    Args:
        states: one LayerState a layer, of equal batch; zeros where nothing has been read. See `model.new_cache`.
        checkpoint_every: where a step ends after a multiple of so many tokens of a row, the row's states are kept, to
            be cropped to; None keeps none.
        max_checkpoints: of a row. Beyond them the least useful goes: those left are dense near the end of the text and
            sparse at its begin.

    every_token: set it for a step whose tokens may be taken back one by one, as drafts are. The step then goes token by
        token through the recurrences, as decoding does, and keeps the states after each token until the next step.

    Raises: TypeError and ValueError for tensors that do not fit together.
    """

    policy = select = None  # as PagedCache: every token is kept, and read

    def __init__(
        self,
        states: Sequence[LayerState],
        *,
        checkpoint_every: int | None = None,
        max_checkpoints: int = MAX_CHECKPOINTS,
    ) -> None:
        require(len(states) > 0, "StateCache", "states", "hold at least one layer", len(states))
        if checkpoint_every is not None:
            check_int("StateCache", "checkpoint_every", checkpoint_every, 1)
        check_int("StateCache", "max_checkpoints", max_checkpoints, 1)
        self._states: States = tuple(states)
        self.batch_size = int(states[0].conv.shape[0])
        for layer, pair in enumerate(states):
            for name, tensor in zip(LayerState._fields, pair, strict=True):
                shape = (self.batch_size, *tensor.shape[1:])
                check_tensor("StateCache", f"{name} of layer {layer}", tensor, shape=shape, names="batch, ...")
        self.checkpoint_every, self.max_checkpoints, self.every_token = checkpoint_every, max_checkpoints, False
        self._seen = torch.zeros(self.batch_size, dtype=torch.int64)
        self._places = [Places() for _ in range(self.batch_size)]

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

    def checkpoints(self, row: int = 0) -> dict[int, States]:
        """A row's checkpoints: the states of all layers, of batch 1, by tokens read. Their tensors are shared."""
        check_int("StateCache.checkpoints", "row", row, 0, self.batch_size - 1)
        return dict(self._places[row].checkpoints)

    def advance(self, states: Sequence[LayerState], counts: Tensor | int) -> None:
        """Replaces the present states by those after `counts` more tokens, (batch,) or one number for all rows.

        states: with every_token those after each token, tensors with one leading dimension more, as long as the longest
            count.

        Raises: TypeError and ValueError unless states have the layers, shapes and dtypes of the present ones.
        """
        owner, each = "StateCache.advance", self.every_token
        require(len(states) == self.num_layers, owner, "states", f"hold {self.num_layers} layers", len(states))
        counts = torch.as_tensor(counts).to(self._seen).expand(self.batch_size)
        for layer, (new, old) in enumerate(zip(states, self._states, strict=True)):
            for name, after, before in zip(LayerState._fields, new, old, strict=True):
                shape = (int(counts.max()), *before.shape) if each else tuple(before.shape)
                what = f"{name} of layer {layer}"
                check_tensor(owner, what, after, dtypes=(before.dtype,), shape=shape, device=before.device)
        found: States = tuple(LayerState(*(tensor.detach() for tensor in state)) for state in states)
        for row, (places, first, count) in enumerate(zip(self._places, self._seen, counts, strict=True)):
            places.trail = Trail(found, row, int(first) + 1, int(count)) if each else None
        self._replace(last_of(found, self._states, counts) if each else found)
        self._seen = self._seen + counts
        for row, (places, seen, count) in enumerate(zip(self._places, self._seen.tolist(), counts, strict=True)):
            if self.checkpoint_every is not None and count > 0 and seen % self.checkpoint_every == 0:
                places.add(seen, row_of(self._states, row), self.max_checkpoints)

    def begin_rows(self, found: Sequence[tuple[int, States | None]]) -> None:
        """Puts rows that have read nothing where they stand after n tokens: (n, states of all layers, of batch 1), or
        (0, None) where nothing is known, one for each row."""
        owner = "StateCache.begin_rows"
        require(len(found) == self.batch_size, owner, "found", f"have {self.batch_size} entries", len(found))
        require(not self._seen.any(), owner, "cache", "have read nothing", self._seen.tolist())
        known: dict[int, States | None] = {row: states for row, (_, states) in enumerate(found) if states is not None}
        if known:
            self._put(known)
            self._seen = torch.tensor([n for n, _ in found])
        for row, (n, states) in enumerate(found):
            if states is not None and self.checkpoint_every is not None:
                self._places[row].add(n, states, self.max_checkpoints)

    def fork(self) -> StateCache:
        """A cache with the same content that goes its own way; tensors are shared until one of them steps on."""
        fork = StateCache(self._states, checkpoint_every=self.checkpoint_every, max_checkpoints=self.max_checkpoints)
        fork._seen, fork._places = self._seen, [places.copy() for places in self._places]
        return fork

    def crop_point(self, n: int | Tensor) -> Tensor:
        """(batch,) int64: for each row the most tokens, n or fewer, that `crop` can go back to; reading on from there
        gives the state after n exactly. n: a number, or (batch,) integers."""
        limits = self._limits("StateCache.crop_point", n).tolist()
        rows = zip(self._places, limits, self._seen.tolist(), strict=True)
        return torch.tensor([seen if limit >= seen else places.last_before(limit) for places, limit, seen in rows])

    def crop(self, n: int | Tensor) -> None:
        """Takes all tokens behind the first n from every row; a row that has read no more stays as it is.

        n: a number, or (batch,) integers, for each row its own. 0 is always possible; else there must be states of that
            place: a checkpoint, or with every_token one inside the last step.

        Raises: ValueError for another place, with the nearest one before it. Nothing has changed.
        """
        self.go_back(*self.way_back(n))

    def way_back(self, n: int | Tensor) -> tuple[Tensor, dict[int, States | None]]:
        """What `crop` would do, before it is done; raises as it does."""
        limits = self._limits("StateCache.crop", n)
        found: dict[int, States | None] = {}
        for row, (limit, seen) in enumerate(zip(limits.tolist(), self._seen.tolist(), strict=True)):
            if limit < seen:
                found[row] = self._places[row].find(limit) if limit else None
                if limit and found[row] is None:
                    nearest = self.crop_point(limits)
                    rule = f"be a place of which there are states, {nearest.tolist()} here: read on from there again"
                    raise ValueError(message("StateCache.crop", "n", rule, limits.tolist()))
        return limits, found

    def go_back(self, limits: Tensor, found: Mapping[int, States | None]) -> None:
        """Does what `way_back` found."""
        if found:
            self._put(found)
            self._seen = torch.minimum(self._seen, limits)
            for row, limit in enumerate(limits.tolist()):
                self._places[row].crop(limit)

    def reset(self) -> None:
        """Forgets all tokens of all rows."""
        self.crop(0)

    def rows(self, index: Tensor) -> StateRows:
        """Some rows as a cache of their own, whose steps are steps of this one; index: (rows,) int64, no row twice."""
        from lcore.cache.state_rows import StateRows  # which imports this module

        return StateRows(self, index)

    def close(self) -> None:
        """As PagedCache; there is nothing to give back."""

    def stats(self) -> dict[str, int]:
        """What the cache holds, in bytes as torch has allocated them.

        Returns: bytes, of all tensors that this cache refers to (shared ones whole in each fork) = conv_bytes +
            recurrent_bytes + checkpoint_bytes, the last being those of checkpoints and of every_token that are not
            present states too; tokens, seen in all rows.
        """
        conv, recurrent = (storages(list(part)) for part in zip(*self._states, strict=True))
        kept = storages([x for places in self._places for x in places.tensors()])
        kept = {at: size for at, size in kept.items() if at not in conv and at not in recurrent}
        sizes = [sum(part.values()) for part in (conv, recurrent, kept)]
        names = ("conv_bytes", "recurrent_bytes", "checkpoint_bytes")
        return {"bytes": sum(sizes), **dict(zip(names, sizes, strict=True)), "tokens": int(self._seen.sum())}

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        tokens: Sequence[Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes the cache and its checkpoints to one file, which appears whole or not at all.

        Arguments and errors as `PagedCache.save`.
        """
        from lcore.cache.sessions import save  # which imports this module

        save(self, path, tokens, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> StateCache:
        """The cache that `save` wrote, after every byte has been checked; arguments and errors as `PagedCache.load`."""
        from lcore.cache.stored_session import StoredSession  # which imports this module

        with StoredSession(path, function="StateCache.load") as stored:
            stored.require_same(stored.metadata, metadata or {}, "metadata.")
            return stored.load_states()

    def _limits(self, function: str, n: int | Tensor) -> Tensor:
        limits = torch.as_tensor(n).to(self._seen).expand(self.batch_size)
        require(bool((limits >= 0).all()), function, "n", "not be negative", limits.tolist())
        return limits

    def _put(self, rows: Mapping[int, States | None]) -> None:
        """Replaces the states of some rows; None is zeros."""

        def put(layer: int, field: int) -> Tensor:
            x = self._states[layer][field].clone()
            for row, states in rows.items():
                x[row] = 0 if states is None else states[layer][field][0]
            return x

        self._replace(tuple(LayerState(put(layer, 0), put(layer, 1)) for layer in range(self.num_layers)))

    def _replace(self, states: States) -> None:
        self._states = states


def states_of(cache: Any) -> StateCache | None:
    """The recurrent states of a cache of any kind."""
    return cache if isinstance(cache, StateCache) else getattr(cache, "states", None)
