"""The bytes of lcore.PagedCache: what stats says is what torch holds; max_bytes is kept; nothing leaks."""

import re
import threading

import numpy as np
import pytest
import torch
from cache_cases import Twins, all_pages_are_free, allocator_of, assert_same_contents, pool_of, random_kv

import lcore
from lcore.cache import slots


def storages(x, found, seen):
    """Storages of all tensors that x refers to, NumPy views being those of tensors."""
    if id(x) in seen or isinstance(x, (type, str, np.ndarray)):
        return
    seen.add(id(x))
    if isinstance(x, torch.Tensor):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return
    children = list(vars(x).values()) if hasattr(x, "__dict__") else []
    if isinstance(x, dict):
        children += x.values()
    elif isinstance(x, (list, tuple)):
        children += x
    for child in children:
        storages(child, found, seen)


def held_bytes(cache):
    found = {}
    storages(cache, found, set())
    return sum(found.values())


def test_stats_are_the_bytes_that_torch_holds():
    twins = Twins(layers=3, kv_heads=2, head_dim=24, head_dim_v=8, batch_size=2, page_size=16, kv_format="bf16")
    for new in (0, 1, 15, 1, 200, 3):
        twins.append(new)
        for cache in (twins.cache, twins.cache.fork()):
            assert cache.stats()["bytes"] == held_bytes(cache)
    stats = twins.cache.stats()
    assert stats["bytes"] == stats["pool_bytes"] + stats["tail_bytes"] + stats["table_bytes"]
    assert stats["pool_bytes"] == pool_of(twins.cache).nbytes
    assert stats["pages"] == 3 * 2 * 2 * (220 // 16)
    assert stats["tokens"] == 2 * 220
    assert stats["page_bytes"] == 16 * (24 + 8) * 2 and stats["bits_per_value"] == 16
    assert stats["pages"] + stats["free_pages"] == allocator_of(twins.cache).num_pages
    twins.cache.crop(40)
    stats = twins.cache.stats()
    assert stats["pages"] == 3 * 2 * 2 * 2 and stats["tokens"] == 80
    assert stats["bytes"] == held_bytes(twins.cache)


def test_stats_of_rows_of_different_lengths():
    twins = Twins(layers=2, batch_size=3, page_size=16)
    twins.append(40, torch.tensor([40, 0, 17]))
    twins.append(5, layer=1)
    assert twins.cache.stats()["tokens"] == 45 + 5 + 22
    assert twins.cache.stats()["pages"] == 2 * (2 + 1) * 2


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", ("fp32", "fp16")])
def test_bytes_per_token_are_those_of_full_pages(kv_format):
    twins = Twins(layers=3, kv_heads=2, head_dim=24, head_dim_v=40, page_size=16, kv_format=kv_format, batch_size=2)
    twins.cache.reserve(160)
    twins.append(160)
    got = lcore.PagedCache.bytes_per_token(3, 2, 24, kv_format, head_dim_v=40, page_size=16)
    assert got * 2 * 160 == twins.cache.stats()["pool_bytes"]


def test_reserve_makes_room_once_and_exactly():
    twins = Twins(layers=2, batch_size=2, page_size=16)
    twins.append(20)
    twins.cache.reserve(163)
    pool, table = pool_of(twins.cache), twins.cache._slots.table
    assert pool.shape[0] == 2 * 2 * 2 * 10 and table.shape[-1] == 10
    for new in (13, 1, 100, 29):
        twins.append(new)
        twins.check(new, layer=1)
        assert pool_of(twins.cache) is pool and twins.cache._slots.table is table
    twins.cache.reserve(163)
    twins.cache.reserve(5)
    assert pool_of(twins.cache) is pool
    twins.append(20)
    assert pool_of(twins.cache) is not pool
    twins.check(20)
    pages = pool_of(twins.cache).shape[0] // 8
    twins.cache.reserve(16 * pages + 16)
    assert pool_of(twins.cache).shape[0] == 8 * (pages + 1) and twins.cache._slots.table.shape[-1] == pages + 1


def test_reserve_counts_free_pages():
    twins = Twins(page_size=16)
    twins.append(160)
    pages = allocator_of(twins.cache).num_pages
    twins.crop(0)
    twins.cache.reserve(160)
    assert allocator_of(twins.cache).num_pages == pages
    other = twins.fork()
    other.cache.reserve(160)
    assert allocator_of(twins.cache).num_pages == pages, "nobody has taken the pages yet"


def test_the_pool_grows_by_half():
    cache = lcore.PagedCache(1, 1, 8, dtype=torch.float32, kv_format="fp32", page_size=16)
    sizes = []
    for _ in range(1000):
        cache.append(0, *random_kv(1, 16, 1, 8))
        if not sizes or sizes[-1] != pool_of(cache).shape[0]:
            sizes.append(pool_of(cache).shape[0])
    assert len(sizes) < 20 and sizes[-1] < 1500


def limits(error):
    """What a MemoryError says: max_bytes, free, needed, and the max_bytes that would fit."""
    pattern = r"max_bytes=([\d,]+) leaves ([\d,]+) bytes free, ([\d,]+) are needed .*; max_bytes=([\d,]+) would fit"
    return [int(number.replace(",", "")) for number in re.search(pattern, str(error.value)).groups()]


def test_max_bytes_stops_before_anything_changes():
    most = 40_000
    twins = Twins(kv_heads=2, batch_size=2, page_size=16, max_bytes=most)
    twins.append(30)
    before = twins.cache.fork()
    k, v = random_kv(2, 500, 2, 16)
    with pytest.raises(MemoryError, match=r"^lcore\.PagedCache\.append: max_bytes=40,000 leaves") as error:
        twins.cache.append(0, k, v)
    told, free, needed, fitting = limits(error)
    assert told == most and needed > free and fitting > most
    assert_same_contents(twins.cache, before)
    before.close()
    held = held_bytes(twins.cache)
    assert held <= most
    with pytest.raises(MemoryError, match=r"^lcore\.PagedCache\.reserve: max_bytes"):
        twins.cache.reserve(10_000)
    assert held_bytes(twins.cache) == held
    # As much as fits goes in, token by token, and it stays usable at the border.
    stopped = False
    for _ in range(200):
        try:
            twins.cache.append(0, k[:, :7], v[:, :7])
        except MemoryError:
            stopped = True
            break
        twins.model.append(0, k[:, :7], v[:, :7])
        assert held_bytes(twins.cache) <= most
    assert stopped
    twins.check_lengths()
    twins.check(9, 2)
    assert twins.cache.stats()["free_pages"] < 4
    twins.crop(10)
    twins.append(30)
    twins.check(30, 2)


@pytest.mark.parametrize("most", range(3000, 9000, 499))
def test_growth_stops_at_max_bytes_and_not_before(most):
    cache = lcore.PagedCache(1, 1, 1, dtype=torch.float32, kv_format="fp32", page_size=1, max_bytes=most)
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(MemoryError):
        for _ in range(100):
            cache.append(0, one, one)
            assert held_bytes(cache) <= most
    assert most - held_bytes(cache) < 2 * 64 + 4, "room for one more page and its table entry"


def test_the_max_bytes_that_would_fit_fits():
    def fill(most):
        cache = lcore.PagedCache(1, 2, 16, dtype=torch.float32, kv_format="fp32", page_size=16, max_bytes=most)
        cache.append(0, *random_kv(1, 100, 2, 16))
        return cache

    with pytest.raises(MemoryError) as error:
        fill(10_000)
    fitting = limits(error)[3]
    assert held_bytes(fill(fitting)) == fitting
    with pytest.raises(MemoryError):
        fill(fitting - 1)


def test_max_bytes_holds_for_the_whole_family():
    twins = Twins(page_size=16, max_bytes=30_000)
    twins.append(33)
    forks = []
    with pytest.raises(MemoryError, match=r"^lcore\.PagedCache\.fork: max_bytes"):
        while len(forks) < 100:
            forks.append(twins.cache.fork())
    own = twins.cache.stats()["tail_bytes"] + twins.cache.stats()["table_bytes"]
    assert twins.cache.stats()["pool_bytes"] + own * (1 + len(forks)) <= 30_000
    forks.pop()
    twins.cache.fork()
    with pytest.raises(MemoryError, match=r"^lcore\.PagedCache: max_bytes=100 leaves 100 bytes free"):
        lcore.PagedCache(1, 2, 16, max_bytes=100)


def test_what_the_system_refuses_changes_nothing(monkeypatch):
    twins = Twins(page_size=16)
    twins.append(33)
    empty = torch.empty

    def refuse(shape, **options):
        if torch.Size(shape).numel() > 100_000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(
        MemoryError, match=r"^lcore\.PagedCache\.append: [\d,]+ bytes are needed and [\d,]+ are free; use"
    ):
        twins.cache.append(0, *random_kv(1, 5000, 2, 16))
    with pytest.raises(MemoryError, match=r"^lcore\.PagedCache\.reserve: "):
        twins.cache.reserve(5000)
    twins.check_lengths()
    twins.append(30)
    twins.check(30)


@pytest.mark.parametrize("kernel_has_run", [False, True])
def test_an_interrupted_append_loses_no_page(kernel_has_run, monkeypatch):
    twins = Twins(page_size=16)
    twins.append(33)
    kernel = slots.append_

    def interrupted(*arguments):
        if kernel_has_run:
            kernel(*arguments)
        raise KeyboardInterrupt

    k, v = random_kv(1, 50, 2, 16)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slots, "append_", interrupted)
        twins.cache.append(0, k, v)
    if kernel_has_run:
        twins.model.append(0, k, v)
    twins.check_lengths()
    stats = twins.cache.stats()
    assert stats["pages"] + stats["free_pages"] == allocator_of(twins.cache).num_pages
    twins.append(20)
    twins.check(20)


