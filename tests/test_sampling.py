"""The distributions that are drawn from, and the numbers that draw from them."""

import math

import pytest
import torch

from lcore.generation.sampling import Sampling, probabilities, sample, uniform

LOGITS = torch.tensor([2.0, -1.0, 0.5, 2.5, 0.0, -3.0, 1.0, 1.5])
DRAWS = 20_000


def expected(temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The same distribution in plain Python, filter after filter."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(LOGITS.tolist())}
    ranked = sorted(weights, key=lambda i: -weights[i])
    if top_k:
        ranked = ranked[:top_k]
    mass = sum(weights[i] for i in ranked)
    kept, cumulative = [], 0.0
    for i in ranked:
        if cumulative < top_p * mass:
            kept.append(i)
            cumulative += weights[i]
    kept = [i for i in kept if weights[i] >= min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(LOGITS))]


SETTINGS = [
    pytest.param(1.0, 0, 1.0, 0.0, id="plain"),
    pytest.param(0.5, 0, 1.0, 0.0, id="cold"),
    pytest.param(2.0, 0, 1.0, 0.0, id="hot"),
    pytest.param(1.0, 3, 1.0, 0.0, id="top_k"),
    pytest.param(1.0, 100, 1.0, 0.0, id="top_k above the vocabulary"),
    pytest.param(1.0, 0, 0.8, 0.0, id="top_p"),
    pytest.param(1.0, 0, 1e-9, 0.0, id="top_p that keeps one"),
    pytest.param(1.0, 0, 1.0, 0.2, id="min_p"),
    pytest.param(1.0, 0, 1.0, 1.0, id="min_p that keeps one"),
    pytest.param(1.5, 6, 0.9, 0.15, id="all"),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_probabilities_are_the_filtered_softmax(temperature, top_k, top_p, min_p):
    p = probabilities(LOGITS, Sampling(temperature, top_k, top_p, min_p))
    torch.testing.assert_close(p, torch.tensor(expected(temperature, top_k, top_p, min_p), dtype=torch.float64))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_draws_follow_the_probabilities(temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    below = probabilities(LOGITS, sampling).cumsum(0)
    numbers = torch.tensor([uniform(7, position) for position in range(DRAWS)], dtype=torch.float64)
    counts = torch.bincount(torch.searchsorted(below, numbers, right=True), minlength=len(LOGITS)).double()
    want = torch.tensor(expected(temperature, top_k, top_p, min_p), dtype=torch.float64) * DRAWS
    assert counts[want == 0].sum() == 0
    possible = want > 0
    chi_square = ((counts - want)[possible] ** 2 / want[possible]).sum()
    # 0.999 quantile of chi-square with 7 degrees of freedom, the most that this vocabulary has
    assert chi_square < 24.3


def test_sample_is_the_inverse_distribution_function():
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.95, min_p=0.01)
    below = probabilities(LOGITS, sampling).cumsum(0)
    for position in range(300):
        u = uniform(3, position)
        assert sample(LOGITS, sampling, 3, position) == int((below <= u).sum())


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.25, 3), (1 - 2.0**-53, 4)])
def test_numbers_on_a_border_never_choose_a_token_without_probability(monkeypatch, u, token):
    monkeypatch.setattr("lcore.generation.sampling.uniform", lambda seed, position: u)
    logits = torch.tensor([-math.inf, 0.0, -math.inf, math.log(2.0), 0.0, -math.inf])
    assert sample(logits, Sampling(temperature=1.0), 0, 0) == token


def test_uniform_numbers_are_even_and_unrelated():
    rows = torch.tensor([[uniform(seed, position) for position in range(5000)] for seed in (0, 1, 2)])
    assert rows.min() >= 0 and rows.max() < 1
    counts = torch.histc(rows.flatten(), bins=16, min=0, max=1)
    assert ((counts - 937.5) ** 2 / 937.5).sum() < 37.7  # 0.999 quantile, 15 degrees of freedom
    correlation = torch.corrcoef(torch.cat([rows, rows[:1].roll(1, 1)]))
    assert (correlation - torch.eye(4)).abs().max() < 0.06


def test_uniform_depends_on_seed_and_position_only():
    assert uniform(5, 9) == uniform(5, 9)
    assert len({uniform(5, 9), uniform(5, 10), uniform(6, 9), uniform(0, 0)}) == 4
    assert uniform(2**63, 10_000_000) != uniform(2**63 - 1, 10_000_000)


def test_greedy_takes_the_first_of_equals():
    assert sample(torch.tensor([0.0, 3.0, 3.0, 1.0]), Sampling(), 0, 0) == 1


def test_top_k_keeps_ties_and_top_p_keeps_the_smaller_ids():
    tied = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert (probabilities(tied, Sampling(1.0, top_k=2)) > 0).tolist() == [False, True, True, True, False]
    p = probabilities(torch.zeros(4), Sampling(1.0, top_p=0.5))
    assert p.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_extreme_logits_stay_finite():
    logits = torch.tensor([1e30, -math.inf, 1e30, -1e30])
    p = probabilities(logits, Sampling(temperature=1e-6, top_p=0.99, min_p=0.5))
    assert p.tolist() == [0.5, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(FloatingPointError, match=r"logits must be finite, got (nan|inf) at position 12"):
        sample(torch.tensor([0.0, bad]), Sampling(), 0, 12)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("temperature", -0.1, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", math.inf, ValueError),
        ("temperature", "1", TypeError),
        ("temperature", True, TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.01, ValueError),
        ("top_p", math.nan, ValueError),
        ("min_p", -0.01, ValueError),
        ("min_p", 1.01, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("seed", None, TypeError),
    ],
)
def test_bad_values_name_the_argument(argument, value, error):
    with pytest.raises(error, match=rf"lcore.Generator: {argument} must be .*, got "):
        Sampling(**{"temperature": 1.0, argument: value})
