"""Attention over coded pages, against the float64 formula on the values that the pages hold."""

import pytest
import torch
from cache_cases import random_kv
from tolerance import assert_same_bits

import lcore
from lcore.reference.cache import PagedCache as CacheModel

FORMATS = ["fp8", "int8", "int4", "int2", ("int8", "bf16"), ("fp32", "int4"), ("fp8", "int2"), ("int4", "int8")]
INTEGERS = ["int8", "int4", "int2"]


def pair(lengths, *, kv_heads=2, head_dim=64, dtype=torch.float32, **options):
    """A cache and its model with the same random tokens, appended in these steps."""
    cache, model = (kind(1, kv_heads, head_dim, dtype=dtype, **options) for kind in (lcore.PagedCache, CacheModel))
    for new in lengths:
        k, v = random_kv(options.get("batch_size", 1), new, kv_heads, head_dim, options.get("head_dim_v"), dtype)
        cache.append(0, k, v + 1)
        model.append(0, k, v + 1)
    return cache, model


def check(cache, model, q, lengths=None, layer=0, **arguments):
    got = cache.attend(layer, q, lengths=lengths, **arguments)
    want = model.attend(layer, q, lengths=lengths, **arguments)
    working = model.attend(layer, q, lengths=lengths, precision=cache.dtype, **arguments).double()
    # Factors are 16-bit integers under the largest of a row: 2^-16 of |q| times the extent of K, and 2^-16 of V.
    largest = max(float(head[1].abs().max()) for row in model.tokens[layer] for head in row if len(head[1]))
    slack = 2**-16 * (float(q.nan_to_num().abs().max()) * 8 + 2) * largest
    error, bound = (got.double() - want).abs().max(), 2 * (working - want).abs().max() + slack
    eps = torch.finfo(cache.dtype).eps
    assert error <= bound + eps * want.abs().max(), f"{error:.3g} > {bound:.3g}"
    return got


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("page_size", "head_dim", "head_dim_v"),
    [(16, 128, 128), (64, 64, 64), (32, 40, 72), (256, 13, 100), (128, 288, 512)],
)
def test_values(kv_format, dtype, page_size, head_dim, head_dim_v):
    cache, model = pair(
        [70, 300, 5], head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, page_size=page_size, kv_format=kv_format
    )
    for new, group in ((1, 1), (3, 4), (5, 2), (100, 3), (375, 1)):
        check(cache, model, torch.randn(1, new, 2 * group, head_dim).to(dtype))


@pytest.mark.parametrize("kv_format", INTEGERS)
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 4095, 4096, 4100])
def test_lengths(kv_format, tokens):
    cache, model = pair([tokens], kv_heads=1, head_dim=16, page_size=16, kv_format=kv_format)
    if tokens == 0:
        assert cache.attend(0, torch.randn(1, 0, 1, 16)).shape == (1, 0, 1, 16)
        return
    check(cache, model, torch.randn(1, min(tokens, 20), 3, 16))


@pytest.mark.parametrize("kv_format", FORMATS)
def test_masks_and_scores(kv_format):
    cache, model = pair([333], batch_size=2, head_dim=32, page_size=32, kv_format=kv_format)
    q = torch.randn(2, 70, 4, 32)
    sinks, slopes = torch.randn(4), torch.rand(4)
    check(cache, model, q, window_size=(40, 0), softcap=5.0, alibi_slopes=slopes, sinks=sinks, softmax_scale=0.3)
    lengths = torch.tensor([70, 11])
    check(cache, model, q, lengths=lengths)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_row_has_the_same_bits_alone_and_in_company(kv_format, page_size):
    cache, _ = pair([4700], kv_heads=1, dtype=torch.bfloat16, page_size=page_size, kv_format=kv_format)
    q = torch.randn(1, 300, 4, 64).bfloat16()
    threads = torch.get_num_threads()
    whole = cache.attend(0, q)
    for new in (1, 2, 7, 50):
        assert_same_bits(cache.attend(0, q[:, -new:]), whole[:, -new:], f"{new} rows")
    assert_same_bits(cache.attend(0, q[:, :, :1]), whole[:, :, :1], "one head of the group")
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            assert_same_bits(cache.attend(0, q), whole, f"{count} threads")
            assert_same_bits(cache.attend(0, q[:, -1:]), whole[:, -1:], f"decode, {count} threads")
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_bad_token_reaches_no_row_that_does_not_see_its_group(kv_format):
    """V of a token is its own group: rows before it stay what they were."""
    caches = []
    k, v = torch.randn(1, 100, 1, 32), torch.randn(1, 100, 1, 32)
    for bad in (False, True):
        cache = lcore.PagedCache(1, 1, 32, dtype=torch.float32, page_size=16, kv_format=kv_format)
        cache.append(0, k, v.index_fill(1, torch.tensor([70]), torch.nan) if bad else v)
        caches.append(cache)
    q = torch.randn(1, 100, 2, 32)
    good, spoilt = (cache.attend(0, q) for cache in caches)
    assert_same_bits(spoilt[:, :70], good[:, :70])
    assert spoilt[:, 70:].isnan().all()