def test_pages_come_back():
    twins = Twins(layers=2, batch_size=2, page_size=16)
    allocator = allocator_of(twins.cache)
    twins.append(100)
    fork = twins.cache.fork()
    twins.cache.close()
    twins.cache.close()
    assert not all_pages_are_free(allocator)
    assert int(fork.seen()[0]) == 100
    del fork
    assert all_pages_are_free(allocator)


def test_a_refused_cache_leaves_nothing_behind():
    for _ in range(2):
        with pytest.raises(ValueError, match="head_dim"):
            lcore.PagedCache(1, 1, 0)


def test_forks_in_threads(threads):
    torch.set_num_threads(1)
    root = Twins(page_size=16)
    root.append(50)
    allocator = allocator_of(root.cache)
    failures = []

    def work(cache, seed):
        try:
            generator = torch.Generator().manual_seed(seed)
            k, v = torch.randn(2, 1, 200, 2, 16, generator=generator).unbind()
            q = torch.randn(1, 200, 2, 16, generator=generator)
            want = None
            for _ in range(5):
                cache.crop(50)
                out = []
                for start in range(0, 200, 25):
                    cache.append(0, k[:, start : start + 25], v[:, start : start + 25])
                    out.append(cache.attend(0, q[:, start : start + 25]))
                got = torch.cat(out, dim=1)
                want = got if want is None else want
                if not torch.equal(got, want):
                    failures.append("bits differ")
                cache.fork().close()
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(root.cache.fork(), seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    del workers, worker
    root.check(5)
    del root
    assert all_pages_are_free(allocator)
