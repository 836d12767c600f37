"""Prefix reuse of caches that keep values among codes: layers that are not coded, and first tokens that are not."""

import numpy as np
import pytest
import torch
from cache_cases import all_pages_are_free, allocator_of, random_kv
from test_prefix_bits import DOCUMENT, QUESTIONS, Recorder
from tiny_model import tiny_decoder
from tolerance import assert_same_bits

import lcore
from lcore._runtime import PageAllocator, PrefixIndex
from lcore.generation import Generator

LAYERS, HEADS, DIM, PAGE = 3, 2, 32, 16
OPTIONS = [{"skip_layers": [1]}, {"fp_prefix": 20}, {"skip_layers": [0, 2], "fp_prefix": 40}]


def new_cache(rows=1, **options):
    return lcore.PagedCache(LAYERS, HEADS, DIM, batch_size=rows, dtype=torch.float32, kv_format="int8",
                            page_size=PAGE, **options)  # fmt: skip


def entries(options, pages):
    """Pages of the pool that the first `pages` pages of a text take: one of values is in `parts` of them."""
    parts = new_cache(**options)._slots.layout.plain.parts
    prefix = -(-options.get("fp_prefix", 0) // PAGE)
    plain = [pages if layer in options.get("skip_layers", ()) else min(pages, prefix) for layer in range(LAYERS)]
    assert parts > 1
    return HEADS * sum(pages + n * (parts - 1) for n in plain)


def read(prefixes, tokens, states, **options):
    cache = new_cache(**options)
    [known] = prefixes.start(cache, [tokens])
    for layer in range(LAYERS):
        k, v = states[layer]
        cache.append(layer, k[:1, known : len(tokens)], v[:1, known : len(tokens)])
    prefixes.insert(cache, 0, tokens)
    return cache, known


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_found_is_what_was_read(options):
    prefixes, tokens = lcore.PrefixCache(), torch.arange(150)
    states = [random_kv(1, 200, HEADS, DIM) for _ in range(LAYERS)]
    q = torch.randn(1, 1, 4, DIM)
    first, known = read(prefixes, tokens, states, **options)
    assert known == 0 and prefixes.stats()["pages"] == entries(options, 9)
    for length, found in ((150, 144), (100, 96), (30, 16), (17, 16), (16, 0)):
        cache, known = read(prefixes, tokens[:length], states, **options)
        plain = new_cache(**options)
        for layer in range(LAYERS):
            k, v = states[layer]
            plain.append(layer, k[:, :length], v[:, :length])
            assert_same_bits(cache.attend(layer, q), plain.attend(layer, q))
        assert known == found and cache.stats()["pages"] == plain.stats()["pages"] == entries(options, length // PAGE)
    assert prefixes.stats()["pages"] == entries(options, 9) and first.lengths(0).unique().tolist() == [150]


@pytest.mark.parametrize("options", OPTIONS)
def test_no_reference_is_left(options):
    prefixes, states = lcore.PrefixCache(), [random_kv(2, 200, HEADS, DIM) for _ in range(LAYERS)]
    texts = [torch.arange(150), torch.cat([torch.arange(70), torch.arange(500, 600)])]
    for cache in [read(prefixes, tokens, states, **options)[0] for tokens in texts]:
        cache.close()
    both = new_cache(2, **options)
    assert prefixes.start(both, texts) == [144, 160]
    allocator = allocator_of(both)
    used = allocator.num_pages - allocator.free_count
    assert used == prefixes.stats()["pages"] == entries(options, 9) + entries(options, 10) - entries(options, 4)
    fork = both.fork()
    both.crop(torch.tensor([32, 160]))
    both.append(0, *(x[:, :40] for x in states[0]))
    fork.close()
    both.close()
    assert allocator.num_pages - allocator.free_count == used
    prefixes.clear()
    assert all_pages_are_free(allocator)


@pytest.mark.parametrize("options", OPTIONS)
def test_pages_move_and_are_given_up_with_their_parts(options):
    states = [random_kv(1, 200, HEADS, DIM) for _ in range(LAYERS)]
    prefixes = lcore.PrefixCache()
    cache, _ = read(prefixes, torch.arange(150), states, **options)
    other, _ = read(prefixes, torch.arange(1000, 1150), states, **options)
    q = torch.randn(1, 1, 4, DIM)
    want = [other.attend(layer, q) for layer in range(LAYERS)]
    cache.close()
    prefixes.make_free(other, allocator_of(other).free_count + entries(options, 9))
    assert prefixes.stats()["pages"] == entries(options, 9)
    other.trim()
    for layer in range(LAYERS):
        assert_same_bits(other.attend(layer, q), want[layer])
    again, known = read(prefixes, torch.arange(1000, 1150), states, **options)
    assert known == 144
    for layer in range(LAYERS):
        assert_same_bits(again.attend(layer, q), want[layer])


def test_settings_do_not_mix():
    prefixes, states = lcore.PrefixCache(), [random_kv(1, 200, HEADS, DIM) for _ in range(LAYERS)]
    for options in ({}, *OPTIONS, {"fp_prefix": 50}):
        assert read(prefixes, torch.arange(150), states, **options)[1] == 0


@pytest.mark.parametrize("options", [{"skip_layers": [0]}, {"fp_prefix": 100}, {"skip_layers": [1], "fp_prefix": 64}])
def test_logits_are_the_same_bits(options):
    model = tiny_decoder()
    recorder = Recorder(model)
    reader, plain = (Generator(model, "int4", 64, prefix_reuse=reuse, **options) for reuse in (True, False))
    reused = []
    for question in QUESTIONS:
        known, with_reuse = reader.generate(DOCUMENT + question, max_new_tokens=3), recorder.take()
        fresh, without = plain.generate(DOCUMENT + question, max_new_tokens=3), recorder.take()
        assert known.tokens == fresh.tokens
        for got, want in zip(reversed(with_reuse), reversed(without), strict=False):
            assert torch.equal(got, want)
        reused.append(known.stats.reused_tokens)
    assert reused == [0, 256, 256]


def test_runs_of_the_index_may_have_fewer_pages():
    index, allocator = PrefixIndex(), PageAllocator(20)
    tokens = np.arange(12, dtype=np.int32).reshape(3, 4)
    pages = np.array([[5, 1, 7], [2, -1, 3], [-1, 4, -1]], dtype=np.int32)
    assert index.insert(b"a", tokens, pages) == 0 and index.pages == 6
    assert index.match(b"a", tokens).tolist() == [[5, 1, 7], [2, 3, -1], [4, -1, -1]]
    index.renumber(np.arange(10, 30, dtype=np.int32))
    assert index.match(b"a", tokens[:2]).tolist() == [[15, 11, 17], [12, 13, -1]]
    allocator.allocate(20)
    assert index.evict(2, allocator).tolist() == [14, 12, 13]
    assert index.pages == 3 and sorted(index.clear()) == [11, 15, 17] and index.pages == 0
    with pytest.raises(ValueError, match="pages must be at least one in each row"):
        index.insert(b"a", tokens[:1], np.full((1, 3), -1, dtype=np.int32))
