"""The one timer of the Python benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

# A call that takes this long is not disturbed by its first run's page faults: that counts, and one more.
_LONG_SECONDS = 2.0
_VERY_LONG_SECONDS = 10.0  # once will do


def median_seconds(
    calls: Mapping[Any, Callable[[], object]], seconds: float = 0.5, *, least: int = 5
) -> dict[Any, float]:
    """Median wall time of each call. The calls take turns: what else the machine does falls on all of them alike.

    Each is called once to warm up, then at least `least` times and about `seconds` long; long calls less often.
    """
    times = {name: [_seconds(call)] for name, call in calls.items()}
    rounds = {name: _rounds(first[0], seconds, least) for name, first in times.items()}
    for name, measured in times.items():
        if rounds[name] >= least:  # the first call was to warm up
            measured.clear()
    for turn in range(max(rounds.values(), default=0)):
        for name, call in calls.items():
            if turn < rounds[name]:
                times[name].append(_seconds(call))
    return {name: statistics.median(all_of) for name, all_of in times.items()}


def _rounds(first: float, seconds: float, least: int) -> int:
    if first > _VERY_LONG_SECONDS:
        return 0
    return 1 if first > _LONG_SECONDS else max(least, min(int(seconds / first), 1000))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
