"""Paged KV caches: pages of one pool, the formats they are stored in, forks that share them, files that keep them."""

from lcore.cache import policies
from lcore.cache.paged import PagedCache
from lcore.cache.stored_session import StoredSession

__all__ = ["PagedCache", "StoredSession", "policies"]
