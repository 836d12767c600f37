"""What a cache holds, counted."""

from __future__ import annotations

from lcore.cache.slots import Slots


def stats(slots: Slots) -> dict[str, int | float]:
    """As `PagedCache.stats`."""
    pool, overflow = slots.pool, slots.pool.overflow
    return {
        "bytes": pool.nbytes + slots.nbytes,
        "pool_bytes": pool.nbytes,
        "file_bytes": 0 if overflow is None else overflow.file_bytes,
        "tail_bytes": slots.tail_bytes,
        "table_bytes": slots.table_bytes,
        "score_bytes": slots.scores.nbytes,
        "index_bytes": slots.index.nbytes,
        "tokens": int(slots.lengths.amax((0, 2)).sum()),
        "pages": int(slots.entries().sum()),
        "page_bytes": slots.layout.page_bytes,
        "free_pages": pool.allocator.free_count,
        "bits_per_value": slots.layout.bits_per_value,
        "dropped_mass": slots.index.worst,
    }
