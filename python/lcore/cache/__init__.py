"""Paged KV caches: pages of one pool, the formats they are stored in, forks and equal texts that share them, files."""

from lcore.cache import policies, selection
from lcore.cache.paged import PagedCache
from lcore.cache.prefix import PrefixCache
from lcore.cache.stored_session import StoredSession

__all__ = ["PagedCache", "PrefixCache", "StoredSession", "policies", "selection"]
