"""Whether a context fits into memory, found out before any work."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from lcore.cache import PagedCache
    from lcore.models.families import AnyConfig

# The page tables, the allocator's rounding and what Python itself makes meanwhile.
SPARE_BYTES = 64 << 20


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: on a GPU its free memory, else the machine's or the control group's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limit = cgroup_free_bytes()
    available = int(psutil.virtual_memory().available)
    return available if limit is None else min(available, limit)


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left under the tightest memory limit of this process's control groups (v1 and v2), None without a limit.

    Cached file pages count as free: the kernel drops them before it refuses memory.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    left: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / controllers
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        group = base / path.lstrip("/")
        # A group is bound by its ancestors too. In a container the path may be the host's: then only the root exists.
        for folder in (group, *group.parents):
            free = _group_free(folder, limit, usage, "total_" if controllers else "")
            if free is not None:
                left.append(free)
            if folder == base:
                break
    return min(left, default=None)


def _group_free(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        maximum = int((folder / limit).read_text())  # v2 writes "max" for no limit
        used = int((folder / usage).read_text())
        counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cached = sum(int(counters.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))
    return max(0, maximum - used + cached)


def workspace_bytes(config: AnyConfig, tokens: int, rows: int, itemsize: int, logits: int = 1) -> int:
    """What one step of `tokens` tokens holds beside the cache of `rows` rows: the activations of one layer, and logits.

    Six hidden-size vectors a token (residual, norm, attention and MLP in and out), q, k, v before and after RoPE, gate,
    up and their product in the MLP; what a recurrent layer's block computes; the attention's output once for every row
    of the batch, as long as the longest; logits of so many tokens of a row and their copy in float32; SPARE_BYTES for
    what is not a tensor.
    """
    heads = config.num_heads * config.head_dim
    attention = 2 * (heads + 2 * config.num_kv_heads * config.head_dim)
    per_token = 6 * config.hidden_size + attention + 3 * config.intermediate_size
    per_token += getattr(config, "recurrent_values", 0)
    activations = (tokens * per_token + rows * tokens * heads) * itemsize
    return activations + 2 * rows * logits * config.vocab_size * 4 + SPARE_BYTES


def reserve(
    cache: PagedCache,
    new_tokens: Sequence[int],
    workspace: int,
    free: int,
    chunk: int = 1,
    make_free: Callable[[int], None] | None = None,
) -> None:
    """Makes room in `cache` for `new_tokens[row]` more tokens of every row, if that and the workspace fit into `free`.

    A cache with a policy holds less: its budget, and the `chunk` of tokens that came since it last evicted.
    make_free(pages), called when it does not fit, has the pool give up what no cache holds, until so many are free.

    Raises: MemoryError with the bytes needed, the bytes free, and how many tokens would fit in every row; the cache is
    as it was.
    """
    rows, page_size = len(new_tokens), cache.page_size
    tokens_after = [seen + new for seen, new in zip(cache.seen().tolist(), new_tokens, strict=True)]
    if cache.policy is not None:
        tokens_after = [cache.policy.held_after(n, chunk, page_size) for n in tokens_after]
    whole_pages = [n // page_size * page_size for n in tokens_after]
    wanted = max(0, cache.pages_for(whole_pages) - int(cache.stats()["pages"]))
    page_bytes = int(cache.stats()["page_bytes"])
    needed, pool_bytes, free_pages = _growth(cache, wanted, page_bytes)
    if needed + workspace > free and make_free is not None:
        make_free(wanted)
        needed, pool_bytes, free_pages = _growth(cache, wanted, page_bytes)
    if needed + workspace > free:
        pages = max(0, free - workspace - pool_bytes) // page_bytes + free_pages
        row_pages = cache.pages_for([n + page_size for n in whole_pages]) - cache.pages_for(whole_pages)
        context = f"{max(new_tokens):,} tokens" if rows == 1 else f"{rows} rows of up to {max(new_tokens):,} tokens"
        raise MemoryError(
            f"lcore.Generator: prompt + max_new_tokens must fit into memory: {context} need {needed + workspace:,} "
            f"bytes (cache {needed:,}, workspace {workspace:,}), {free:,} bytes are free; "
            f"{pages // row_pages * page_size:,} tokens{'' if rows == 1 else ' a row'} would fit"
        )
    cache.reserve(torch.tensor(whole_pages))


def _growth(cache: PagedCache, pages: int, page_bytes: int) -> tuple[int, int, int]:
    """Bytes to allocate for so many more pages, then the pool's bytes and free pages."""
    stats = cache.stats()
    pool_bytes, free_pages = int(stats["pool_bytes"]), int(stats["free_pages"])
    if cache.overflow is not None:
        return 0, pool_bytes, free_pages
    # A pool that must grow is copied into a larger one: for a moment both are there.
    needed = pool_bytes + (pages - free_pages) * page_bytes if pages > free_pages else 0
    return needed, pool_bytes, free_pages


def bytes_per_token(cache: PagedCache) -> int:
    """Bytes that a token of one row takes in full pages of all layers."""
    return cache.bytes_per_token(
        cache.num_layers,
        cache.num_kv_heads,
        cache.head_dim,
        cache.kv_format,
        head_dim_v=cache.head_dim_v,
        page_size=cache.page_size,
    )
