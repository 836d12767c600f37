"""lcore.policies: what each of them keeps is what its paper's formula keeps."""

import math

import hypothesis.strategies as st
import pytest
import torch
from cache_cases import Twins, all_pages_are_free, allocator_of, assert_same_contents
from hypothesis import HealthCheck, given, settings
from policy_cases import CASES, Pair, held_by, positions
from test_cache_memory import held_bytes

import lcore
from lcore import policies

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CASES)
def test_one_prompt(name):
    pair = Pair(name, 40, tokens=150)
    pair.feed(150)
    pair.check()
    assert pair.cache.stats()["bytes"] == held_bytes(pair.cache)


@pytest.mark.parametrize("name", CASES)
def test_chunks_then_decoding(name):
    pair = Pair(name, 40)
    for new in (70, 50, 3, 64, *([1] * 45)):
        pair.feed(new)
    pair.check()


@pytest.mark.parametrize("name", CASES)
def test_padded_rows(name):
    pair = Pair(name, 40, batch=3)
    pair.feed(60, [60, 25, 41])
    pair.check()
    pair.feed(50, [10, 0, 50])
    pair.check()
    for step in range(40):
        pair.feed(1, [1, 1, step % 2])
    pair.check()


@pytest.mark.parametrize("name", [name for name in CASES if name != "cam"])
def test_whole_pages(name):
    pair = Pair(name, 50, batch=2, unit=16)
    for new in (90, 37, 64, *([1] * 40)):
        pair.feed(new)
    pair.check()
    assert all(pair.cache.lengths(layer)[0, 2] <= 50 + 16 for layer in range(2)) or name in ("adakv", "pyramidkv")


@pytest.mark.parametrize("name", [name for name in CASES if name != "duo"])
def test_a_fraction_of_the_text(name):
    pair = Pair(name, 0.4, slack=3)
    for new in (120, 80, *([1] * 20)):
        pair.feed(new)
    pair.check()


@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_page_sizes(page_size):
    pair = Pair("adakv", 45, page_size=page_size, slack=2)
    for new in (70, 50, 1, 1, 1, 1):
        pair.feed(new)
    pair.check()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(list(CASES)),
    steps=st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 17, 60]), min_size=2, max_size=2), max_size=8),
    page_size=st.sampled_from([3, 16]),
    slack=st.sampled_from([0, 1, None]),
    seed=st.integers(0, 2**31),
)
def test_any_steps(name, steps, page_size, slack, seed):
    torch.manual_seed(seed)
    pair = Pair(name, 40, batch=2, tokens=500, page_size=page_size, slack=slack)
    for lengths in steps:
        pair.feed(max(lengths), lengths)
        pair.check()
    pair.cache.trim()
    pair.check()
    assert pair.cache.stats()["bytes"] == held_bytes(pair.cache)


@pytest.mark.parametrize("name", CASES)
def test_an_endless_budget_is_no_policy_bit_for_bit(name):
    every_head = torch.ones(2, 3, dtype=torch.bool)
    policy = policies.DuoAttention(every_head) if name == "duo" else CASES[name][0](math.inf)
    caches = [
        lcore.PagedCache(2, 3, 16, batch_size=2, dtype=torch.bfloat16, page_size=16, policy=p) for p in (policy, None)
    ]
    for new in (100, 33, 1):
        q = torch.randn(2, new, 6, 16).bfloat16()
        k, v = torch.randn(2, 2, new, 3, 16).bfloat16().unbind()
        outs = []
        for cache in caches:
            for layer in range(2):
                cache.append(layer, k, v)
                outs.append(cache.attend(layer, q))
        assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
    assert_same_contents(*caches, layer=1)


@pytest.mark.parametrize("name", ["h2o", "adakv", "cam"])
def test_fork_then_evict_in_one(name):
    pair = Pair(name, 40)
    pair.feed(60)
    pair.feed(1)
    k_before = [held_by(pair.cache, 1, 0, h) for h in range(3)]
    scores = {key: x.clone() for key, x in pair.cache._slots.scores.layers[1].items()}
    fork = pair.cache.fork()
    pair.feed(70)
    pair.check()
    for h in range(3):
        for got, want in zip(held_by(fork, 1, 0, h), k_before[h], strict=True):
            assert torch.equal(got, want)
    assert all(torch.equal(fork._slots.scores.layers[1][key], x) for key, x in scores.items())
    assert fork.stats()["bytes"] == held_bytes(fork)
    allocator = allocator_of(fork)
    # The fork goes the same way when it is fed the same.
    q, k, v = pair.q[:, :, 61:131], pair.k[:, :, 61:131], pair.v[:, :, 61:131]
    for layer in range(2):
        fork.append(layer, k[layer], v[layer])
        fork.attend(layer, q[layer])
        assert_same_contents(fork, pair.cache, layer)
    fork.close()
    pair.cache.close()
    assert all_pages_are_free(allocator)


