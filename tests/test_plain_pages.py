"""skip_layers and fp_prefix: pages of values in a cache of codes, and everything that moves pages over them."""

import pytest
import torch
from cache_cases import all_pages_are_free, allocator_of
from test_cache_memory import held_bytes
from tiny_model import greedy_by_hand, tiny_decoder
from tolerance import assert_same_bits

import lcore
from lcore import policies, selection
from lcore.generation import Generator

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KV_HEADS, DIM = 4, 2, 64
FORMATS = ["fp8", "int8", "int4", "int2", ("int8", "bf16"), ("bf16", "int4")]


def new_cache(layers=2, **options):
    options = {"dtype": torch.bfloat16, "kv_format": "int4", "page_size": 16, **options}
    return lcore.PagedCache(layers, KV_HEADS, DIM, **options)


def fill(caches, tokens, *, batch=1, lengths=None, dtype=torch.bfloat16, steps=(None,)):
    """The same random tokens in every layer of every cache."""
    for layer in range(caches[0].num_layers):
        k, v = (torch.randn(batch, tokens, KV_HEADS, DIM).to(dtype) for _ in range(2))
        for cache in caches:
            cache.append(layer, k, v, lengths=lengths)


def queries(new=1, batch=1, dtype=torch.bfloat16):
    return torch.randn(batch, new, HEADS, DIM).to(dtype)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_a_skipped_layer_is_that_of_a_plain_cache(page_size, dtype, kv_format):
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    mixed = new_cache(kv_format=kv_format, skip_layers=[1], page_size=page_size, dtype=dtype)
    coded = new_cache(kv_format=kv_format, page_size=page_size, dtype=dtype)
    plain = new_cache(kv_format=name, page_size=page_size, dtype=dtype)
    for new in (3, 300, 1, 77, 256):
        fill([mixed, coded, plain], new, dtype=dtype)
        for rows in (1, 3, new):
            q = queries(rows, dtype=dtype)
            assert_same_bits(mixed.attend(0, q), coded.attend(0, q))
            assert_same_bits(mixed.attend(1, q), plain.attend(1, q))
    assert mixed.stats()["bytes"] == held_bytes(mixed)
    assert torch.equal(mixed.page_bounds(1), plain.page_bounds(1))
    q = queries(5, dtype=dtype)
    _, lse = plain.attend(1, q, return_lse=True)
    assert_same_bits(mixed.key_mass(1, q, lse), plain.key_mass(1, q, lse))


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("prefix", [1, 16, 40])
def test_the_first_tokens_keep_their_values(prefix, kv_format):
    """Attention over prefix and rest is the merged attention over a plain and a coded cache."""
    pages = -(-prefix // 16)
    mixed = new_cache(1, kv_format=kv_format, fp_prefix=prefix, dtype=torch.float32)
    first, rest = (new_cache(1, kv_format=name, dtype=torch.float32) for name in ("fp32", kv_format))
    k, v = (torch.randn(1, 600, KV_HEADS, DIM) for _ in range(2))
    for begin, end in ((0, 7), (7, 300), (300, 301), (301, 600)):
        mixed.append(0, k[:, begin:end], v[:, begin:end])
    split = 16 * pages
    first.append(0, k[:, :split], v[:, :split])
    rest.append(0, k[:, split:], v[:, split:])
    q = queries(1, dtype=torch.float32)
    parts = [cache.attend(0, q, return_lse=True) for cache in (first, rest)]
    want, lse = lcore.merge_states(*parts[0], *parts[1])
    got, got_lse = mixed.attend(0, q, return_lse=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got_lse, lse, rtol=1e-6, atol=1e-6)
    together = queries(200, dtype=torch.float32)
    out = mixed.attend(0, together)
    for row in (0, 57, 199):
        short = mixed.fork()
        short.crop(600)
        alone = lcore.attention(together[:, row : row + 1], k[:, : 401 + row], v[:, : 401 + row], causal=True)
        error = {"fp8": 0.1, "int8": 0.02}.get(kv_format, 1.0)
        assert (out[:, row : row + 1] - alone).abs().max() < error
    _, lse = mixed.attend(0, together, return_lse=True)
    mass = mixed.key_mass(0, together, lse)
    torch.testing.assert_close(mass.sum(-1), torch.full((1, KV_HEADS), 400.0), rtol=1e-4, atol=0.01)
    assert torch.equal(mixed.page_bounds(0)[:, :, :pages], first.page_bounds(0))
    assert torch.equal(mixed.page_bounds(0)[:, :, pages:], rest.page_bounds(0))


def test_bits_do_not_depend_on_chunks_or_neighbours():
    lengths = torch.tensor([333, 90, 20])
    options = {"skip_layers": [0], "fp_prefix": 20}
    together = new_cache(batch_size=3, **options)
    k, v = (torch.randn(3, 333, KV_HEADS, DIM).bfloat16() for _ in range(2))
    q = queries(1, 3)
    for layer in range(2):
        together.append(layer, k, v, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = new_cache(**options)
        for layer in range(2):
            for begin in range(0, n, 37):
                end = min(begin + 37, n)
                alone.append(layer, k[row : row + 1, begin:end], v[row : row + 1, begin:end])
            assert_same_bits(alone.attend(layer, q[row : row + 1]), together.attend(layer, q)[row : row + 1])


OPTIONS = [{"skip_layers": [1]}, {"fp_prefix": 16}, {"fp_prefix": 40, "skip_layers": [0]}]


@pytest.mark.parametrize("options", OPTIONS)
def test_fork_crop_and_pages_given_back(options):
    cache = new_cache(**options)
    fill([cache], 250)
    fork = cache.fork()
    q = queries()
    before = [cache.attend(layer, q) for layer in range(2)]
    fill([fork], 100)
    fork.crop(240)
    fill([fork], 90)
    for layer in range(2):
        assert_same_bits(cache.attend(layer, q), before[layer])
    fork.crop(160)
    fresh = cache.fork()
    fresh.crop(160)
    for layer in range(2):
        assert_same_bits(fork.attend(layer, q), fresh.attend(layer, q))
        assert fork.stats()["pages"] == fresh.stats()["pages"]
    allocator = allocator_of(cache)
    cache.trim()
    for layer in range(2):
        assert_same_bits(cache.attend(layer, q), before[layer])
    fork.crop(0)
    for held in (cache, fork, fresh):
        assert held.stats()["bytes"] == held_bytes(held)
        held.close()
    assert all_pages_are_free(allocator)


@pytest.mark.parametrize("options", OPTIONS)
def test_whole_pages_are_evicted(options):
    cache = new_cache(**options)
    keep = torch.ones(1, KV_HEADS, 250, dtype=torch.bool)
    keep[0, 0, 64:80] = keep[0, 0, 112:160] = keep[0, 1, 48:64] = False
    fill([cache], 250)
    q = queries()
    before = cache.stats()["pages"]
    for layer in range(2):
        masked = cache.attend(layer, q, return_lse=True)[1]
        cache.evict(layer, keep)
        assert cache.lengths(layer).tolist() == [[186, 234]]
        fill_after = cache.attend(layer, q, return_lse=True)[1]
        assert (fill_after < masked).all()
    assert cache.stats()["pages"] < before
    cache.trim()
    assert cache.stats()["bytes"] == held_bytes(cache)


def test_the_prefix_stays():
    cache = new_cache(fp_prefix=20)
    fill([cache], 250)
    keep = torch.ones(1, KV_HEADS, 250, dtype=torch.bool)
    keep[..., 16:32] = False
    with pytest.raises(ValueError, match="keep must keep the first 32 tokens, which are not coded"):
        cache.evict(0, keep)
    kept = new_cache(fp_prefix=20, policy=policies.TOVA(80))
    for _ in range(4):
        fill([kept], 60)
        for layer in range(2):
            kept.attend(layer, queries())
    held = kept.fork()
    held.crop(int(held.seen()[0]))
    first = kept._slots.layers[0].table[..., :4]
    assert kept.lengths(0).max() <= 80 + 16 and len(set(first.flatten().tolist())) == 8


@pytest.mark.parametrize("options", OPTIONS)
def test_selection_reads_whole_pages(options):
    cache = new_cache(select=selection.Quest(6, dense_layers=0), **options)
    every = new_cache(**options)
    fill([cache, every], 250)
    q = queries()
    for layer in range(2):
        cache.select = selection.Quest(15, dense_layers=0)
        assert_same_bits(cache.attend(layer, q), every.attend(layer, q))
        cache.select = selection.Quest(6, dense_layers=0)
        _, lse = cache.attend(layer, q, return_lse=True)
        _, full = every.attend(layer, q, return_lse=True)
        missed = -torch.expm1((lse - full).double())
        assert (missed > 0).any() and (missed <= cache.dropped_mass(layer) + 1e-3).all()
        # What it reads is what a cache holds from which the other pages were evicted.
        index = cache._slots.index
        bounds = lcore.page_scores(q, index.summaries[layer][:, :, :14], per_head=True).unflatten(1, (2, 2)).amax(2)
        bounds[..., : max(1, cache._slots.layout.plain.prefix)] = torch.inf
        best = bounds.topk(5, -1).indices
        keep = torch.zeros(1, KV_HEADS, 16, dtype=torch.bool).scatter(-1, best, True)
        keep[..., 14:] = True
        left = every.fork()
        left.evict(layer, keep.repeat_interleave(16, -1)[..., :250])
        got = cache.attend(layer, q)
        left._slots.thinned[layer] = 0
        assert_same_bits(left.attend(layer, q), got)


@pytest.mark.parametrize("options", OPTIONS)
def test_saved_and_loaded(options, tmp_path):
    cache = new_cache(batch_size=2, **options)
    fill([cache], 200, batch=2, lengths=torch.tensor([200, 131]))
    path = tmp_path / "a.cache"
    cache.save(path)
    again = lcore.PagedCache.load(path)
    assert again.skip_layers == cache.skip_layers and again.fp_prefix == cache.fp_prefix
    q = queries(1, 2)
    fill([cache, again], 50, batch=2)
    for layer in range(2):
        assert_same_bits(cache.attend(layer, q), again.attend(layer, q))


def test_bytes():
    """A page of values is four of int4: sixteen tokens of 64 a part."""
    options = {"page_size": 64, "kv_format": "int4"}
    sizes = {}
    for name, more in (("none", {}), ("skip", {"skip_layers": [0]}), ("prefix", {"fp_prefix": 64})):
        cache = lcore.PagedCache(2, 1, 128, **options, **more)
        cache.reserve(64 * 10)
        for layer in range(2):
            cache.append(layer, *(torch.randn(1, 640, 1, 128).bfloat16() for _ in range(2)))
        sizes[name] = cache.stats()["pages"]
        assert cache.stats()["free_pages"] == 0
    assert sizes == {"none": 20, "skip": 50, "prefix": 26}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"skip_layers": [2]}, ValueError, r"skip_layers must be an integer in \[0, 1\], got 2"),
        ({"skip_layers": [0, 0]}, ValueError, "skip_layers must hold different layers"),
        ({"skip_layers": "0"}, TypeError, "skip_layers must hold different layers, 0 to 1"),
        ({"skip_layers": [0.5]}, TypeError, "skip_layers must be an integer"),
        ({"fp_prefix": -1}, ValueError, "fp_prefix must be an integer >= 0"),
        ({"kv_format": "bf16", "skip_layers": [0]}, ValueError, "not be given where kv_format stores values"),
        ({"kv_format": "bf16", "fp_prefix": 3}, ValueError, "fp_prefix must not be given where"),
    ],
)
def test_errors(options, error, text):
    with pytest.raises(error, match=text):
        new_cache(**options)


def test_the_generator_makes_such_caches():
    model = tiny_decoder()
    options = {"skip_layers": [0], "fp_prefix": 20}
    generator = Generator(model, kv_format="int4", prefill_chunk=64, context=500, **options)
    prompt = [(17 * i * i + 5 * i + 3) % 256 for i in range(300)]
    ids = generator.generate(prompt, max_new_tokens=20).tokens
    want, _ = greedy_by_hand(model, prompt, 64, 20, kv_format="int4", **options)
    assert ids == want and generator.cache.skip_layers == (0,)
    stats = generator.cache.stats()
    assert stats["pages"] == generator.cache.pages_for([int(generator.cache.seen())])
    assert stats["pages"] + stats["free_pages"] == generator.cache.pages_for([500])
