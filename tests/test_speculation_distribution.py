"""Sampled text under speculation follows the model's distribution: Pearson's chi-square test over many seeds."""

from types import SimpleNamespace

import pytest
import torch
from tiny_model import tiny_decoder

from lcore.generation import Generator, Ngram, Sampling, SelfSpeculation, loop
from lcore.generation.sampling import probabilities

VOCAB, LENGTH = 5, 6
PROMPT = [0, 1, 2, 0, 1, 3, 0, 1, 4, 0]
RUNS, ROWS = 6, 1000
HOT = {"temperature": 1.2, "top_p": 0.97}


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch, threads):
    torch.set_num_threads(1)
    ticks = iter(range(10**9))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def model():
    return tiny_decoder(seed=3, vocab_size=VOCAB, tokenizer=None, initializer_range=0.2)


def exact(decoder, **options) -> torch.Tensor:
    """(VOCAB,) * LENGTH: the probability of every text of LENGTH tokens, from the model without cache."""
    sampling = Sampling(**options)
    joint = torch.ones(1, dtype=torch.float64)
    texts = torch.tensor([PROMPT])
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = decoder(texts)[:, -1]
        joint = (joint[:, None] * torch.stack([probabilities(row, sampling) for row in logits])).flatten()
        texts = torch.cat([texts.repeat_interleave(VOCAB, 0), torch.arange(VOCAB).repeat(len(texts))[:, None]], dim=1)
    return joint.view((VOCAB,) * LENGTH)


def p_value(texts: torch.Tensor, joint: torch.Tensor) -> float:
    """Of the last two tokens of each text, given their exact joint distribution; likely cells one by one."""
    expected = joint.sum(tuple(range(LENGTH - 2))).flatten() * len(texts)
    observed = torch.bincount(texts[:, -2] * VOCAB + texts[:, -1], minlength=VOCAB**2).double()
    rare = expected < 5
    cells = [(o, e) for o, e, r in zip(observed, expected, rare, strict=True) if not r]
    if rare.any():
        cells.append((observed[rare].sum(), expected[rare].sum()))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize(
    "speculate", [Ngram(n_min=1), SelfSpeculation(window=6, most=4, from_tokens=0)], ids=["ngram", "self"]
)
def test_the_distribution_is_the_models(speculate):
    decoder = model()
    joint = exact(decoder, **HOT)
    generator = Generator(decoder, speculate=speculate)
    texts, drafted, accepted = [], 0, 0
    for run in range(RUNS):  # row r draws from seed + r
        rows = generator.generate([PROMPT] * ROWS, max_new_tokens=LENGTH, seed=run * ROWS, **HOT)
        texts += [row.tokens for row in rows]
        drafted += sum(row.stats.drafted for row in rows)
        accepted += sum(row.stats.accepted for row in rows)
    assert accepted > RUNS * ROWS // 2 and drafted - accepted > RUNS * ROWS // 10
    assert p_value(torch.tensor(texts), joint) > 1e-3
    # The same counts tell a somewhat more certain model from this one.
    assert p_value(torch.tensor(texts), exact(decoder, **HOT | {"temperature": 1.0})) < 1e-6
