"""How long the rest of a prompt will take, and the bar that shows it on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lcore.generation.events import Event, Prefill


class Clock:
    """Fits step seconds = a * tokens + b * pairs, where pairs is the number of (query, key) pairs of causal attention.

    `pairs` makes the estimate honest on a long prompt, whose last tokens cost many times what the first ones cost.
    a and b are the least-squares solution with a >= 0 and b >= 0.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[float, float, float]] = []

    def add(self, tokens: int, pairs: int, seconds: float) -> None:
        self._steps.append((float(tokens), float(pairs), seconds))

    def eta(self, tokens: int, pairs: int) -> float | None:
        """Seconds for that much more work, None before the first step."""
        if not self._steps:
            return None
        # The first step also pays for reading the weights from disk: left out as soon as two others are known.
        steps = self._steps[1:] if len(self._steps) >= 3 else self._steps
        tt = sum(t * t for t, _, _ in steps)
        tp = sum(t * p for t, p, _ in steps)
        pp = sum(p * p for _, p, _ in steps)
        ts = sum(t * s for t, _, s in steps)
        ps = sum(p * s for _, p, s in steps)
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
