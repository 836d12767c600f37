"""lcore.PrefixCache and memory: what is given up first, that it costs no room and fails no call, that nothing leaks."""

import gc
import weakref

import pytest
import torch
from cache_cases import all_pages_are_free, allocator_of, pool_of
from prefix_cases import LAYERS, PAGES_A_RUN, assert_holds, new_cache, read, states, text
from scripted_model import PagedHistoryModel

import lcore
from lcore.generation import Generator, caches


def test_the_index_never_makes_the_pool_grow():
    prefixes = lcore.PrefixCache()
    sizes = []
    for seed in range(5):
        cache, _ = read(prefixes, text(seed, 160))
        sizes.append(allocator_of(cache).num_pages)
        cache.close()
    assert set(sizes) == {sizes[0]}
    assert 0 < prefixes.stats()["pages"] <= sizes[0]


def test_under_max_bytes_the_pool_grows_before_anything_is_given_up():
    prefixes = lcore.PrefixCache(max_bytes=budget(480) + 100)
    for seed in range(3):
        read(prefixes, text(seed, 160))[0].close()
    assert [prefixes.start(new_cache(), [text(seed, 161)]) for seed in range(3)] == [[160]] * 3
    assert prefixes.stats()["evictions"] == 0 and prefixes.stats()["pages"] == 30 * PAGES_A_RUN
    read(prefixes, text(3, 160))[0].close()
    assert prefixes.stats()["evictions"] == 10 and prefixes.stats()["pool_bytes"] <= prefixes.max_bytes


def test_the_longest_unused_text_is_given_up_first_and_its_end_before_its_beginning():
    prefixes = lcore.PrefixCache()
    read(prefixes, text(9, 1))[0].reserve(480)  # room for three of the texts
    for seed in (0, 1, 2):
        read(prefixes, text(seed, 160))[0].close()
    assert [prefixes.start(new_cache(), [text(0, 161)])] == [[160]]
    read(prefixes, text(3, 64))[0].close()
    known = [prefixes.start(new_cache(), [text(seed, 161)])[0] for seed in (0, 1, 2, 3)]
    assert known == [160, 96, 160, 64], "the last 4 pages of the text that was not used since"
    assert prefixes.stats()["evictions"] == 4


def test_pages_in_use_are_not_given_up_for_nothing_and_stay_valid():
    prefixes, tokens = lcore.PrefixCache(), text(0, 160)
    cache, _ = read(prefixes, tokens)
    other, _ = read(prefixes, text(1, 160))
    assert prefixes.stats()["evictions"] == 0, "both are in use: the pool grew"
    held = pool_of(cache)[cache._slots.table.flatten().long()].clone()
    prefixes.clear()
    third, known = read(prefixes, tokens)
    assert known == 0
    assert torch.equal(pool_of(cache)[cache._slots.table.flatten().long()], held)
    for each, whole in ((cache, tokens), (other, text(1, 160)), (third, tokens)):
        assert_holds(each, whole)


def budget(tokens: int) -> int:
    """Of one cache with this many tokens, as `limits` in a MemoryError says it."""
    prefixes = lcore.PrefixCache(max_bytes=10**6)
    cache = new_cache()
    prefixes.start(cache, [text(0, 1)])
    cache.reserve(tokens)
    return cache.stats()["bytes"]


@pytest.mark.parametrize("by_append", [False, True])
def test_under_max_bytes_the_index_makes_room(by_append):
    most = budget(160) + 200
    prefixes = lcore.PrefixCache(max_bytes=most)
    for seed in range(4):
        cache = new_cache()
        assert prefixes.start(cache, [text(seed, 160)]) == [0]
        if not by_append:
            cache.reserve(160)
        for layer in range(LAYERS):
            cache.append(layer, states(text(seed, 160)), -states(text(seed, 160)))
        assert cache.stats()["bytes"] <= most == cache.max_bytes
        assert prefixes.insert(cache, 0, text(seed, 160)) == 10 * PAGES_A_RUN
        assert_holds(cache, text(seed, 160))
        cache.close()
    assert prefixes.stats()["evictions"] == 30
    cache = new_cache()
    assert prefixes.start(cache, [text(3, 160)]) == [144]
    with pytest.raises(MemoryError, match=rf"^lcore\.PagedCache\.reserve: max_bytes={most:,} leaves"):
        cache.reserve(320)
    assert cache.seen().tolist() == [144]


def test_tables_and_tails_that_do_not_fit_change_nothing():
    prefixes = lcore.PrefixCache(max_bytes=1000)
    cache = new_cache()
    with pytest.raises(MemoryError, match=r"^lcore\.PrefixCache\.start: max_bytes=1,000 leaves 1,000 bytes free"):
        prefixes.start(cache, [text(0, 100)])
    cache.append(0, states(text(0, 20)), states(text(0, 20)))
    assert cache.max_bytes is None and cache.lengths(0).tolist() == [[20, 20]]


