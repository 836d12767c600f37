"""Speculation with real models and paged caches: the same text, and the same bits in the cache."""

from types import SimpleNamespace

import pytest
import torch
from drafters import Guesses
from test_models_cache import keeps_row_order
from tiny_model import tiny_decoder

import lcore
from lcore.evaluation.needle import BUNDLED_MODEL
from lcore.generation import Completion, Done, Generator, Ngram, SelfSpeculation, Token, loop
from lcore.generation.self_speculation import RecentTokens

HOT = {"temperature": 1.0, "top_k": 100, "top_p": 0.95, "min_p": 0.001}
PATTERN = [(17 * i * i + 5 * i + 3) % 256 for i in range(25)]
PROMPTS = [(PATTERN * 4)[:90], PATTERN[:3], (PATTERN[::-1] * 3)[:67]]
SELF = SelfSpeculation(window=24, most=5, from_tokens=0)


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch, threads):
    """Every step takes one tick, so that how much is drafted depends on what is accepted alone."""
    torch.set_num_threads(1)  # models so small are faster so
    ticks = iter(range(10**9))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def write(model, speculate, prompts, cache_options=None, chunk=2048, count=40, **options):
    """(completions, cache) of a batch."""
    cache = model.new_cache(len(prompts), **(cache_options or {}))
    generator = Generator(model, prefill_chunk=chunk, speculate=speculate)
    rows = generator.generate(prompts, max_new_tokens=count, seed=11, cache=cache, **options)
    assert isinstance(rows, list)
    return rows, cache


def texts(rows: list[Completion]) -> list:
    return [(row.tokens, row.text, row.reason) for row in rows]


def drafts(rows: list[Completion]) -> tuple[int, int]:
    return sum(row.stats.drafted for row in rows), sum(row.stats.accepted for row in rows)


