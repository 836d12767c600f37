"""Texts that begin as texts before, with recurrent states: read from a checkpoint, with the same bits."""

import pytest
import torch
from state_cases import HYBRIDS, KINDS, PROMPT, layer_states, same_states, tiny_states_model

import lcore
from lcore.cache import snapshots
from lcore.generation import Generator, caches, states

DOCUMENT = [(7 * i * i + 3 * i + 11) % 256 for i in range(300)]


@pytest.fixture(autouse=True)
def short_checkpoints(monkeypatch):
    for module in (caches, states):
        monkeypatch.setattr(module, "CHECKPOINT_TOKENS", 64)


def logits_of(model):
    """The logits of every step from now on."""
    seen = []
    model.register_forward_hook(lambda _, inputs, out: seen.append(out))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_question_starts_at_a_checkpoint_with_the_same_bits(kind):
    model = tiny_states_model(kind)
    generator, plain = Generator(model, prefill_chunk=96), Generator(model, prefill_chunk=96, prefix_reuse=False)
    generator.generate([*DOCUMENT, 1, 2, 3], max_new_tokens=3)
    seen = logits_of(model)
    for question, kept in (([5, 4], 256), ([5, 4, 3], 256), ([250] * 70, 256)):
        del seen[:]
        got = generator.generate(DOCUMENT + question, max_new_tokens=9)
        steps, cache = seen[-9:], generator.cache
        want = plain.generate(DOCUMENT + question, max_new_tokens=9)
        assert got.stats.reused_tokens == kept
        assert got.tokens == want.tokens
        assert all(torch.equal(a, b) for a, b in zip(steps, seen[-9:], strict=True))
        assert same_states(cache, plain.cache)
    assert generator.generate(DOCUMENT[:100], max_new_tokens=1).stats.reused_tokens == 64
    assert generator.generate(DOCUMENT[1:], max_new_tokens=1).stats.reused_tokens == 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_each_begin_with_what_is_known(kind):
    model = tiny_states_model(kind)
    generator = Generator(model, prefill_chunk=64)
    generator.generate(DOCUMENT, max_new_tokens=1)
    prompts = [[*DOCUMENT[:200], 9], PROMPT[:20], [*DOCUMENT[:64], 3]]
    batch = generator.generate(prompts, max_new_tokens=6)
    assert [c.stats.reused_tokens for c in batch] == [192, 0, 64]
    alone = Generator(model, prefill_chunk=64, prefix_reuse=False)
    assert [c.tokens for c in batch] == [alone.generate(p, max_new_tokens=6).tokens for p in prompts]


@pytest.mark.parametrize("kind", ["mamba2", "jamba"])
def test_written_tokens_and_other_models_do_not_mix_in(kind):
    model, other = tiny_states_model(kind), tiny_states_model(kind)
    prefixes = lcore.PrefixCache()
    generator = Generator(model, prefill_chunk=64, prefix_reuse=prefixes)
    written = generator.generate(DOCUMENT[:60], max_new_tokens=10).tokens
    assert generator.generate(DOCUMENT[:60] + written, max_new_tokens=1).stats.reused_tokens == 0
    assert generator.generate(DOCUMENT[:60] + written, max_new_tokens=1).stats.reused_tokens == 64
    strangers = [Generator(other, prefill_chunk=64, prefix_reuse=prefixes),
                 Generator(model, prefill_chunk=32, prefix_reuse=prefixes)]  # fmt: skip
    for stranger in strangers:
        assert stranger.generate(DOCUMENT[:60] + written, max_new_tokens=1).stats.reused_tokens == 0
    prefixes.clear()
    assert prefixes.stats()["states"] == prefixes.stats()["state_bytes"] == 0
    assert generator.generate(DOCUMENT[:60] + written, max_new_tokens=1).stats.reused_tokens == 0


