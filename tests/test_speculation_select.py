"""Speculation over a part of the cache: each draft is judged over the pages that it would read as a token."""

import pytest
import torch
from cache_cases import random_kv
from drafters import Guesses
from tiny_model import tiny_decoder
from tolerance import assert_same_bits

import lcore
from lcore import selection
from lcore.generation import Generator, SelfSpeculation
from lcore.positions import RopeConfig, Rotation

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 16
PROMPT = [(17 * i * i + 5 * i + 3) % 256 for i in range(500)]
PROMPTS = [PROMPT, PROMPT[:70], PROMPT[100:407]]


def quest(budget, **options):
    return selection.Quest(budget, **{"dense_layers": 0, **options})


def new_cache(select, batch=1, kv_format="fp32", rope=None):
    sizes = {"dtype": torch.float32, "kv_format": kv_format, "page_size": PAGE}
    return lcore.PagedCache(2, KV_HEADS, DIM, batch_size=batch, select=select, rope=rope, **sizes)


@pytest.mark.parametrize("select", [quest(3), quest(0.3), quest(3, dense_layers=1), quest(3, prefill=True)])
@pytest.mark.parametrize("kv_format", ["fp32", "int4"])
@pytest.mark.parametrize("rope", [None, Rotation.of(RopeConfig(), DIM)], ids=["after", "before"])
def test_each_query_reads_what_it_would_read_alone(rope, kv_format, select):
    cache = new_cache(select, 3, kv_format, rope)
    k, v = random_kv(3, 320, KV_HEADS, DIM)
    counts = torch.tensor([4, 1, 0])  # the first row fills a page with the first of them, the second with its only one
    for layer in range(2):
        cache.append(layer, k, v, lengths=torch.tensor([303, 319, 250]))
    alone = cache.fork()
    for layer in range(2):
        k, v = random_kv(3, 4, KV_HEADS, DIM)
        q = torch.randn(3, 4, HEADS, DIM)
        cache.append(layer, k, v, lengths=counts)
        got, lse = cache.attend(layer, q, lengths=counts, return_lse=True, separately=True)
        dropped = cache.dropped_mass(layer)
        for i in range(4):
            real = (counts > i).long()
            alone.append(layer, k[:, i : i + 1], v[:, i : i + 1], lengths=real)
            want, want_lse = alone.attend(layer, q[:, i : i + 1], lengths=real, return_lse=True)
            assert_same_bits(got[:, i : i + 1].contiguous(), want)
            assert_same_bits(lse[..., i : i + 1].contiguous(), want_lse)
            assert_same_bits(dropped[..., i : i + 1].contiguous(), alone.dropped_mass(layer))
        reads_all = layer < select.dense_layers or isinstance(select.budget, float)  # bounds of random keys are wide
        assert reads_all or (dropped[0] > 0).any()
        assert not dropped[2].any()


def test_it_is_not_what_they_read_together():
    cache = new_cache(quest(3, prefill=True))
    cache.append(0, *random_kv(1, 325, KV_HEADS, DIM))
    q = torch.randn(1, 4, HEADS, DIM)
    assert not torch.equal(cache.attend(0, q), cache.attend(0, q, separately=True))
    cache.select = None
    assert_same_bits(cache.attend(0, q), cache.attend(0, q, separately=True))


def test_a_page_that_is_filled_behind_the_first_is_refused():
    cache = new_cache(quest(3))
    cache.append(0, *random_kv(1, 321, KV_HEADS, DIM))
    with pytest.raises(ValueError, match="q must hold no token behind the first of a row that fills a page of 16"):
        cache.attend(0, torch.randn(1, 3, HEADS, DIM), separately=True)
    cache.attend(0, torch.randn(1, 2, HEADS, DIM), separately=True)


@pytest.mark.parametrize("kv_format", [None, "bf16", "int4"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 5}], ids=["greedy", "sampled"])
def test_the_text_is_that_without_drafts(options, kv_format):
    model, select = tiny_decoder(), quest(2)
    want = Generator(model, kv_format, 64, select=select).generate(PROMPTS, max_new_tokens=70, **options)
    texts = [row.tokens for row in want]
    generator = Generator(model, kv_format, 64, select=select, speculate=Guesses(texts, 257, 0.8))
    got = generator.generate(PROMPTS, max_new_tokens=70, **options)
    assert [row.tokens for row in got] == texts
    assert sum(row.stats.accepted for row in got) > 0 and any(row.stats.accepted < row.stats.drafted for row in got)
    every = Generator(model, kv_format, 64).generate(PROMPTS, max_new_tokens=70, **options)
    assert [row.tokens for row in every] != texts


@pytest.mark.parametrize("speculate", ["ngram", SelfSpeculation(window=48, from_tokens=0)], ids=["ngram", "self"])
def test_drafters_of_both_kinds(speculate):
    model, prompt = tiny_decoder(), PROMPT[:60] * 7
    want = Generator(model, prefill_chunk=64, select=quest(3)).generate(prompt, max_new_tokens=120)
    got = Generator(model, prefill_chunk=64, select=quest(3), speculate=speculate).generate(prompt, max_new_tokens=120)
    assert got.tokens == want.tokens and got.stats.drafted > 0
    assert 0 < want.stats.dropped_mass <= got.stats.dropped_mass


def test_what_observes_attention_is_refused():
    with pytest.raises(ValueError, match="speculate must be None with a selection that observes attention"):
        Generator(tiny_decoder(), select=selection.InfLLM(80), speculate="ngram")
