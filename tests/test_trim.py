"""PagedCache.trim: the bytes that nobody needs go back to the system; and evictions that are interrupted."""

import threading

import pytest
import torch
from cache_cases import Twins, all_pages_are_free, allocator_of, contents, inside, pool_of, random_kv
from test_cache_memory import held_bytes

from lcore.cache import eviction, pool


def test_bytes_fall_by_what_was_evicted():
    twins = Twins(layers=2, kv_heads=2, head_dim=64, batch_size=2, page_size=16)
    twins.cache.reserve(1000)
    twins.append(1000)
    before = twins.cache.stats()
    for layer in range(2):
        twins.evict(0.75, layer)
    assert twins.cache.stats()["bytes"] == before["bytes"]
    twins.cache.trim()
    after = twins.cache.stats()
    assert after["bytes"] == held_bytes(twins.cache)
    evicted = sum(2 * 2 * 1000 - int(twins.cache.lengths(layer).sum()) for layer in range(2))
    assert before["bytes"] - after["bytes"] == pytest.approx(evicted * 2 * 64 * 4, rel=0.03)
    assert after["free_pages"] == 0 and after["pool_bytes"] == after["pages"] * after["page_bytes"]
    for layer in range(2):
        twins.append(3, layer=layer)
        twins.check(3, 2, layer=layer)


def test_every_member_of_the_family_is_renumbered():
    root = Twins(layers=2, page_size=16, batch_size=2)
    root.append(100)
    family = [root, root.fork()]
    family[1].append(70)
    family.append(family[1].fork())
    family[2].evict(0.5)
    family[0].crop(40)
    gone = family[1].fork()
    gone.append(200)
    gone.cache.close()
    before = [[x.clone() for layer in range(2) for x in contents(t.cache, layer)] for t in family]
    references = sum(allocator_of(root.cache).refcount(i) for i in range(allocator_of(root.cache).num_pages))
    family[1].cache.trim()
    allocator = allocator_of(root.cache)
    assert allocator.free_count == 0 and allocator.num_pages == pool_of(root.cache).shape[0]
    assert sum(allocator.refcount(i) for i in range(allocator.num_pages)) == references
    for twins, want in zip(family, before, strict=True):
        got = [x for layer in range(2) for x in contents(twins.cache, layer)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        twins.append(20)
        twins.check(20, 2, layer=1)
    del family, twins, root, gone
    assert all_pages_are_free(allocator)


def test_trim_of_nothing_and_of_everything():
    twins = Twins(page_size=16)
    twins.cache.trim()
    assert twins.cache.stats()["pool_bytes"] == 0
    twins.append(100)
    twins.cache.trim()
    data = pool_of(twins.cache)
    twins.cache.trim()
    assert pool_of(twins.cache) is data
    twins.crop(0)
    twins.cache.trim()
    assert twins.cache.stats()["pool_bytes"] == 0 and inside(twins.cache)[0].shape[-1] == 0
    twins.append(40)
    twins.check(40)
    twins.cache.close()
    with pytest.raises(ValueError, match=r"^lcore\.PagedCache\.trim: the cache must be open"):
        twins.cache.trim()


def test_max_bytes_counts_what_trim_gives_back():
    twins = Twins(page_size=16, max_bytes=60_000)
    twins.append(150)
    with pytest.raises(MemoryError):
        twins.cache.append(0, *random_kv(1, 100, 2, 16))
    twins.evict(0.9)
    twins.cache.trim()
    assert twins.cache._slots.pool.free_bytes == 60_000 - held_bytes(twins.cache)
    twins.append(100)
    twins.check(100)


def test_no_room_for_the_smaller_tensor_changes_nothing(monkeypatch):
    twins = Twins(page_size=16)
    twins.append(400)
    twins.crop(300)
    free = twins.cache.stats()["free_pages"]

    def refuse(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="no room"):
        patch.setattr(pool, "new_tensor", refuse)
        twins.cache.trim()
    assert twins.cache.stats()["free_pages"] == free
    twins.check(20)


@pytest.mark.parametrize("kernel_has_run", [False, True])
def test_an_interrupted_eviction_loses_no_page(kernel_has_run, monkeypatch):
    root = Twins(page_size=16)
    root.append(100)
    twins = root.fork()
    kernel = eviction.compact_

    def interrupted(*arguments):
        if kernel_has_run:
            kernel(*arguments)
        raise KeyboardInterrupt

    keep = torch.rand(1, 2, 100) > 0.5
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eviction, "compact_", interrupted)
        twins.cache.evict(0, keep)
    if kernel_has_run:
        twins.model.evict(0, keep)
    twins.check_lengths()
    twins.append(20)
    twins.check(20)
    root.check(20)
    allocator = allocator_of(root.cache)
    root.cache.close()
    twins.cache.close()
    assert all_pages_are_free(allocator)


def test_spare_pages_stay():
    twins = Twins(page_size=16, batch_size=2)
    twins.append(160)
    twins.crop(100)
    pages = twins.cache.stats()["pages"]
    twins.cache.trim(5)
    assert twins.cache.stats()["free_pages"] == 5 and pool_of(twins.cache).shape[0] == pages + 5
    twins.cache.trim(50)
    assert twins.cache.stats()["free_pages"] == 5
    data = pool_of(twins.cache)
    twins.append(12)
    assert pool_of(twins.cache) is data and twins.cache.stats()["free_pages"] == 1
    twins.check(12)
    with pytest.raises(ValueError, match=r"spare_pages must be an integer >= 0, got -1"):
        twins.cache.trim(-1)


def test_trim_while_forks_read(threads):
    torch.set_num_threads(1)
    root = Twins(page_size=16)
    root.append(400)
    root.crop(300)
    q = torch.randn(1, 20, 2, 16)
    want = root.cache.attend(0, q)
    forks, failures, done = [root.cache.fork() for _ in range(2)], [], threading.Event()

    def read(cache):
        while not done.is_set():
            if not torch.equal(cache.attend(0, q), want):
                failures.append("bits differ")

    readers = [threading.Thread(target=read, args=(fork,)) for fork in forks]
    for reader in readers:
        reader.start()
    keep = torch.rand(1, 2, 300) > 0.5
    for _ in range(40):
        other = root.cache.fork()
        other.append(0, *random_kv(1, 200, 2, 16))
        root.cache.trim()
        other.crop(300)
        other.evict(0, keep)
        root.cache.trim()
        other.close()
        root.cache.trim()
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
    root.check(20)
