"""What a PrefixCache finds texts by: a namespace of everything that must be equal, and runs of tokens."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcore.cache.paged import PagedCache
from lcore.cache.state_file import state_settings
from lcore.cache.states import StateCache, states_of
from lcore.errors import check_tensor, require

_INTEGERS = (torch.int64, torch.int32)
# What two caches may differ in and still have the same pages; every other setting is part of the namespace.
_FREE_SETTINGS = ("_slots", "_select", "batch_size", "max_bytes", "overflow", "states")


def namespace_of(cache: PagedCache | StateCache, more: bytes) -> bytes:
    states = states_of(cache)
    values = {} if isinstance(cache, StateCache) else vars(cache)
    values = values | ({} if states is None else state_settings(states))
    settings = sorted((name, value) for name, value in values.items() if name not in _FREE_SETTINGS)
    return repr(settings).encode() + b"\0" + more


def runs_of(function: str, argument: str, tokens: Tensor, count: int, page_size: int) -> NDArray[np.int32]:
    """(runs, page_size): the full pages of the first `count` tokens."""
    check_tensor(function, argument, tokens, dtypes=_INTEGERS, shape=("*",), names="tokens", device=torch.device("cpu"))
    pages = max(count, 0) // page_size
    host = tokens[: pages * page_size].numpy()
    low, high = (int(host.min()), int(host.max())) if host.size else (0, 0)
    require(low >= 0 and high < 2**31, function, argument, "lie in [0, 2^31)", low if low < 0 else high)
    return np.ascontiguousarray(host.reshape(pages, page_size), dtype=np.int32)
