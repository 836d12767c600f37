"""lcore.PrefixCache over real caches: rows that begin with pages of others, forks, what is not shared, bad input."""

import re

import pytest
import torch
from cache_cases import all_pages_are_free, allocator_of, contents, pool_of
from prefix_cases import DIM, HEADS, LAYERS, PAGE_BYTES, PAGES_A_RUN, assert_holds, new_cache, read, states, text

import lcore


def test_a_row_begins_with_the_pages_of_another():
    prefixes, tokens = lcore.PrefixCache(), text(0, 100)
    first, known = read(prefixes, tokens)
    assert known == 0
    second, known = read(prefixes, torch.cat([tokens[:70], text(1, 30)]))
    assert known == 64
    table = [cache._slots.table[..., :4] for cache in (first, second)]
    assert torch.equal(*table) and pool_of(first) is pool_of(second)
    assert {allocator_of(first).refcount(page) for page in table[0].flatten().tolist()} == {3}
    assert_holds(first, tokens)
    assert_holds(second, torch.cat([tokens[:70], text(1, 30)]))
    stats = prefixes.stats()
    assert stats["runs"] == 6 + 2 and stats["pages"] == 8 * PAGES_A_RUN and stats["bytes"] == 32 * PAGE_BYTES
    assert (stats["hits"], stats["misses"], stats["evictions"]) == (4, 6 + 2, 0)
    assert stats["pool_bytes"] == pool_of(first).nbytes


def test_rows_and_caches_of_a_batch():
    prefixes, tokens = lcore.PrefixCache(), text(0, 100)
    read(prefixes, tokens)
    batch = new_cache(3)
    assert prefixes.start(batch, [tokens[:50], text(1, 40), tokens]) == [48, 0, 96]
    assert batch.seen().tolist() == batch.lengths(1)[:, 1].tolist() == [48, 0, 96]
    new = torch.tensor([2, 40, 4])
    for layer in range(LAYERS):
        k = torch.zeros(3, 40, HEADS, DIM)
        for row, part in enumerate([states(tokens)[0, 48:50], states(text(1, 40))[0], states(tokens)[0, 96:]]):
            k[row, : len(part)] = part
        batch.append(layer, k, -k, lengths=new)
    slots = contents(batch, 1)
    for row, whole in enumerate([tokens[:50], text(1, 40), tokens]):
        plain = new_cache()
        plain.append(1, states(whole), -states(whole))
        for got, want in zip(slots[row * 8 : row * 8 + 8], contents(plain, 1), strict=True):
            assert torch.equal(got, want)
    assert prefixes.insert(batch, 1, text(1, 40)) == 2 * PAGES_A_RUN
    assert prefixes.insert(batch, 2, tokens) == 0


def test_settings_and_namespaces_do_not_mix():
    prefixes, tokens = lcore.PrefixCache(), text(0, 100)
    kept, _ = read(prefixes, tokens)
    assert read(prefixes, tokens)[1] == 96
    # Pages of the same bytes in all of them, so that one pool holds them.
    for options in ({"page_size": 32, "kv_format": "fp16"}, {"page_size": 32, "kv_format": "bf16"}):
        other = new_cache(**options)
        assert prefixes.start(other, [tokens]) == [0]
        for layer in range(LAYERS):
            other.append(layer, states(tokens), -states(tokens))
        prefixes.insert(other, 0, tokens)
        again = new_cache(**options)
        assert prefixes.start(again, [tokens]) == [96]
    named = new_cache()
    assert prefixes.start(named, [tokens], b"another model") == [0]
    assert_holds(kept, tokens)