def test_renew_gives_the_pool_back_to_the_system():
    prefixes = lcore.PrefixCache()
    assert not prefixes.renew()
    old, _ = read(prefixes, text(0, 100))
    pool = weakref.ref(old._slots.pool)
    assert prefixes.renew() and prefixes.stats()["pool_bytes"] == 0
    new, known = read(prefixes, text(0, 100))
    assert known == 0 and pool_of(new) is not pool_of(old)
    assert prefixes.insert(old, 0, text(0, 100)) == 0, "a cache of the old pool"
    assert_holds(old, text(0, 100))
    gc.disable()
    try:
        del old
        assert pool() is None, "no cycle that waits for the garbage collector"
    finally:
        gc.enable()


def test_renew_keeps_to_max_bytes():
    prefixes = lcore.PrefixCache(max_bytes=10**6)
    cache, _ = read(prefixes, text(0, 100))
    assert not prefixes.renew() and prefixes.stats()["runs"] == 6
    cache.close()
    assert prefixes.renew()


def test_a_prefix_cache_that_is_dropped_lets_go_of_its_pages():
    prefixes = lcore.PrefixCache()
    cache, _ = read(prefixes, text(0, 100))
    allocator = allocator_of(cache)
    del prefixes
    cache.crop(0)
    assert all_pages_are_free(allocator)


PROMPTS = [[(7 * i * i + 3 * i + seed) % 64 for i in range(200)] for seed in range(3)]


def test_a_generator_reads_many_texts_in_the_room_of_two():
    """One that is being read, and one that `generator.cache` still holds: as without an index."""
    reader = Generator(PagedHistoryModel())
    sizes = []
    for seed in range(6):
        reader.generate(PROMPTS[seed % 3], max_new_tokens=8)
        sizes.append(pool_of(reader.cache).shape[0])
    assert sizes == [sizes[0], *[2 * sizes[0]] * 5]
    assert reader.prefixes.stats()["evictions"] > 0


def test_a_pool_too_large_to_grow_is_left_for_a_new_one(monkeypatch):
    """Growing copies the pool: with less memory free than that takes, the text is read as if there were no index."""
    model = PagedHistoryModel()
    reader = Generator(model)
    reader.generate(PROMPTS[0], max_new_tokens=8)
    held, old = reader.cache, pool_of(reader.cache)
    needed = old.nbytes + caches.workspace_bytes(model.config, 208, 1, 4)
    monkeypatch.setattr(caches, "free_bytes", lambda device: needed)
    expected = Generator(model, prefix_reuse=False).generate(PROMPTS[1], max_new_tokens=8).tokens
    assert reader.generate(PROMPTS[1], max_new_tokens=8).tokens == expected
    assert pool_of(reader.cache) is not old and pool_of(reader.cache).shape == old.shape
    monkeypatch.setattr(caches, "free_bytes", lambda device: needed - 1)
    for reuse in (reader.prefixes, False):
        with pytest.raises(MemoryError, match=r"208 tokens need .* bytes are free; \d+ tokens would fit"):
            Generator(model, prefix_reuse=reuse).stream(PROMPTS[2], max_new_tokens=8)
    assert held.seen().tolist() == reader.cache.seen().tolist() == [208]


def test_with_little_memory_free_the_index_gives_up_what_max_bytes_allows(monkeypatch):
    model, prefixes = PagedHistoryModel(), lcore.PrefixCache(max_bytes=10**9)
    for prompt in PROMPTS[:2]:
        Generator(model, prefix_reuse=prefixes).generate(prompt, max_new_tokens=8)
    assert prefixes.stats()["evictions"] == 0
    monkeypatch.setattr(caches, "free_bytes", lambda device: caches.workspace_bytes(model.config, 208, 1, 4))
    Generator(model, prefix_reuse=prefixes).generate(PROMPTS[2], max_new_tokens=8)
    assert 0 < prefixes.stats()["evictions"] <= 26


def test_a_known_text_needs_no_more_memory_than_its_end(monkeypatch):
    model = PagedHistoryModel()
    reader = Generator(model)
    reader.generate([PROMPTS[0], PROMPTS[1]], max_new_tokens=0)
    reader.cache = None  # so that the second text can be given up
    monkeypatch.setattr(caches, "free_bytes", lambda device: caches.workspace_bytes(model.config, 21, 1, 4))
    assert reader.generate([*PROMPTS[0], 5], max_new_tokens=20).stats.reused_tokens == 200
