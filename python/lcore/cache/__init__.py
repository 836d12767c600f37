"""Paged KV caches: pages of one pool, the formats they are stored in, forks that share them."""

from lcore.cache import policies
from lcore.cache.paged import PagedCache

__all__ = ["PagedCache", "policies"]
