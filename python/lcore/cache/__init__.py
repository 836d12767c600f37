"""Paged KV caches: pages of one pool, the formats they are stored in, forks and equal texts that share them."""

from lcore.cache.paged import PagedCache
from lcore.cache.prefix import PrefixCache

__all__ = ["PagedCache", "PrefixCache"]
