"""Ways back of recurrent states: checkpoints, the trail of a step that keeps every token, and what is refused."""

from itertools import pairwise

import pytest
import torch
from model_cases import random_tokens
from state_cases import EXACT, HYBRIDS, KINDS, layer_states, same_states, tiny_states_model

import lcore
from lcore.cache.state_places import Places


def tokens_of(rows, seq, seed=1):
    return random_tokens(rows, seq, seed=seed, vocab=250)


def read(model, cache, tokens, *cuts):
    for part in tokens.split(cuts or [tokens.shape[1]], dim=1):
        logits = model(part, cache)
    return logits


def states(cache):
    return getattr(cache, "states", cache)


@pytest.mark.parametrize("kind", KINDS)
def test_crop_to_a_checkpoint_is_the_cache_that_was_there(kind):
    model = tiny_states_model(kind)
    tokens = tokens_of(1, 300)
    cache, want = (model.new_cache(checkpoint_every=64) for _ in range(2))
    read(model, cache, tokens, 64, 64, 70, 58, 44)
    read(model, want, tokens[:, :128], 64, 64)
    assert list(states(cache).checkpoints()) == [64, 128, 256]
    assert cache.crop_point(300).tolist() == [300] and cache.crop_point(299).tolist() == [256]
    assert cache.crop_point(200).tolist() == [128] and cache.crop_point(63).tolist() == [0]
    cache.crop(cache.crop_point(200))
    assert cache.seen().tolist() == [128] and same_states(cache, want)
    again = read(model, cache, tokens[:, 128:])
    assert torch.equal(again, read(model, want, tokens[:, 128:]))
    assert list(states(cache).checkpoints()) == [64, 128]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_that_keeps_every_token_can_be_taken_back_to_any(kind, batch):
    """To the bits of decoding: the step takes tokens one by one through the recurrences."""
    model = tiny_states_model(kind)
    prompt, drafts = tokens_of(batch, 70), tokens_of(batch, 6, seed=2)
    one_by_one = model.new_cache(batch)
    read(model, one_by_one, prompt)
    begin, logits, forks = one_by_one.fork(), [], []
    for token in drafts.split(1, dim=1):
        logits.append(model(token, one_by_one))
        forks.append(one_by_one.fork())
    for kept in range(7):
        cache = begin.fork()
        states(cache).every_token = True
        got = model(drafts, cache)
        states(cache).every_token = False
        assert torch.equal(got, torch.cat(logits, dim=1))
        if kept == 0:
            with pytest.raises(ValueError, match=r"StateCache.crop: n must be a place of which there are states"):
                cache.crop(70)
            assert cache.seen().tolist() == [76] * batch
            continue
        cache.crop(70 + kept)
        assert cache.seen().tolist() == [70 + kept] * batch and same_states(cache, forks[kept - 1])
        rest = model(drafts[:, :1], cache)
        assert torch.equal(rest, model(drafts[:, :1], forks[kept - 1].fork()))
        assert states(cache).crop_point(70 + kept).tolist() == [0] * batch  # the trail is that of the last step alone


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_and_go_back_each_on_its_own(kind):
    model = tiny_states_model(kind)
    cache = model.new_cache(3, checkpoint_every=64)
    first, second = tokens_of(3, 64), tokens_of(3, 5, seed=2)
    model(first, cache, lengths=torch.tensor([64, 20, 0]))
    states(cache).every_token = True
    model(second, cache, lengths=torch.tensor([2, 5, 0]))
    states(cache).every_token = False
    assert cache.seen().tolist() == [66, 25, 0]
    assert cache.crop_point(torch.tensor([65, 23, 9])).tolist() == [65, 23, 0]
    assert cache.crop_point(torch.tensor([64, 19, 0])).tolist() == [64, 0, 0]
    cache.crop(torch.tensor([64, 23, 0]))
    for row, text in enumerate([first[:1], torch.cat([first[1:2, :20], second[1:2, :3]], dim=1)]):
        alone = model.new_cache()
        read(model, alone, text, 20, *[1] * 3) if row else read(model, alone, text)
        for got, want in zip(layer_states(cache), layer_states(alone), strict=True):
            if kind in EXACT:
                assert torch.equal(got[row : row + 1], want)
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)
    assert not any(tensor[2].any() for tensor in layer_states(cache))


