"""Drafts over recurrent states: the same text, and the same bits in the cache, whatever is drafted and refused."""

from types import SimpleNamespace

import pytest
from drafters import Guesses
from state_cases import HYBRIDS, KINDS, same_states, tiny_states_model

from lcore.generation import Generator, Ngram, SelfSpeculation, Token, loop

HOT = {"temperature": 1.0, "top_k": 100, "top_p": 0.95}
PATTERN = [(17 * i * i + 5 * i + 3) % 256 for i in range(25)]
PROMPTS = [(PATTERN * 4)[:90], PATTERN[:3], (PATTERN[::-1] * 3)[:67]]


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch):
    """Every step takes one tick, so that how much is drafted depends on what is accepted alone."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def write(model, speculate, prompts, kv_format=None, count=16, **options):
    generator = Generator(model, kv_format, prefill_chunk=64, speculate=speculate, prefix_reuse=False)
    rows = generator.generate(prompts, max_new_tokens=count, seed=11, **options)
    return rows, generator.cache


def guesses(rows, right=0.7):
    return Guesses([row.tokens for row in rows], 257, right)


@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_states_are_those_without_drafts(kind, options):
    model = tiny_states_model(kind)
    for prompt in PROMPTS[:2]:
        [want], plain = write(model, None, [prompt], **options)
        for speculate in (Ngram(), guesses([want]), guesses([want], right=1.0)):
            [got], cache = write(model, speculate, [prompt], **options)
            assert got.tokens == want.tokens and got.reason == want.reason
            assert same_states(cache, plain) and cache.seen().tolist() == plain.seen().tolist()
            if isinstance(speculate, Guesses):
                assert got.stats.drafted > 3
                assert 0 < got.stats.accepted < got.stats.drafted or speculate.right == 1.0


@pytest.mark.parametrize("kind", ["mamba", *HYBRIDS])
def test_rows_of_a_batch_are_drafted_and_taken_back_each_on_its_own(kind):
    model = tiny_states_model(kind)
    want, plain = write(model, None, PROMPTS, stop_ids=[int(PATTERN[3])])
    got, cache = write(model, guesses(want), PROMPTS, stop_ids=[int(PATTERN[3])])
    assert [row.tokens for row in got] == [row.tokens for row in want]
    assert cache.seen().tolist() == plain.seen().tolist()
    assert 0 < sum(row.stats.accepted for row in got) < sum(row.stats.drafted for row in got)
    if kind != "qwen3_next":
        assert same_states(cache, plain)


@pytest.mark.parametrize("kind", HYBRIDS)
@pytest.mark.parametrize("kv_format", ["int8", "bf16"])
def test_coded_pages_of_hybrid_models(kind, kv_format):
    model = tiny_states_model(kind)
    want, plain = write(model, None, PROMPTS[:1], kv_format)
    got, cache = write(model, guesses(want), PROMPTS[:1], kv_format)
    assert got[0].tokens == want[0].tokens and same_states(cache, plain)
    assert 0 < got[0].stats.accepted < got[0].stats.drafted


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrid_models_draft_for_themselves(kind):
    model = tiny_states_model(kind)
    want, plain = write(model, None, PROMPTS[:1])
    got, cache = write(model, SelfSpeculation(window=16, most=4, from_tokens=0), PROMPTS[:1])
    assert got[0].tokens == want[0].tokens and same_states(cache, plain)
    assert got[0].stats.accepted > 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_closed_among_accepted_drafts_leaves_what_was_told(kind):
    model = tiny_states_model(kind)
    [want], _ = write(model, None, PROMPTS[:1])
    for told in (1, 4, 6):
        generator = Generator(model, prefill_chunk=64, speculate=guesses([want], right=1.0), prefix_reuse=False)
        stream, count = generator.stream(PROMPTS[0], max_new_tokens=16), 0
        while count < told:
            count += isinstance(next(stream), Token)
        stream.close()
        held = int(generator.cache.seen())
        assert len(PROMPTS[0]) + told - 1 <= held <= len(PROMPTS[0]) + told
        rest = (PROMPTS[0] + want.tokens)[held : len(PROMPTS[0]) + told + 1]
        plain = Generator(model, prefill_chunk=64)
        [row] = plain.generate([rest], max_new_tokens=3, cache=generator.cache)
        assert row.tokens == want.tokens[told + 1 : told + 4]


@pytest.mark.parametrize("kind", ["mamba2", "jamba"])
def test_a_step_with_drafts_that_fails_is_taken_back(kind):
    model = tiny_states_model(kind)
    [want], _ = write(model, None, PROMPTS[:1])
    layers = model.model.layers if kind in HYBRIDS else model.backbone.layers
    steps = []

    def fail(_, inputs):
        steps.append(inputs[0].shape[1])
        if sum(n > 1 for n in steps[2:]) == 3:  # the third step with drafts
            raise KeyboardInterrupt

    handle = layers[1].register_forward_pre_hook(fail)
    generator = Generator(model, prefill_chunk=64, speculate=guesses([want]), prefix_reuse=False)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS[0], max_new_tokens=16)
    handle.remove()
    held = int(generator.cache.seen())
    assert held > len(PROMPTS[0])
    text = PROMPTS[0] + want.tokens
    rest = Generator(model).generate(text[held : held + 1], max_new_tokens=4, cache=generator.cache)
    assert rest.tokens == text[held + 1 : held + 5]
