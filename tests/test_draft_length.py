"""How much is drafted: simulated runs on machines where a drafted token costs little, or much."""

import random

import pytest

from lcore.generation.draft_length import Chance, DraftLength


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_expected_tokens_follow_the_share_of_right_ones(p):
    """A draft of k is right in its first i tokens with probability p^i."""
    chance, source = Chance(), random.Random(1)
    means = []
    for _ in range(4000):
        accepted = 0
        while accepted < 4 and source.random() < p:
            accepted += 1
        chance.judge(4, accepted)
        means.append(chance.tokens(4))
    want = sum(p**i for i in range(5))
    assert sum(means[100:]) / len(means[100:]) == pytest.approx(want, rel=0.15)


def run(cost: float, p: float, steps: int, rows: int = 1, most: int = 16, noise: float = 0.0):
    """(tokens, seconds, widths) of a run whose step takes 1 + cost * width, give or take `noise`."""
    length, source = DraftLength(rows), random.Random(2)
    tokens, seconds, widths = 0, 0.0, []
    for _ in range(steps):
        limits = [(row, most) for row in range(rows)]
        width = length.begin(limits)
        width = length.cut([(row, min(width, most)) for row in range(rows)]) if width else 0
        took = (1 + cost * width) * (1 + noise * source.random() ** 4)
        length.end(width, took)
        seconds += 1 + cost * width
        widths.append(width)
        tokens += rows
        for row in range(rows if width else 0):
            accepted = 0
            while accepted < width and source.random() < p:
                accepted += 1
            tokens += accepted
            length.judge(row, width, accepted)
    return tokens, seconds, widths


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("cost", [0.02, 0.1, 0.45, 1.2])
def test_useless_drafts_cost_little(cost, noise):
    tokens, seconds, widths = run(cost, 0.0, 2000, noise=noise)
    assert tokens == 2000
    assert seconds < 2000 * 1.04
    assert any(widths[-100:])  # the text may change: it is tried again


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("cost", [0.02, 0.1, 0.45])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_rate_is_near_the_best_fixed_length(p, cost, noise):
    best = max(sum(p**i for i in range(k + 1)) / (1 + cost * k) for k in range(17))
    tokens, seconds, _ = run(cost, p, 3000, noise=noise)
    assert tokens / seconds > 0.92 * best
    assert tokens / seconds > 0.96


def test_where_every_token_costs_a_whole_step_nothing_is_drafted():
    _, _, widths = run(1.2, 0.9, 500)
    assert sum(width > 0 for width in widths[20:]) < 100
    assert set(widths[20:]) <= {0, 1}


def test_a_text_that_begins_to_repeat_is_noticed():
    length = DraftLength(1)
    widths = []
    for step in range(400):
        width = length.begin([(0, 16)])
        length.end(width, 1 + 0.3 * width)
        if width:
            length.judge(0, width, width if step >= 300 else 0)
        widths.append(width)
    assert sum(widths[100:300]) < 20
    assert sum(width == 16 for width in widths[350:]) > 40


def test_the_first_steps_and_some_later_ones_are_plain():
    """Otherwise there would be nothing to compare with."""
    _, _, widths = run(0.05, 1.0, 400)
    assert widths[:2] == [0, 0] and widths[2] > 0
    assert 4 <= sum(width == 0 for width in widths[2:]) <= 8


def test_a_row_that_cannot_draft_makes_the_others_draft_less():
    length = DraftLength(13)
    for _ in range(4):
        length.end(0, 1.0)
    for _ in range(9):
        length.end(4, 1 + 4 * 0.1)
    alone = length.begin([(0, 16)])
    assert 0 < length.cut([(0, 16), *((row, 0) for row in range(1, 3))]) < alone
    assert length.cut([(0, 16), *((row, 0) for row in range(1, 13))]) == 0
    assert length.cut([]) == 0