@pytest.mark.parametrize("kv_format", ["int8", "int4", "int2", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 96, 40])
def test_rotation(kv_format, head_dim):
    cache, model = pair([300], head_dim=head_dim, page_size=32, kv_format=kv_format, rotate=True)
    check(cache, model, torch.randn(1, 40, 4, head_dim))


@pytest.mark.parametrize("kv_format", ["int4", "int2"])
def test_rotation_tames_outlier_channels(kv_format):
    """V with a few channels twenty times the others: coding it rotated is several times closer to the truth."""
    torch.manual_seed(5)
    k, v, q = torch.randn(1, 512, 2, 128), torch.randn(1, 512, 2, 128), torch.randn(1, 64, 2, 128)
    v[..., [3, 40, 77]] *= 20
    errors = []
    want = lcore.attention(q, k, v, causal=True)
    for rotate in (False, True):
        cache = lcore.PagedCache(1, 2, 128, dtype=torch.float32, kv_format=("fp32", kv_format), rotate=rotate)
        cache.append(0, k, v)
        errors.append(((cache.attend(0, q) - want).square().mean() / want.square().mean()).sqrt())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("kv_format", ["int4", "fp8"])
def test_crop_takes_back_the_last_append_exactly(kv_format):
    cache, _ = pair([60], page_size=16, kv_format=kv_format)
    before = cache.fork()
    k, v = random_kv(1, 40, 2, 64)
    cache.append(0, k, v)
    cache.crop(60)
    q = torch.randn(1, 5, 2, 64)
    assert_same_bits(cache.attend(0, q), before.attend(0, q))
    for twin in (cache, before):
        twin.append(0, k, v)
    assert_same_bits(cache.attend(0, q), before.attend(0, q), "appended again")
    cache.crop(48)
    assert cache.lengths(0).tolist() == [[48, 48]]


def test_crop_into_a_coded_page_is_refused():
    cache, _ = pair([60, 40], page_size=16, kv_format="int4")
    before = cache.fork()
    q = torch.randn(1, 1, 2, 64)
    with pytest.raises(
        ValueError, match=r"n must end at whole pages of 16 tokens.* got 40 in a coded page; 32 would do"
    ):
        cache.crop(40)
    assert_same_bits(cache.attend(0, q), before.attend(0, q))


@pytest.mark.parametrize("kv_format", ["int4", "fp8"])
def test_coded_pages_are_evicted_whole(kv_format):
    cache, _ = pair([70], page_size=16, kv_format=kv_format)
    keep = torch.ones(1, 2, 70, dtype=torch.bool)
    keep[0, 0, 5] = False
    with pytest.raises(ValueError, match="keep must keep or drop whole pages of 16 tokens"):
        cache.evict(0, keep)
    keep[0, 0, :16] = False
    cache.evict(0, keep)
    assert cache.lengths(0).tolist() == [[54, 70]] and cache.seen(0).tolist() == [70]


@pytest.mark.parametrize("kv_format", ["int8", "int4", "int2", "fp8"])
def test_policies_drop_coded_pages(kv_format):
    """H2O over coded keys: the pages that stay are those of the largest mass, and memory falls by the others."""
    cache = lcore.PagedCache(
        1, 2, 64, dtype=torch.float32, page_size=16, kv_format=kv_format, policy=lcore.policies.H2O(64)
    )
    k, v = random_kv(1, 400, 2, 64)
    q = torch.randn(1, 400, 4, 64)
    cache.append(0, k, v)
    cache.attend(0, q)
    held = cache.lengths(0)
    assert bool((held <= 64).all()) and bool((held >= 48).all()) and cache.seen(0).tolist() == [400]
    before = cache.stats()["pool_bytes"]
    cache.trim()
    assert cache.stats()["pool_bytes"] == cache.stats()["pages"] * cache.stats()["page_bytes"] < before / 4
    k, v = random_kv(1, 40, 2, 64)
    cache.append(0, k, v)
    assert cache.attend(0, q[:, :40]).isfinite().all()
