"""What a context of N tokens needs of memory, item by item, and the longest one that fits."""

from __future__ import annotations

import bisect
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import psutil
import torch

from lcore.cache import PagedCache, StateCache, states_of
from lcore.cache.checks import MAX_TOKENS
from lcore.cache.formats import FORMATS, is_coded
from lcore.cache.states import CHECKPOINT_TOKENS
from lcore.errors import dtype_name, require
from lcore.generation.memory import free_bytes, workspace_bytes
from lcore.models.loading import open_checkpoint

if TYPE_CHECKING:
    from lcore.models.families import AnyConfig

KvFormat: TypeAlias = str | tuple[str, str] | None  # None is the model's own

# Of what is free, the part that is left to the system and to other programs.
_LEFT_ALONE = 1 / 32


@dataclass(frozen=True)
class FormatPlan:
    """Bytes with one format of the cache. longest: tokens a row that fit; left: free bytes then, below 0 missing.

    Where pages are in a file they are not in `needed`, and left is that of memory or of the disk, whichever is less.
    """

    kv_format: str
    pages: int
    tails_and_tables: int
    needed: int
    left: int
    longest: int

    @property
    def fits(self) -> bool:
        return self.left >= 0


@dataclass(frozen=True)
class Plan:
    """Bytes that a context of `context` tokens in each of `batch` rows needs beside what is `free`.

    weights: that are not in memory yet. workspace: of one step that reads `chunk` tokens. In every format the pages,
    tails and tables are what `PagedCache.stats` counts after `reserve(context)`. states: of recurrent layers, with
    the checkpoints that a Generator keeps. disk: what is free for pages in a file; None where they are in memory.
    """

    context: int
    batch: int
    chunk: int
    dtype: str
    weights: int
    workspace: int
    states: int
    free: int
    disk: int | None
    formats: list[FormatPlan]


class Planner:
    """Plans for one model: its config, its dtype, the weight bytes that still have to come into memory, what is free.

    new_cache makes an empty cache of a format; its own sizes are what is planned with. A cache of states alone has the
    one format "none". overflow: the folder of the file that pages are in, as for `PagedCache`.
    """

    def __init__(
        self,
        config: AnyConfig,
        dtype: torch.dtype,
        weights: int,
        new_cache: Callable[[KvFormat], PagedCache | StateCache],
        *,
        batch: int = 1,
        prefill_chunk: int = 2048,
        free: int | None = None,
        overflow: str | None = None,
    ) -> None:
        require(batch >= 1, "plan", "batch", "be 1 or more", batch)
        require(prefill_chunk >= 1, "plan", "prefill_chunk", "be 1 or more", prefill_chunk)
        self.config, self._dtype, self._weights, self._new_cache = config, dtype, weights, new_cache
        self._batch, self._chunk = batch, prefill_chunk
        self.free = int(free_bytes(torch.device("cpu")) * (1 - _LEFT_ALONE)) if free is None else free
        self.disk = None if overflow is None else shutil.disk_usage(overflow).free

    def plan(self, context: int, formats: Sequence[KvFormat] = tuple(FORMATS)) -> Plan:
        """The plan for `context` tokens a row, with a FormatPlan for each of `formats`."""
        require(1 <= context <= MAX_TOKENS, "plan", "context", f"be in 1 .. {MAX_TOKENS}", context)
        rows, caches = [], [self._new_cache(kv_format) for kv_format in formats]
        for cache in caches[:1] if isinstance(caches[0], StateCache) else caches:
            pages, rest, states = cache_bytes(cache, context)
            needed, left = self._needed_and_left(cache, context)
            rows.append(FormatPlan(_name(cache), pages, rest, needed, left, self._longest(cache)))
        chunk = min(self._chunk, context)
        workspace = self._workspace(context)
        dtype = dtype_name(self._dtype)
        return Plan(context, self._batch, chunk, dtype, self._weights, workspace, states, self.free, self.disk, rows)

    def longest(self, kv_format: KvFormat) -> int:
        """Tokens a row that fit; 0 when not even one does."""
        return self._longest(self._new_cache(kv_format))

    @property
    def cache_room(self) -> int:
        """Bytes of memory that are free for a cache, beside the weights and the workspace."""
        return max(0, self.free - self._weights - self._workspace(self._chunk))

    def require_fits(self, context: int, kv_format: KvFormat) -> None:
        """MemoryError with the bytes needed and free, and the formats and the context that would fit."""
        chosen, *others = self.plan(context, [kv_format, *FORMATS]).formats
        if chosen.fits:
            return
        fitting = ", ".join(repr(plan.kv_format) for plan in others if plan.fits)
        instead = f"with kv_format {fitting} it would fit" if fitting else "no kv_format would fit"
        disk = "" if self.disk is None else f" and {chosen.pages:,} of the disk, which has {self.disk:,} free"
        raise MemoryError(
            f"lcore.Generator: context={context:,} must fit into memory: {chosen.needed:,} bytes are needed with "
            f"kv_format {chosen.kv_format!r}, {self.free:,} are free{disk}; {instead}, and {chosen.longest:,} "
            "tokens with this one"
        )

    def _longest(self, cache: PagedCache | StateCache) -> int:
        def missing(tokens: int) -> bool:
            return self._needed_and_left(cache, tokens)[1] < 0

        # The first context that does not fit, searched among 1, 2, ...
        return bisect.bisect_left(range(1, MAX_TOKENS), True, key=missing)

    def _needed_and_left(self, cache: PagedCache | StateCache, context: int) -> tuple[int, int]:
        pages, rest, states = cache_bytes(cache, context)
        needed = self._weights + self._workspace(context) + rest + states
        if self.disk is None:
            return needed + pages, self.free - needed - pages
        return needed, min(self.free - needed, self.disk - pages)

    def _workspace(self, context: int) -> int:
        chunk = min(self._chunk, context)
        return workspace_bytes(self.config, chunk, self._batch, self._dtype.itemsize)