def assert_same_cache(got, want):
    """Every layer holds as many tokens, and answers the same queries with the same bits."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(want.num_layers):
        assert torch.equal(got.lengths(layer), want.lengths(layer))
        shape = (want.batch_size, 1, 2 * want.num_kv_heads, want.head_dim)
        q = torch.randn(shape, generator=generator).to(want.dtype)
        assert torch.equal(got.attend(layer, q), want.attend(layer, q))


@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("page_size", "chunk"), [(1, 5), (16, 2048), (64, 7)])
@pytest.mark.parametrize("kv_format", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["ngram", "self", "guesses"])
def test_the_text_and_the_cache_are_the_same(method, kv_format, page_size, chunk, options):
    model = tiny_decoder()
    cache_options = {"kv_format": kv_format, "page_size": page_size}
    want, plain = write(model, None, PROMPTS, cache_options, chunk, **options)
    guesses = Guesses([row.tokens for row in want], 257, right=0.85)
    speculate = {"ngram": Ngram(n_min=1), "self": SELF, "guesses": guesses}[method]
    got, cache = write(model, speculate, PROMPTS, cache_options, chunk, **options)
    assert texts(got) == texts(want)
    assert_same_cache(cache, plain)
    drafted, accepted = drafts(got)
    assert (drafted > 0) == (page_size > 1)
    if page_size > 1 and method != "ngram":  # sampled text need not repeat
        assert 0 < accepted < drafted


@pytest.mark.parametrize(("rows", "dtype"), [(2, torch.float32), (1, torch.bfloat16)])
@pytest.mark.parametrize("speculate", [Ngram(), SELF], ids=["ngram", "self"])
def test_the_bundled_model_writes_the_same(rows, speculate, dtype):
    if not keeps_row_order(dtype):
        pytest.skip("torch's bfloat16 product depends on the number of rows on this CPU")
    model = lcore.load_model(BUNDLED_MODEL, dtype=dtype)
    prompts = ["def read(path):\n    return open(path).read()\n\n\ndef write(path):\n    return ", "import os\n" * 5][
        :rows
    ]
    for options in ({}, HOT | {"stop": "\n\n"}):
        want, plain = write(model, None, prompts, count=50, **options)
        got, cache = write(model, speculate, prompts, count=50, **options)
        assert texts(got) == texts(want)
        assert_same_cache(cache, plain)
        if not options:
            assert drafts(got)[1] > 10


@pytest.mark.parametrize("speculate", ["ngram", SELF], ids=["ngram", "self"])
def test_ends_are_honoured_in_a_batch(speculate):
    model = tiny_decoder()
    free, _ = write(model, None, PROMPTS, count=50)
    stop = free[0].text[20:22]
    stop_id = free[1].tokens[9]
    for options in ({"stop_ids": stop_id}, {"stop": [stop, free[2].text[5:9]], "stop_ids": [stop_id]}):
        want, plain = write(model, None, PROMPTS, count=50, **options)
        got, cache = write(model, speculate, PROMPTS, count=50, **options)
        assert texts(got) == texts(want)
        assert "stop" in {row.reason for row in got}
        assert_same_cache(cache, plain)


@pytest.mark.parametrize("place", ["before attention", "after attention"])
@pytest.mark.parametrize("call", [0, 3, 4, 7, 10, 11])
@pytest.mark.parametrize("speculate", ["ngram", SELF], ids=["ngram", "self"])
def test_ctrl_c_leaves_a_cache_that_continues(speculate, call, place):
    """The call may be one that reads, drafts or judges."""
    model = tiny_decoder()
    prompt = PROMPTS[0]
    want = write(model, None, [prompt], count=30)[0][0].tokens
    module = model.model.layers[1].self_attn if place == "before attention" else model.model.layers[1].mlp
    calls = 0

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    generator, written = Generator(model, prefill_chunk=64, speculate=speculate), []
    with pytest.raises(KeyboardInterrupt):
        written.extend(e.id for e in generator.stream(prompt, max_new_tokens=30) if isinstance(e, Token))
    handle.remove()
    cache, known = generator.cache, prompt + written
    held = int(cache.seen()[0])
    assert cache.lengths(0).tolist() == cache.lengths(1).tolist() == [[held, held]]
    assert written == want[: len(written)]
    assert held == [0, len(prompt) + len(written) - 1][call > 1]
    rest = generator.generate(known[held:], max_new_tokens=30 - len(written), cache=cache)
    assert written + rest.tokens == want


def test_a_fork_takes_no_pages():
    """Room is reserved for the text, not for drafts: growing would copy the whole pool."""
    model = tiny_decoder()
    _, plain = write(model, None, PROMPTS, count=100)
    got, cache = write(model, SELF, PROMPTS, count=100)
    assert drafts(got)[1] > 0
    for key in ("pool_bytes", "bytes", "pages", "free_pages"):
        assert cache.stats()[key] == plain.stats()[key], key


def test_no_room_for_a_fork_is_said_before_any_work():
    model = tiny_decoder()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    room = write(model, None, PROMPTS)[1].stats()
    calls.clear()
    tight = model.new_cache(3, max_bytes=room["bytes"] + room["tail_bytes"] // 2)
    with pytest.raises(MemoryError, match="max_bytes"):
        Generator(model, speculate=SELF).stream(PROMPTS, max_new_tokens=40, cache=tight)
    assert calls == []
    enough = model.new_cache(3, max_bytes=room["bytes"] + room["tail_bytes"] + room["table_bytes"])
    got = Generator(model, speculate=SELF).generate(PROMPTS, max_new_tokens=40, cache=enough)
    assert drafts(got)[0] > 0


def test_short_contexts_get_no_drafts_from_the_model():
    model = tiny_decoder()
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    per_token = 2 * 2 * 2 * 16 * 4
    worth = 2 * 24 + -(-weights // per_token)  # tokens from which a draft reads half the bytes at most
    for tokens, some in ((worth - 60, False), (worth, True)):
        prompt = [i * i % 251 for i in range(tokens)]
        done = Generator(model, speculate=SelfSpeculation(window=24)).generate(prompt, max_new_tokens=30)
        assert (done.stats.drafted > 0) == some


def test_a_view_of_the_callers_own():
    """Drafts read whatever the view shows: here everything, so that all are right."""
    model, forks = tiny_decoder(), []

    def everything(fork):
        forks.append(fork)
        return fork

    want, plain = write(model, None, PROMPTS, **HOT)
    speculate = SelfSpeculation(most=5, from_tokens=0, view=everything)
    got, cache = write(model, speculate, PROMPTS, **HOT)
    assert texts(got) == texts(want)
    assert_same_cache(cache, plain)
    drafted, accepted = drafts(got)
    assert drafted == accepted > 60
    assert forks
    with pytest.raises(ValueError, match="open"):
        forks[0].seen()


@pytest.mark.parametrize("own", [(-1, -1), (9, 0), (2, 0)])
def test_recent_tokens_are_all_that_is_seen(own):
    cache = lcore.PagedCache(1, 2, 16, dtype=torch.float32, kv_format="fp32", page_size=16)
    k, v, q = torch.randn(1, 50, 2, 16), torch.randn(1, 50, 2, 16), torch.randn(1, 3, 4, 16)
    view = RecentTokens(cache, 5)
    view.append(0, k, v)
    got = view.attend(0, q, window_size=own)
    left = min(4, own[0]) if own[0] >= 0 else 4
    want = lcore.attention(q, k, v, causal=True, window_size=(left, 0))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert view.seen().tolist() == [50]


def test_events_carry_the_counts():
    model = tiny_decoder()
    *_, done = Generator(model, speculate=SELF).stream(PROMPTS[0], max_new_tokens=30)
    assert isinstance(done, Done)
    assert 0 < done.stats.accepted <= done.stats.drafted
    plain = Generator(model).generate(PROMPTS[0], max_new_tokens=5)
    assert (plain.stats.drafted, plain.stats.accepted) == (0, 0)