def test_what_is_not_whole_is_not_remembered():
    prefixes, tokens = lcore.PrefixCache(), text(0, 100)
    stranger = new_cache()
    assert prefixes.insert(stranger, 0, tokens) == 0
    cache = new_cache(2)
    prefixes.start(cache, [tokens, tokens])
    k = states(tokens).expand(2, -1, -1, -1)
    cache.append(0, k, k)
    assert prefixes.insert(cache, 0, tokens) == 0, "one layer lacks the tokens"
    cache.append(1, k, k)
    fork = cache.fork()
    cache.crop(torch.tensor([99, 100]))
    assert prefixes.insert(cache, 0, tokens[:32]) == 0, "it was cropped"
    assert prefixes.insert(cache.fork(), 0, tokens[:32]) == 0, "so was what its fork was made of"
    assert prefixes.insert(cache, 1, tokens[:15]) == 0, "no full page"
    assert prefixes.insert(cache, 1, tokens[:32]) == 2 * PAGES_A_RUN
    assert prefixes.insert(fork, 0, tokens) == 4 * PAGES_A_RUN


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_forks_of_forks_write_copies(order):
    """A document in the index, a cache that begins with it, its fork and the fork's fork: each goes its own way."""
    prefixes, document = lcore.PrefixCache(), text(0, 100)
    read(prefixes, document)[0].close()
    root, known = read(prefixes, document)
    assert known == 96
    child = root.fork()
    tails = [text(seed, 40) for seed in range(1, 5)]
    longer = torch.cat([document, tails[0]])
    for layer in range(LAYERS):
        child.append(layer, states(longer)[:, 100:], -states(longer)[:, 100:])
    grandchild, late = child.fork(), root.fork()
    held = {0: (root, document), 1: (child, longer), 2: (grandchild, longer), 3: (late, document)}
    allocator = allocator_of(root)
    del root, child, grandchild, late
    for step, which in enumerate(order):
        cache, tokens = held[which]
        more = torch.cat([tokens, tails[which]])
        for layer in range(LAYERS):
            cache.append(layer, states(more)[:, len(tokens) :], -states(more)[:, len(tokens) :])
        held[which] = (cache, more)
        for other, whole in held.values():
            assert_holds(other, whole)
        if step == 1:
            prefixes.clear()
    again, known = read(prefixes, document)
    assert known == 0
    assert_holds(again, document)
    for cache, _ in held.values():
        cache.close()
    again.close()
    prefixes.clear()
    assert all_pages_are_free(allocator)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, c: lcore.PrefixCache(-1), ValueError, "PrefixCache: max_bytes must be an integer >= 0, got -1"),
        (lambda p, c: lcore.PrefixCache("1"), TypeError, "PrefixCache: max_bytes must be an integer >= 0, got '1'"),
        (lambda p, c: p.start(c, [text(0, 9)]), ValueError,
         "PrefixCache.start: cache must hold no tokens, got lengths [100]"),
        (lambda p, c: p.start(new_cache(2), [text(0, 9)]), ValueError,
         "PrefixCache.start: prompts must have 2 rows, got 1"),
        (lambda p, c: p.start(new_cache(max_bytes=10**6), [text(0, 9)]), ValueError,
         "PrefixCache.start: cache must have max_bytes None, got 1000000"),
        (lambda p, c: p.start(new_cache(page_size=8), [text(0, 9)]), ValueError,
         f"PrefixCache.start: cache must have pages of the pool's {PAGE_BYTES} bytes, got {PAGE_BYTES // 2}"),
        (lambda p, c: p.start(new_cache(), [text(0, 9).float()]), TypeError,
         "PrefixCache.start: prompts must have dtype int64 or int32, got float32"),
        (lambda p, c: p.start(new_cache(), [text(0, 9)[None]]), ValueError,
         "PrefixCache.start: prompts must have shape (tokens,) = (*,), got (1, 9)"),
        (lambda p, c: p.insert(c, 1, text(0, 9)), ValueError,
         "PrefixCache.insert: row must be an integer in [0, 0], got 1"),
        (lambda p, c: p.insert(c, 0, text(0, 99) - 2000), ValueError,
         "PrefixCache.insert: tokens must lie in [0, 2^31), got "),
        (lambda p, c: p.insert(c, 0, text(0, 99) + 2**32), ValueError,
         "PrefixCache.insert: tokens must lie in [0, 2^31), got "),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    prefixes = lcore.PrefixCache()
    cache, _ = read(prefixes, text(0, 100))
    before = prefixes.stats()
    with pytest.raises(error, match="^" + re.escape("lcore." + message)):
        call(prefixes, cache)
    assert prefixes.stats() == before
    assert_holds(cache, text(0, 100))
    cache.close()
    for closed in (lambda: prefixes.start(cache, [text(0, 9)]), lambda: prefixes.insert(cache, 0, text(0, 9))):
        with pytest.raises(ValueError, match="the cache must be open, got a closed one"):
            closed()
