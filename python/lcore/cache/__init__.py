"""Paged KV caches: pages of one pool, the formats they are stored in, forks and equal texts that share them, files.
The states of recurrent layers."""

from lcore.cache import policies, selection
from lcore.cache.hybrid import HybridCache
from lcore.cache.paged import PagedCache
from lcore.cache.prefix import PrefixCache
from lcore.cache.state_places import LayerState
from lcore.cache.states import StateCache, states_of
from lcore.cache.stored_session import StoredSession

__all__ = [
    "HybridCache",
    "LayerState",
    "PagedCache",
    "PrefixCache",
    "StateCache",
    "StoredSession",
    "policies",
    "selection",
    "states_of",
]
