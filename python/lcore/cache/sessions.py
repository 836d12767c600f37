"""A cache on disk: what `PagedCache.save` and `load` do, and what of a cache goes into a session file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lcore.cache.overflow import Folder
from lcore.cache.session_file import write_session
from lcore.cache.session_lock import SessionLock
from lcore.cache.state_file import state_tensors
from lcore.cache.states import StateCache, states_of
from lcore.cache.stored_session import TOKENS, StoredSession, settings, slot_tensors, used_entries
from lcore.errors import check_tensor, require, require_type

if TYPE_CHECKING:
    from lcore.cache.paged import PagedCache
    from lcore.cache.slots import Slots

Path: TypeAlias = str | os.PathLike[str]
Strings: TypeAlias = Mapping[str, str]
_NO_PAGES = np.empty((0, 1), dtype=np.uint8), np.empty(0, dtype=np.int32)


def save(
    cache: PagedCache | StateCache,
    path: Path,
    tokens: Sequence[Tensor] | None = None,
    metadata: Strings | None = None,
    *,
    lock: SessionLock | None = None,
) -> None:
    """Writes a cache to one file: its pages as they are stored, tables, lengths and tails; the states of recurrent
    layers and their checkpoints. This is `PagedCache.save`.

    The file appears whole or not at all: it is written beside its place, synced, and renamed over an older one. It is a
    safetensors container, described in `session_file.py`.

    Args:
        path: the file.
        tokens: of each row, int64 or int32 (n,), the n tokens that the layers have seen. A `StoredSession` has them.
        metadata: strings that tell what the cache belongs to.
        lock: that of the file, when the caller holds it.

    Raises: BlockingIOError: another process or thread reads or writes the file. OSError: it cannot be written; an older
        one is as it was. ValueError, TypeError: tokens or metadata.
    """
    name = f"{type(cache).__name__}.save"
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        require_type(isinstance(key, str) and isinstance(value, str), name, "metadata", "hold strings", (key, value))
    states = states_of(cache)
    tensors = {} if states is None else state_tensors(states)
    if tokens is not None:
        _check_tokens(name, cache, tokens)
        tensors |= {f"{TOKENS}{row}": ids.to(torch.int64) for row, ids in enumerate(tokens)}
    strings = {"settings": json.dumps(settings(cache)), "metadata": json.dumps(metadata)}
    slots = None if isinstance(cache, StateCache) else _savable(name, cache)
    held = SessionLock(name, path) if lock is None else lock
    try:
        if slots is None:
            write_session(name, held.path, strings, *_NO_PAGES, tensors)
        else:
            _write_pages(name, held.path, strings, slots, tensors)
    finally:
        if lock is None:
            held.release()


def _savable(name: str, cache: PagedCache) -> Slots:
    """The slots, once it is known that a file can hold all that they know."""
    slots = cache._open(name)
    if slots.scores.nbytes > 0:
        raise NotImplementedError(
            f"lcore.{name}: a file does not hold what a policy remembers of the keys; use policy=None"
        )
    if cache.select is not None and cache.select.observes:
        raise NotImplementedError(
            f"lcore.{name}: a file does not hold the attention that {type(cache.select).__name__} has observed; "
            "use lcore.selection.Quest or select=None"
        )
    return slots


def _write_pages(name: str, path: str, strings: Strings, slots: Slots, tensors: dict[str, Tensor]) -> None:
    # Pages that the cache holds are never written again, and this tensor outlives a pool that grows meanwhile.
    pool = slots.pool.data.numpy()
    tensors |= _copies(slots)
    used = used_entries(slots.host.table, slots.entries())
    ids, dense = np.unique(slots.host.table[used], return_inverse=True)
    table = np.zeros((*used.shape[:-1], int(slots.entries().max(initial=0))), dtype=np.int32)
    table[used[..., : table.shape[-1]]] = dense
    tensors["table"] = torch.from_numpy(table)
    write_session(name, path, strings, pool, ids, tensors, slots.pool.using)


def load(
    cls: type[PagedCache], path: Path, metadata: Strings | None, max_bytes: int | None, overflow: Folder = None
) -> PagedCache:
    """The cache that `save` wrote: the same pages, bit for bit, in a pool of their size. This is `PagedCache.load`.

    Args:
        path: the file.
        metadata: strings that must be those in the file, as far as they are given.
        max_bytes, overflow: as for a new cache.

    Raises: ValueError: the file is of another kind or version, cut short or damaged (a checksum covers every byte; of
        pages the number is told), or an entry of metadata differs. MemoryError: max_bytes or the system has no room.
        BlockingIOError: another process or thread writes it. OSError: it cannot be read.
    """
    with StoredSession(path) as stored:
        stored.require_same(stored.metadata, metadata or {}, "metadata.")
        return stored.load(max_bytes=max_bytes, overflow=overflow, cls=cls)


def _copies(slots: Slots) -> dict[str, Tensor]:
    """Copies with zeros where a tail holds no token, so that equal caches give equal files."""
    tensors = {name: tensor.clone() for name, tensor in slot_tensors(slots).items()}
    beyond = torch.arange(slots.layout.page_size) >= (slots.lengths % slots.layout.page_size)[..., None]
    for name, tensor in tensors.items():
        if name.startswith("tail_"):
            tensor.masked_fill_(beyond[..., None], 0)
    return tensors


def _check_tokens(name: str, cache: PagedCache | StateCache, tokens: Sequence[Tensor]) -> None:
    rows = cache.batch_size
    require(len(tokens) == rows, name, "tokens", f"have an entry for each of the {rows} rows", len(tokens))
    for row, ids in enumerate(tokens):
        argument = f"tokens[{row}]"
        check_tensor(name, argument, ids, dtypes=(torch.int64, torch.int32), shape=("*",), names="tokens")
        seen = {int(cache.seen(layer)[row]) for layer in range(cache.num_layers)}
        require(seen == {len(ids)}, name, argument, f"have the {sorted(seen)} tokens that the layers saw", len(ids))
