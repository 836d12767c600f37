"""The one timer of the Python benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def median_seconds(call: Callable[[], object], *, seconds: float = 0.5, least: int = 3) -> float:
    """Median wall time of a call: one to warm up, then at least `least` calls and about `seconds` of them."""
    call()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