@pytest.mark.parametrize("kind", ["mamba2", "jamba"])
def test_some_rows_alone_keep_their_way_back_in_the_whole(kind):
    model = tiny_states_model(kind)
    cache = model.new_cache(3, checkpoint_every=64)
    model(tokens_of(3, 64), cache)
    held = [tensor.clone() for tensor in layer_states(cache)]
    whole = states(cache)
    whole.every_token = True
    rows = whole.rows(torch.tensor([2, 0]))
    part = [type(whole.layer(0))(*(torch.randn(3, *x.shape) for x in rows.layer(i))) for i in range(rows.num_layers)]
    rows.advance(part, torch.tensor([3, 1]))
    assert whole.seen().tolist() == [65, 64, 67]
    whole.crop(torch.tensor([64, 64, 66]))
    for index, (before, after) in enumerate(zip(held, layer_states(cache), strict=True)):
        assert torch.equal(after[:2], before[:2])
        assert torch.equal(after[2], part[index // 2][index % 2][1, 0])


def test_forks_keep_their_own_ways_back():
    model = tiny_states_model("mamba")
    cache = model.new_cache(checkpoint_every=32)
    tokens = tokens_of(1, 96)
    read(model, cache, tokens[:, :32])
    fork = cache.fork()
    read(model, cache, tokens[:, 32:64])
    read(model, fork, tokens[:, 64:], 20, 12)
    assert list(cache.checkpoints()) == list(fork.checkpoints()) == [32, 64]
    cache.crop(32)
    assert list(fork.checkpoints()) == [32, 64]
    fork.crop(32)
    assert same_states(cache, fork)


def test_what_is_read_again_is_little_more_than_what_was_taken_back():
    for count in (17, 40, 500, 2000, 2048):
        places = Places()
        for n in range(1, count + 1):
            places.add(n, (), 16)
        found = list(places.checkpoints)
        assert len(found) == 16 and found == sorted(found) and found[-3:] == [count - 2, count - 1, count]
        back = [count - n for n in (0, *found)]
        assert all(far <= 2.5 * (near + 1) for far, near in pairwise(back))
    few = Places()
    for n in range(1, 9):
        few.add(n, (), 1)
    assert list(few.checkpoints) == [8]


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_bytes_of_checkpoints_and_trails_are_counted(kind):
    model = tiny_states_model(kind)
    cache = model.new_cache(checkpoint_every=64)
    one = states(cache).stats()["bytes"]
    read(model, cache, tokens_of(1, 192), 64, 64, 64)
    assert states(cache).stats()["checkpoint_bytes"] == 2 * one  # the third is the present state
    assert states(cache).stats()["bytes"] == 3 * one
    states(cache).every_token = True
    read(model, cache, tokens_of(1, 5))
    states(cache).every_token = False
    stats = states(cache).stats()
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in states(cache)._places[0].tensors()}
    assert stats["checkpoint_bytes"] == sum(held.values()) >= 3 * one + 5 * stats["recurrent_bytes"]
    read(model, cache, tokens_of(1, 1))
    assert states(cache).stats()["bytes"] == 4 * one
    if kind == "jamba":
        stats = cache.stats()
        assert stats["state_bytes"] == 4 * one
        assert stats["bytes"] == stats["pool_bytes"] + stats["tail_bytes"] + stats["table_bytes"] + 4 * one


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_step_that_fails_in_the_middle_is_taken_back(kind):
    model = tiny_states_model(kind)
    cache = model.new_cache()
    read(model, cache, tokens_of(1, 90))
    held = [tensor.clone() for tensor in layer_states(cache)]
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens_of(1, 50), cache)
    handle.remove()
    assert cache.seen(0).tolist() == [140] and cache.seen(1).tolist() == [90]
    cache.crop(90)
    assert cache.seen(0).tolist() == cache.seen(1).tolist() == [90]
    assert all(torch.equal(a, b) for a, b in zip(held, layer_states(cache), strict=True))
    fresh = model.new_cache()
    want = read(model, fresh, torch.cat([tokens_of(1, 90), tokens_of(1, 50)], dim=1), 90, 50)
    assert torch.equal(model(tokens_of(1, 50), cache), want)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_crop_that_one_part_refuses_changes_neither(kind):
    model = tiny_states_model(kind)
    cache = model.new_cache(checkpoint_every=64)
    read(model, cache, tokens_of(1, 140), 64, 64, 12)
    with pytest.raises(
        ValueError, match=r"be a place of which there are states, \[64\] here: read on from there again"
    ):
        cache.crop(100)
    assert cache.seen().tolist() == states(cache).seen().tolist() == [140]
    cache.crop(64)
    assert cache.seen().tolist() == states(cache).seen().tolist() == [64]


def test_bad_arguments_are_refused():
    model = tiny_states_model("jamba")
    layers = [model.new_cache().states.layer(0)]
    with pytest.raises(ValueError, match=r"^lcore.StateCache: checkpoint_every must be an integer >= 1, got 0$"):
        lcore.StateCache(layers, checkpoint_every=0)
    with pytest.raises(ValueError, match=r"^lcore.HybridCache: checkpoint_every must be whole pages of 64 tokens, got"):
        model.new_cache(checkpoint_every=96)
    with pytest.raises(ValueError, match=r"^lcore.HybridCache: batch_size must have the rows of the states, 1, got 2$"):
        lcore.HybridCache(lcore.StateCache(layers), 2, 2, 16, batch_size=2)
    with pytest.raises(ValueError, match=r"^lcore.StateCache.begin_rows: found must have 1 entries, got 0$"):
        lcore.StateCache(layers).begin_rows([])
    with pytest.raises(
        TypeError, match=r"^lcore.HybridDecoder: cache must be a HybridCache, as new_cache\(\) makes it"
    ):
        model(torch.tensor([[1]]), lcore.StateCache(layers))
