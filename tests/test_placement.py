"""PagedCache(overflow=...): the same bits as a cache in memory, in a fraction of its bytes."""

import sys
import threading

import pytest
import torch
from cache_cases import pool_of
from placement_cases import Pair, mapped_bytes, resident_bytes

import lcore
from lcore import selection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="overflow needs Linux")
HOT = 96 << 10
SIZES = [pytest.param(name, size, id=f"{name}-{size}") for name in ("bf16", "int4") for size in (16, 64)]


@pytest.mark.parametrize(("kv_format", "page_size"), SIZES)
def test_the_same_bits_for_every_call(kv_format, page_size, tmp_path, one_thread):
    pair = Pair(batch_size=2, kv_format=kv_format, page_size=page_size, hot=HOT, forks=1)
    for new in (900, 1, 63, 500, 1, 1):
        pair.step(new)
    pair.step(100, torch.tensor([100, 37]))
    fork = pair.fork()
    whole = 2 * page_size
    for cache in fork.both:
        cache.crop(10 * whole if kv_format == "int4" else 10 * whole + 5)
    fork.step(300, window_size=(150, 0))
    pair.step(1, sinks=torch.randn(4))
    fork.step(2, alibi_slopes=torch.rand(2, 4))
    pair.check_contents()
    fork.check_contents()
    keep = torch.ones(2, 2, int(pair.plain.lengths(1).max()), dtype=torch.bool)
    keep[:, :, whole : 4 * whole] = False
    keep[0, 1, 5 * whole : 6 * whole] = False
    for cache in pair.both:
        cache.evict(1, keep)
        cache.trim()
    pair.step(70)
    fork.check(1, 1)
    pair.check_contents()
    pair.placed.save(tmp_path / "session")
    pair.plain.save(tmp_path / "plain")
    # Rows of the table that hold nothing keep what was in them: only that may differ.
    assert (tmp_path / "session").stat().st_size == (tmp_path / "plain").stat().st_size
    pair.placed.close()
    pair.placed = lcore.PagedCache.load(tmp_path / "session", max_bytes=pair.most, overflow=True)
    pair.check_bytes()
    pair.check_contents()
    pair.step(1)


@pytest.mark.parametrize("hot", [1, 8, 40, 10_000])
def test_any_share_of_pages_in_memory(hot, one_thread):
    """From less than a page of each head, where a call needs more than max_bytes, to all of them."""
    pair = Pair(layers=1, kv_heads=3, batch_size=2, page_size=16, hot=hot * 4096)
    for new in (400, 1, 17):
        pair.step(new)
    rows = torch.tensor([1, 40])
    pair.step(40, rows)
    assert len({pair.placed.stats()["pages"], pair.plain.stats()["pages"]}) == 1


def test_a_policy_drops_the_same_tokens(one_thread):
    policy = lcore.policies.H2O(budget=200)
    pair = Pair(page_size=16, hot=HOT, policy=policy)
    pair.most += 64 << 10  # scores
    pair.placed._slots.pool.max_bytes += 64 << 10
    for new in (700, 300, 1, 1, 40):
        pair.step(new)
    pair.check_contents()
    bounds, want = (cache.page_bounds(0, dtype=torch.float32) for cache in pair.both)
    assert torch.equal(bounds, want)


def test_values_that_a_policy_merges(one_thread):
    pair = Pair(page_size=16, hot=HOT, policy=lcore.policies.CaM(budget=200))
    pair.most += 64 << 10
    pair.placed._slots.pool.max_bytes += 64 << 10
    for new in (700, 300, 30):
        pair.step(new)
    pair.check_contents()


def test_what_stats_say_is_what_the_system_holds(one_thread):
    pair = Pair(layers=3, page_size=64, hot=1 << 20)
    file_before = pair.placed.stats()["file_bytes"]
    for new in (3000, 1, 70, 2000):
        pair.step(new)
        stats, memory = pair.placed.stats(), pool_of(pair.placed)
        assert stats["pool_bytes"] == pytest.approx(resident_bytes(memory), rel=0.03)
        assert stats["pool_bytes"] == pytest.approx(mapped_bytes(memory), rel=0.05)
        assert 0.9 * (1 << 20) <= stats["pool_bytes"] <= 1 << 20
        assert stats["bytes"] == sum(stats[name + "_bytes"] for name in ("pool", "tail", "table", "score"))
        assert stats["file_bytes"] - file_before == pytest.approx(stats["pages"] * stats["page_bytes"], rel=0.01)
    assert pair.plain.stats()["file_bytes"] == 0
    pair.placed.crop(1000)
    before = pair.placed.stats()
    pair.placed.trim(spare_pages=10)
    after = pair.placed.stats()
    assert after["file_bytes"] - file_before == pytest.approx((after["pages"] + 10) * after["page_bytes"], rel=0.01)
    assert after["pages"] == before["pages"] and after["free_pages"] == before["free_pages"]
    assert after["pool_bytes"] == pytest.approx(resident_bytes(pool_of(pair.placed)), rel=0.03)


def test_forks_in_threads_share_the_file(one_thread):
    pair = Pair(page_size=16, hot=HOT, forks=3)
    pair.step(1500)
    forks = [pair.fork() for _ in range(3)]
    failed = []

    def work(fork, seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for new in (1, 30, 1, 200):
                for layer in range(2):
                    k, v = (torch.randn(1, new, 2, 64, generator=generator).bfloat16() for _ in range(2))
                    q = torch.randn(1, new, 4, 64, generator=generator).bfloat16()
                    for cache in fork.both:
                        cache.append(layer, k, v)
                    assert torch.equal(*(cache.attend(layer, q) for cache in fork.both))
            fork.placed.crop(1600)
            fork.placed.trim()
            fork.plain.crop(1600)
            assert torch.equal(*(cache.attend(1, q[:, :1]) for cache in fork.both))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(fork, i)) for i, fork in enumerate(forks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for fork in forks:
        fork.check_contents()
    pair.check_bytes()


def test_prefixes_in_a_file(one_thread):
    prefixes = lcore.PrefixCache(max_bytes=3 << 20, overflow=True)
    tokens = torch.arange(2000)
    found = []
    for known in (0, 1984):
        cache = lcore.PagedCache(2, 2, 64, page_size=64)
        assert prefixes.start(cache, [tokens]) == [known]
        generator = torch.Generator().manual_seed(0)
        k, v = (torch.randn(1, 2000, 2, 64, generator=generator).bfloat16() for _ in range(2))
        q = torch.randn(1, 1, 4, 64, generator=generator).bfloat16()
        for layer in range(2):
            cache.append(layer, k[:, known:], v[:, known:])
            found.append(cache.attend(layer, q))
        prefixes.insert(cache, 0, tokens)
        assert cache.stats()["file_bytes"] > 0 and cache.stats()["bytes"] <= 3 << 20
        cache.close()
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert prefixes.stats()["pool_bytes"] <= 3 << 20


@pytest.mark.parametrize("options", [{}, {"kv_format": "int4", "skip_layers": [0], "fp_prefix": 20}])
def test_a_selection_fetches_what_it_reads(options, one_thread):
    select = selection.Quest(6, dense_layers=0)
    pair = Pair(hot=200_000, page_size=16, select=select, **options)
    for new in (300, 1, 700, 1, 1):
        pair.step(new)
    for layer in range(2):
        for _ in range(3):
            pair.check(layer, 1)
        assert (pair.placed.dropped_mass(layer) > 0).any()
        assert torch.equal(pair.placed.dropped_mass(layer), pair.plain.dropped_mass(layer))