def test_states_are_counted_and_the_longest_unused_go_first():
    model = tiny_states_model("mamba")
    one = model.new_cache().stats()["bytes"]
    prefixes = lcore.PrefixCache(max_bytes=3 * (one + 4 * 128))
    generator = Generator(model, prefill_chunk=64, prefix_reuse=prefixes)

    def known(text):
        return generator.generate([*text[:128], 1], max_new_tokens=0).stats.reused_tokens

    texts = [[shift, *DOCUMENT[:127]] for shift in range(3)]
    assert [known(text) for text in texts[:2]] == [0, 0]  # two states each: the first of the first goes
    stats = prefixes.stats()
    assert stats["states"] == 3 and stats["state_evictions"] == 1
    assert stats["state_bytes"] == 3 * one + 4 * (128 + 64 + 128) <= prefixes.max_bytes
    assert known(texts[0]) == 128 and known(texts[1]) == 128
    assert known(texts[2]) == 0
    assert prefixes.stats()["state_bytes"] <= prefixes.max_bytes
    assert known(texts[0]) == 0 and known(texts[2]) == 128


def test_without_a_limit_so_many_states_are_kept(monkeypatch):
    monkeypatch.setattr(snapshots, "MOST", 3)
    generator = Generator(tiny_states_model("jamba"), prefill_chunk=64)
    generator.generate(DOCUMENT, max_new_tokens=1)
    stats = generator.prefixes.stats()
    assert stats["states"] == 3 and stats["state_evictions"] == 1
    assert generator.generate([*DOCUMENT[:290], 1], max_new_tokens=1).stats.reused_tokens == 256
    assert generator.generate([*DOCUMENT[:100], 1], max_new_tokens=1).stats.reused_tokens == 0


@pytest.mark.parametrize("kind", HYBRIDS)
def test_pages_that_went_take_the_states_behind_them_along(kind):
    """A row begins where all of its pages and its states are known."""
    model = tiny_states_model(kind)
    cache, prefixes = model.new_cache(checkpoint_every=64), lcore.PrefixCache()
    tokens = torch.tensor(DOCUMENT[:200])
    prefixes.start(cache, [tokens])
    for part in tokens.split([64, 64, 72]):
        model(part[None], cache)
    assert prefixes.insert(cache, 0, tokens) == 3 * 2 * 2
    cache.close()
    probe = model.new_cache(checkpoint_every=64)
    assert prefixes.start(probe, [tokens]) == [128]
    assert probe.seen().tolist() == probe.states.seen().tolist() == [128]
    assert list(probe.states.checkpoints()) == [128]
    probe.close()
    prefixes._shelf.pool.reclaim(2 * 2 * 2)  # the last two runs of pages
    probe = model.new_cache(checkpoint_every=64)
    assert prefixes.start(probe, [tokens]) == [64]


def test_of_a_limit_beside_pages_states_take_a_fourth():
    model = tiny_states_model("jamba")
    cache, prefixes = model.new_cache(checkpoint_every=64), lcore.PrefixCache(max_bytes=4 << 20)
    prefixes.start(cache, [torch.tensor(DOCUMENT)])
    assert cache.max_bytes == 3 << 20 and prefixes._snapshots.max_bytes == 1 << 20


def test_states_that_are_shared_are_not_written():
    model = tiny_states_model("mamba2")
    prefixes, tokens = lcore.PrefixCache(), torch.tensor(DOCUMENT[:129])

    def start():
        cache = model.new_cache(checkpoint_every=64)
        return cache, *prefixes.start(cache, [tokens])

    cache, known = start()
    for part in tokens[:128].split(64):
        model(part[None], cache)
    assert known == 0 and prefixes.insert(cache, 0, tokens[:128]) == 2
    held = [tensor.clone() for tensor in layer_states(cache)]
    for _ in range(2):
        cache, known = start()
        assert known == 128 and all(torch.equal(a, b) for a, b in zip(held, layer_states(cache), strict=True))
        for _ in range(3):  # steps of one token, which one kernel takes in place
            model(tokens[None, 128:], cache)


def test_bad_calls_are_refused():
    model, prefixes = tiny_states_model("mamba"), lcore.PrefixCache()
    cache = model.new_cache()
    with pytest.raises(ValueError, match=r"^lcore.PrefixCache.start: prompts must have 1 rows, got 2$"):
        prefixes.start(cache, [torch.tensor([1])] * 2)
    model(torch.tensor([[1]]), cache)
    with pytest.raises(ValueError, match=r"^lcore.PrefixCache.start: cache must hold no tokens, got lengths \[1\]$"):
        prefixes.start(cache, [torch.tensor([1])])
    with pytest.raises(ValueError, match=r"^lcore.PrefixCache.insert: tokens must lie in \[0, 2\^31\), got -1$"):
        prefixes.insert(cache, 0, torch.tensor([-1]))
