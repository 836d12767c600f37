"""A session file as a cache sees it: the settings, texts and tensors in it, and a cache made from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcore.cache.key_rope import rope_from_json
from lcore.cache.overflow import Folder
from lcore.cache.room import make_room
from lcore.cache.session_file import SessionFile
from lcore.cache.session_lock import SessionLock
from lcore.cache.state_file import STATE, fill_states, misfit, state_settings
from lcore.cache.state_places import LayerState
from lcore.cache.states import StateCache, states_of
from lcore.errors import dtype_name, message, require
from lcore.positions import Rotation

if TYPE_CHECKING:
    from lcore.cache.paged import PagedCache
    from lcore.cache.slots import Slots

# Arguments of PagedCache that a file brings back; each is an attribute of the same name. Limits are the reader's.
OPTIONS = ("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "batch_size", "dtype", "kv_format", "page_size",
           "rotate", "skip_layers", "fp_prefix", "rope")  # fmt: skip
TOKENS = "tokens."  # and the row: the tensor's name


class StoredSession:
    """A session file open for reading, with everything checked but its pages.

    metadata: the strings given to `save`. tokens: int64 (n,) for each row, or None when none were given. `load` makes
    the cache. Use it in a `with` statement: until its end no one else can save to the file.

    Raises: as `PagedCache.load`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, function: str = "PagedCache.load", lock: SessionLock | None = None
    ) -> None:
        self.function = function
        self.path = os.path.realpath(path)
        os.stat(self.path)  # a file that is not there needs no lock
        with ExitStack() as held:
            if lock is None:
                held.enter_context(SessionLock(function, path, shared=True))
            self._file = SessionFile(function, self.path)
            held.callback(self._file.close)
            self._tensors = self._file.tensors
            self.settings = self._strings("settings")
            self.metadata: dict[str, str] = self._strings("metadata")
            rows = sorted((name for name in self._tensors if name.startswith(TOKENS)), key=lambda n: (len(n), n))
            self.tokens = [self._tensors.pop(name) for name in rows] or None
            states = [name for name in self._tensors if name.startswith(STATE)]
            self._states = {name: self._tensors.pop(name) for name in states}
            self._held = held.pop_all()

    @property
    def lengths(self) -> Tensor:
        """(layers, batch, kv_heads) int32: tokens held, once `check` has found them."""
        return self._tensors["lengths"]

    def place_before(self, row: int, n: int) -> int:
        """The most tokens, n or fewer, of a row after which the file holds the states; of a cache without states n."""
        if not self._states:
            return n
        rows, places, seen = (self._states[f"{STATE}{name}"] for name in ("rows", "places", "seen"))
        known = [0, int(seen[row]), *places[rows == row].tolist()]
        return max(place for place in known if place <= n)

    def require_same(self, found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
        """ValueError with the first entry of `wanted` that differs from that of `found`, and both values."""
        for name, value in wanted.items():
            if found.get(name) != value:
                rule = f"be {found.get(name)!r} as in the session file {self.path}"
                raise ValueError(message(self.function, f"{what}{name}", rule, repr(value)))

    def load(
        self, *, max_bytes: int | None = None, overflow: Folder = None, cls: type[PagedCache] | None = None
    ) -> PagedCache:
        """A new cache with all that the file holds."""
        from lcore.cache.paged import PagedCache  # which imports this module

        try:
            options = {name: self.settings[name] for name in OPTIONS if name != "rope"}
            options["rope"] = rope_from_json(self.settings.get("rope"))  # which older files do not have
            options["dtype"] = getattr(torch, options["dtype"])
            if isinstance(options["kv_format"], list):
                options["kv_format"] = tuple(options["kv_format"])
            kind: Any = cls or PagedCache
            cache: PagedCache = kind(*self._new_states(cls), **options, max_bytes=max_bytes, overflow=overflow)
        except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError) as error:
            raise self._file.refusal("have the settings of a cache of this version", error) from error
        self.fill(cache)
        return cache

    def load_states(self) -> StateCache:
        """As `load`, for a file of states alone."""
        try:
            [states] = self._new_states(StateCache)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._file.refusal("have the settings of a StateCache of this version", error) from error
        self.fill(states)
        return states

    def _new_states(self, cls: type | None) -> tuple[StateCache, ...]:
        """Zeros of the shapes that the settings tell, for a class of caches that has states."""
        from lcore.cache.hybrid import HybridCache  # which imports this module

        if cls is None or not issubclass(cls, (StateCache, HybridCache)):
            return ()

        def zeros(name: str) -> Tensor:
            dtype, shape = self.settings[name].split(" ", 1)
            return torch.zeros((self.settings["batch_size"], *json.loads(shape)), dtype=getattr(torch, dtype))

        count = range(self.settings["states.num_layers"])
        layers = [LayerState(*(zeros(f"states.{layer}.{name}") for name in LayerState._fields)) for layer in count]
        return (StateCache(layers),)

    def fill(self, cache: PagedCache | StateCache) -> None:
        """Puts all that the file holds into a cache of the same settings that holds nothing."""
        if isinstance(cache, StateCache):
            require(not cache.seen().any(), self.function, "cache", "hold no tokens", "some")
            self.check(cache)
        else:
            self._fill_pages(cache)
        states = states_of(cache)
        if states is not None:
            fill_states(states, self._states)

    def _fill_pages(self, cache: PagedCache) -> None:
        slots, pool = cache._open(self.function), cache._open(self.function).pool
        require(not slots.lengths.any(), self.function, "cache", "hold no tokens", "some")
        used = self.check(cache)
        assert used is not None
        count, named = self._file.page_shape[0], self._tensors["table"].numpy()[used]
        with pool.lock:
            make_room(self.function, slots, used.shape[-1], count, exact=True)
            ids = pool.allocator.allocate(count)
            try:
                self._file.read_pages(pool.data.numpy(), ids, partial(pool.using, writes=True))
            except BaseException:
                pool.allocator.release(ids)
                raise
            # `allocate` has counted the first slot that names a page.
            pool.allocator.retain(ids[np.delete(named, np.unique(named, return_index=True)[1])])
            for name, tensor in (slot_tensors(slots) | {"table": slots.table[..., : used.shape[-1]]}).items():
                tensor.copy_(self._tensors[name])
            slots.host.table[..., : used.shape[-1]][used] = ids[named]

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> StoredSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _strings(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads(self._file.strings[name])
        except (KeyError, ValueError, RecursionError) as error:
            raise self._file.refusal(f"have {name}", repr(error)) from error
        if not isinstance(values, dict):
            raise self._file.refusal(f"have {name} by name", type(values).__name__)
        return values

    def check(self, cache: PagedCache | StateCache) -> NDArray[np.bool_] | None:
        """Which entries of the table name pages, where there are pages; ValueError unless all but the pages fits."""
        self.require_same(self.settings, settings(cache), "cache.")
        states = states_of(cache)
        wrong = misfit(states, self._states) if states is not None else ", ".join(sorted(self._states))
        if wrong:
            raise self._file.refusal(f"hold the states of a {type(cache).__name__} and no others", wrong)
        return None if isinstance(cache, StateCache) else self._check_pages(cache)

    def _check_pages(self, cache: PagedCache) -> NDArray[np.bool_]:
        slots = cache._open(self.function)
        own, refusal = slot_tensors(slots), self._file.refusal
        if set(own) != set(self._tensors):
            raise refusal(f"have the tensors {', '.join(sorted(own))}", ", ".join(sorted(self._tensors)))
        for name, tensor in self._tensors.items():
            shape = (*own[name].shape[:-1], tensor.shape[-1]) if name == "table" else tuple(own[name].shape)
            if tensor.dtype != own[name].dtype or tuple(tensor.shape) != shape:
                rule = f"have {name} {dtype_name(own[name].dtype)} {shape}"
                raise refusal(rule, f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}")
        table, lengths = self._tensors["table"].numpy(), self._tensors["lengths"].numpy()
        pages = slots.layout.plain.columns(lengths // slots.layout.page_size)
        if lengths.min() < 0 or pages.max() > table.shape[-1]:
            raise refusal("name a page for every full one", f"lengths up to {lengths.max()}")
        used = used_entries(table, pages)
        count, page_bytes = self._file.page_shape
        named = np.unique(table[used])
        if not np.array_equal(named, np.arange(count)) or page_bytes != slots.layout.page_bytes:
            raise refusal("name each of its pages", f"{count} pages of {page_bytes} bytes, {len(named)} named")
        if self.tokens is not None and len(self.tokens) != lengths.shape[1]:
            raise refusal("hold the tokens of every row", f"{len(self.tokens)} of {lengths.shape[1]}")
        return used


def settings(cache: PagedCache | StateCache) -> dict[str, Any]:
    """What a cache is made with, and what its pages look like, in JSON's types."""
    states = states_of(cache)
    shapes = {} if states is None else state_settings(states)
    return shapes if isinstance(cache, StateCache) else shapes | _page_settings(cache)


def _page_settings(cache: PagedCache) -> dict[str, Any]:
    layout = cache._open("PagedCache.save").layout
    values = {name: getattr(cache, name) for name in OPTIONS}
    values |= {f"page.{field.name}": getattr(layout, field.name) for field in fields(layout) if field.name != "plain"}
    values["page.bytes"] = layout.page_bytes
    return {name: _plain(value) for name, value in values.items()}


def slot_tensors(slots: Slots) -> dict[str, Tensor]:
    """All that slots know: their tensors, and their NumPy arrays as tensors of the same memory."""
    values = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in vars(slots).items()
    }
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def used_entries(table: NDArray[np.int32], pages: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Mask over the table: entries that name a page."""
    used: NDArray[np.bool_] = np.arange(table.shape[-1]) < pages[..., None]
    return used


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Rotation):
        return {name: _plain(part) for name, part in asdict(value).items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else getattr(value, "name", value)