def test_attention_after_eviction_is_over_what_is_left_with_its_positions():
    pair = Pair("h2o", 40, tokens=130)
    pair.feed(100)
    held = [positions(held_by(pair.cache, 0, 0, h)[0], pair.k[0, 0, :, h]) for h in range(3)]
    pair.cache.append(0, pair.k[0, :, 100:], pair.v[0, :, 100:])
    out = pair.cache.attend(0, pair.q[0, :, 100:])
    for h in range(3):
        kept = [*held[h], *range(100, 130)]
        visible = torch.tensor(kept) <= torch.arange(100, 130)[:, None]
        logits = torch.einsum("qgd,td->gqt", pair.q[0, 0, 100:, 2 * h : 2 * h + 2], pair.k[0, 0, kept, h]).double() / 4
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        want = torch.einsum("gqt,td->qgd", weights, pair.v[0, 0, kept, h].double())
        torch.testing.assert_close(out[0, :, 2 * h : 2 * h + 2].double(), want, rtol=1e-5, atol=1e-5)


def test_bytes_fall_within_three_percent():
    def read(policy):
        cache = lcore.PagedCache(2, 4, 64, page_size=16, policy=policy)
        for _ in range(8):
            q = torch.randn(1, 256, 8, 64).bfloat16()
            for layer in range(2):
                cache.append(layer, *torch.randn(2, 1, 256, 4, 64).bfloat16().unbind())
                cache.attend(layer, q)
        cache.trim()
        assert cache.stats()["bytes"] == held_bytes(cache)
        return cache

    whole = read(None).stats()["bytes"]
    for policy in (policies.H2O(256), policies.AdaKV(policies.SnapKV(0.2)), policies.PyramidKV(300)):
        cache = read(policy)
        evicted = sum(4 * 2048 - int(cache.lengths(layer).sum()) for layer in range(2))
        assert whole - cache.stats()["bytes"] == pytest.approx(evicted * 2 * 64 * 2, rel=0.03)


def test_no_room_for_copies_leaves_the_cache_usable():
    pair = Pair("h2o", 40)
    pair.feed(60)
    fork = pair.cache.fork()
    pool = pair.cache._slots.pool
    q, k, v = pair.q[0, :, 60:90], pair.k[0, :, 60:90], pair.v[0, :, 60:90]
    fork.append(0, k, v)
    while pool.allocator.free_count:
        pool.allocator.allocate(1)
    pool.max_bytes = pool.member_bytes + pool.data.nbytes + 3 * 90 * 4
    scores = fork._slots.scores.layers[0]["mass"].clone()
    with pytest.raises(MemoryError, match=r"^lcore\.PagedCache\.attend: max_bytes=.* are needed"):
        fork.attend(0, q)
    assert fork.lengths(0).tolist() == [[70] * 3] and torch.equal(fork._slots.scores.layers[0]["mass"], scores)
    pair.cache.close()
    fork.attend(0, q)
    assert fork.lengths(0).tolist() == [[40] * 3]
    pair.oracles[0][0].step(30)
    assert positions(held_by(fork, 0, 0, 1)[0], pair.k[0, 0, :, 1]) == pair.oracles[0][0].held[1]


def test_layers_with_a_window_keep_all():
    cache = lcore.PagedCache(1, 2, 16, dtype=torch.float32, kv_format="fp32", policy=policies.H2O(20))
    k, v = torch.randn(2, 1, 50, 2, 16).unbind()
    cache.append(0, k, v)
    cache.attend(0, torch.randn(1, 50, 2, 16), window_size=(8, 0))
    cache.attend(0, torch.randn(1, 50, 2, 16), alibi_slopes=torch.ones(2))
    assert cache.lengths(0).tolist() == [[50, 50]]


def test_rows_without_tokens_and_empty_calls():
    pair = Pair("snapkv", 40, batch=2)
    pair.feed(0)
    pair.feed(50, [0, 50])
    pair.feed(3, [3, 0])
    pair.feed(1, [1, 1])
    pair.check()
    twins = Twins()
    assert twins.cache.stats()["score_bytes"] == 0