def cache_bytes(cache: PagedCache | StateCache, tokens: int) -> tuple[int, int, int]:
    """Bytes of an empty cache after `reserve(tokens)`: of its pages, of its tails, tables and lengths, and of states
    with their checkpoints."""
    states = states_of(cache)
    one = 0 if states is None else states.stats()["bytes"]
    kept = 0 if states is None else min(tokens // (states.checkpoint_every or tokens + 1), states.max_checkpoints)
    held = one * (1 + kept)
    if isinstance(cache, StateCache):
        return 0, 0, held
    stats = cache.stats()
    pages = cache.pages_for([tokens] * cache.batch_size)
    rest = int(stats["bytes"]) - int(stats["pool_bytes"]) - one + pages * torch.int32.itemsize
    return pages * int(stats["page_bytes"]), rest, held


def model_planner(
    model: Any, batch: int, prefill_chunk: int, free: int | None = None, overflow: str | None = None, **plain: Any
) -> Planner:
    """For a model that is loaded: weights that are mapped from files have still to come into memory.

    plain: skip_layers and fp_prefix, for formats that are coded.
    """
    mapped = mapped_bytes(list(model.parameters()))
    return Planner(
        model.config,
        model.dtype,
        mapped,
        lambda kv_format: model.new_cache(
            batch, kv_format=kv_format, **(plain if is_coded(kv_format) else {}), **_checkpoints(model)
        ),
        batch=batch,
        prefill_chunk=prefill_chunk,
        free=free,
        overflow=overflow,
    )


def folder_planner(
    folder: Path, dtype: torch.dtype | None, batch: int, prefill_chunk: int, overflow: str | None = None
) -> Planner:
    """For a checkpoint folder, of which only the headers are read."""
    model, checkpoint = open_checkpoint(folder)
    stored = checkpoint.dtypes[model.embedding_name] if dtype is None else dtype
    weights = sum(parameter.numel() for parameter in model.parameters()) * stored.itemsize
    sized: Any = model.to(stored)

    def new_cache(kv_format: KvFormat) -> PagedCache | StateCache:
        options = {} if sized.cache_kind == "StateCache" else {"kv_format": kv_format, "device": "cpu"}
        return sized.new_cache(batch, **options, **_checkpoints(sized))

    sizes = {"batch": batch, "prefill_chunk": prefill_chunk}
    return Planner(model.config, stored, weights, new_cache, **sizes, overflow=overflow)


def mapped_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of tensors in memory-mapped files. The system counts these as free, since it can drop them."""
    maps = [entry for entry in psutil.Process().memory_maps(grouped=False) if entry.path.startswith("/")]
    bounds = sorted(tuple(int(end, 16) for end in entry.addr.split("-")) for entry in maps)
    starts = [begin for begin, _ in bounds]

    def is_mapped(address: int) -> bool:
        place = bisect.bisect_right(starts, address) - 1
        return place >= 0 and address < bounds[place][1]

    return sum(tensor.nbytes for tensor in tensors if is_mapped(tensor.data_ptr()))


def context_room(planner: Planner, context: int | Literal["auto"], kv_format: KvFormat, needed: int) -> int:
    """Tokens a row for which a generator makes room, when a call needs `needed`."""
    if context == "auto":
        limit = planner.config.max_position_embeddings or MAX_TOKENS
        return max(needed, min(planner.longest(kv_format), limit))
    require(needed <= context, "Generator", "prompt + max_new_tokens", f"fit into context={context:,}", f"{needed:,}")
    planner.require_fits(context, kv_format)
    return context


def _checkpoints(model: Any) -> dict[str, int]:
    """As a Generator makes the caches of a model."""
    return {} if getattr(model, "cache_kind", "PagedCache") == "PagedCache" else {"checkpoint_every": CHECKPOINT_TOKENS}


def _name(cache: PagedCache | StateCache) -> str:
    """Of the format: one name where K and V have the same."""
    return "none" if isinstance(cache, StateCache) else ",".join(dict.fromkeys(cache.kv_format))
