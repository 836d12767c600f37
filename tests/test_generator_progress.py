"""The estimate of the time left, and the bar that shows it."""

import io

import pytest

from lcore.generation.events import Done, Prefill, Stats, Token
from lcore.generation.progress import Clock, causal_pairs, show_prefill

STATS = Stats(4, 1.0, 1, 1.0, 0, 0)
EVENTS = [Prefill(0, 4, None), Prefill(2, 4, 3.0), Prefill(4, 4, 0.0), Token(1, "x"), Done("length", STATS)]


def run(clock: Clock, chunk: int, steps: int, a: float, b: float) -> None:
    for i in range(steps):
        pairs = causal_pairs(i * chunk, (i + 1) * chunk)
        clock.add(chunk, pairs, a * chunk + b * pairs)


def test_pairs_of_a_causal_chunk():
    assert causal_pairs(0, 3) == 1 + 2 + 3
    assert causal_pairs(3, 5) == 4 + 5
    assert causal_pairs(7, 7) == 0


@pytest.mark.parametrize(("a", "b"), [(1e-3, 0.0), (1e-3, 1e-6), (0.0, 1e-6)])
def test_the_estimate_grows_with_the_position(a, b):
    clock = Clock()
    run(clock, chunk=100, steps=4, a=a, b=b)
    left = causal_pairs(400, 10_000)
    assert clock.eta(9600, left) == pytest.approx(a * 9600 + b * left)


def test_no_estimate_before_the_first_step_and_a_linear_one_after_it():
    clock = Clock()
    assert clock.eta(10, 55) is None
    clock.add(100, 5050, 2.0)
    assert clock.eta(300, 10**9) == pytest.approx(6.0)


def test_a_slow_first_step_is_forgotten():
    clock = Clock()
    clock.add(100, causal_pairs(0, 100), 60.0)
    for i in range(1, 5):
        clock.add(100, causal_pairs(i * 100, (i + 1) * 100), 0.1)
    assert clock.eta(1000, causal_pairs(500, 1500)) == pytest.approx(1.0, rel=1e-6)


def test_noise_never_makes_the_estimate_negative():
    clock = Clock()
    for i, seconds in enumerate([5.0, 3.0, 2.0, 1.0, 0.5]):
        clock.add(100, causal_pairs(i * 100, (i + 1) * 100), seconds)
    assert clock.eta(10**6, causal_pairs(500, 10**6)) > 0


def test_a_pipe_stays_silent_and_gets_every_event():
    stream = io.StringIO()
    assert list(show_prefill(iter(EVENTS), stream)) == EVENTS
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_tokens_rate_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    seen = []
    for event in show_prefill(iter(EVENTS), stream):
        seen.append(event)
        if isinstance(event, Token):
            before_text = stream.getvalue()
    assert seen == EVENTS
    shown = stream.getvalue()
    assert shown == before_text  # the bar is gone before the first token
    assert "4 of 4 tokens" in shown
    assert "tokens/s" in shown
    assert "left" in shown


def test_the_bar_ends_when_the_caller_leaves_or_the_work_fails(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    def failing():
        yield Prefill(0, 4, None)
        raise KeyboardInterrupt

    stream = Terminal()
    with pytest.raises(KeyboardInterrupt):
        list(show_prefill(failing(), stream))
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h")  # cursor hidden, shown again

    events = show_prefill(iter(EVENTS), stream)
    next(events)
    events.close()
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h")
