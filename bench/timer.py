"""The one timer of the Python benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

# A call that takes this long is not disturbed by its first run's page faults: that counts, and one more.
_LONG_SECONDS = 2.0
_VERY_LONG_SECONDS = 10.0  # once will do


def median_seconds(call: Callable[[], object], seconds: float = 0.5, *, least: int = 3) -> float:
    """Median wall time of a call: one to warm up, then at least `least` calls and about `seconds` of them."""
    first = _seconds(call)
    if first > _VERY_LONG_SECONDS:
        return first
    if first > _LONG_SECONDS:
        return statistics.median([first, _seconds(call)])
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        times.append(_seconds(call))
    return statistics.median(times)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
