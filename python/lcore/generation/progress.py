"""How long the rest of a prompt will take, and the bar that shows it on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import IO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lcore.generation.events import Event, Prefill


class Clock:
    """Fits step seconds = a * tokens + b * pairs, where pairs is the number of (query, key) pairs of causal attention.

    `pairs` makes the estimate honest on a long prompt, whose last tokens cost many times what the first ones cost.
    a and b are the least-squares solution with a >= 0 and b >= 0, kept as five sums over the steps.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._first = np.zeros(5)
        self._sums = np.zeros(5)  # tokens^2, tokens * pairs, pairs^2, tokens * seconds, pairs * seconds

    def add(self, tokens: int, pairs: int, seconds: float) -> None:
        t, p = float(tokens), float(pairs)
        products = np.array([t * t, t * p, p * p, t * seconds, p * seconds])
        self._sums += products
        self._steps += 1
        if self._steps == 1:
            self._first = products
        elif self._steps == 3:
            # The first step also paid for reading the weights from disk: out as soon as two others are known.
            self._sums -= self._first

    def eta(self, tokens: int, pairs: int) -> float | None:
        """Seconds for that much more work, None before the first step."""
        if self._steps == 0:
            return None
        tt, tp, pp, ts, ps = (float(value) for value in self._sums)
        determinant = tt * pp - tp * tp
        a, b = ts / tt, 0.0
        if determinant > 1e-9 * tt * pp:
            a, b = (ts * pp - ps * tp) / determinant, (ps * tt - ts * tp) / determinant
            if b < 0:
                a, b = ts / tt, 0.0
            elif a < 0:
                a, b = 0.0, ps / pp
        return a * tokens + b * pairs


def causal_pairs(start: int, end: int) -> int:
    """(query, key) pairs when the tokens at positions [start, end) attend to themselves and all before them."""
    return (end * (end + 1) - start * (start + 1)) // 2


def show_prefill(events: Iterator[Event], stream: IO[str] | None = None) -> Iterator[Event]:
    """Passes `events` on and draws the reading of the prompt on `stream` (stderr): a bar, tokens/s and time left.

    Draws only on a terminal, and leaves nothing behind when the prompt has been read.
    """
    console = Console(file=stream or sys.stderr)
    if not console.is_terminal:
        yield from events
        return
    bar: Progress | None = None
    task = TaskID(0)
    begin = time.perf_counter()
    try:
        for event in events:
            if isinstance(event, Prefill):
                if bar is None:
                    bar = _bar(console)
                    task = bar.add_task("reading", total=event.total, rate="", left="")
                    bar.start()
                if event.eta is not None:
                    rate = f"{event.done / (time.perf_counter() - begin):,.0f} tokens/s"
                    bar.update(task, completed=event.done, rate=rate, left=f"{_duration(event.eta)} left")
                if event.done == event.total:
                    bar.stop()
            yield event
    finally:
        if bar is not None:
            bar.stop()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
    )


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
