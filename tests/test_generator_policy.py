"""The generator with eviction: the text of a model that sees what its policy keeps, in the memory that this takes."""

import math

import pytest
import torch
from test_cache_memory import held_bytes
from tiny_model import greedy_by_hand, tiny_decoder

from lcore import policies
from lcore.generation import Generator, Prefill, memory

PROMPT = [(17 * i * i + 5 * i + 3) % 256 for i in range(300)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["h2o", "snapkv", "adakv", "tova"])
def test_the_text_is_the_models_own_over_what_is_kept(name):
    model = tiny_decoder()
    policy = policies.parse_policy(f"{name}:budget=80" + (",window=16" if name != "tova" else ""))
    ids, cache = greedy_by_hand(model, PROMPT, 64, 90, policy=policy)
    generator = Generator(model, prefill_chunk=64, policy=policy)
    assert generator.generate(PROMPT, max_new_tokens=90).tokens == ids
    for layer in range(2):
        assert torch.equal(generator.cache.lengths(layer), cache.lengths(layer))
    assert generator.cache.seen().tolist() == [390] and int(cache.lengths(0).sum()) <= 2 * (80 + 65)
    assert ids != Generator(model).generate(PROMPT, max_new_tokens=90).tokens


def test_an_endless_budget_changes_no_text():
    model = tiny_decoder()
    want = Generator(model, prefill_chunk=64).generate(PROMPT, max_new_tokens=40).tokens
    for policy in (policies.H2O(math.inf), policies.SnapKV(1.0)):
        assert Generator(model, prefill_chunk=64, policy=policy).generate(PROMPT, max_new_tokens=40).tokens == want


def test_rows_of_a_batch_are_evicted_one_by_one():
    model = tiny_decoder()
    prompts = [PROMPT, PROMPT[:50], PROMPT[100:270]]
    generator = Generator(model, prefill_chunk=64, policy=policies.H2O(60))
    together = generator.generate(prompts, max_new_tokens=30)
    assert generator.cache.seen().tolist() == [330, 80, 200]
    assert all(60 <= n <= 60 + 64 for n in generator.cache.lengths(1).flatten().tolist())
    for prompt, completion in zip(prompts, together, strict=True):
        assert generator.generate(prompt, max_new_tokens=30).tokens == completion.tokens


def test_the_cache_takes_what_is_left_after_the_prompt():
    model = tiny_decoder(head_dim=64, hidden_size=128, num_kv_heads=2, num_heads=4)
    prompt = PROMPT * 14
    stats = {}
    for name, policy in (("all", None), ("h2o", policies.H2O(512))):
        generator = Generator(model, prefill_chunk=256, policy=policy)
        generator.generate(prompt, max_new_tokens=0)
        stats[name] = generator.cache.stats()["bytes"]
        assert stats[name] == held_bytes(generator.cache)
    evicted = 2 * 2 * (4200 - 512)
    assert stats["all"] - stats["h2o"] == pytest.approx(evicted * 2 * 64 * 4, rel=0.03)


def test_decoding_needs_no_more_pages_than_the_slack():
    model = tiny_decoder()
    generator = Generator(model, prefill_chunk=64, policy=policies.H2O(128))
    pools = [
        generator.cache.stats()["pool_bytes"]
        for event in generator.stream(PROMPT, max_new_tokens=150)
        if not isinstance(event, Prefill)
    ]
    assert len(set(pools)) == 1 and pools[0] <= 2 * 2 * (128 // 64 + 2) * 64 * 16 * 2 * 4


def test_an_interrupted_chunk_that_was_evicted_closes_the_cache(monkeypatch):
    model = tiny_decoder()
    generator = Generator(model, prefill_chunk=64, policy=policies.H2O(40))
    layer = model.model.layers[1]
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return type(layer).forward(layer, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer, "forward", interrupted)
        generator.generate(PROMPT, max_new_tokens=5)
    with pytest.raises(ValueError, match="the cache must be open, got a closed one"):
        generator.cache.seen()
    assert generator.generate(PROMPT, max_new_tokens=5).tokens


def test_an_interrupted_step_of_decoding_is_taken_back(monkeypatch):
    model = tiny_decoder()
    generator = Generator(model, prefill_chunk=64, policy=policies.H2O(80, slack=0))
    want = generator.generate(PROMPT, max_new_tokens=12).tokens
    events = generator.stream(PROMPT, max_new_tokens=12)
    written = (event for event in events if not isinstance(event, Prefill))
    got = [next(written).id for _ in range(5)]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.model.layers[1], "forward", interrupted)
        next(written)
    assert got == want[:5]
    assert [generator.cache.seen(layer).item() for layer in range(2)] == [len(PROMPT) + 4] * 2
    assert generator.generate(want[4:5], max_new_tokens=1, cache=generator.cache).tokens == want[5:6]


def test_memory_is_asked_for_what_the_policy_holds():
    model = tiny_decoder()
    free = 3_000_000
    with pytest.raises(MemoryError):
        memory.reserve(model.new_cache(), [100_000], 0, free, 64)
    cache = model.new_cache(policy=policies.H2O(1024))
    memory.reserve(cache, [100_000], 0, free, 64)
    assert cache.stats()["pool_bytes"] == 2 * 2 * 17 * 64 * 16 * 2 * 4
    full = torch.tensor([[True, False], [False, False]])
    duo = policies.DuoAttention(full, sinks=4, recent=60)
    assert duo.held_after(1000, 64, 16) == 1000 // 4 + 48 + 64
    assert policies.SnapKV(0.5).held_after(1000, 200, 16) == 700
    assert policies.SnapKV(2048).held_after(1000, 200, 16) == 1000


def test_a_cache_that_is_continued_keeps_its_policy():
    model = tiny_decoder()
    generator = Generator(model, prefill_chunk=64, policy=policies.TOVA(50))
    generator.generate(PROMPT, max_new_tokens=1)
    fork = generator.cache.fork()
    Generator(model, prefill_chunk=64).generate(PROMPT, max_new_tokens=20, cache=fork)
    assert fork.seen().tolist() == [621] and int(fork.lengths(0).max()) <= 50 + 65
