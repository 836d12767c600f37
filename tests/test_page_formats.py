"""Coded pages: what comes back from their bytes is what the formula says, whatever the values and the chunks."""

import pytest
import torch
from cache_cases import pool_of
from hypothesis import given, settings
from hypothesis import strategies as st

import lcore
from lcore.cache.formats import FORMATS, page_layout
from lcore.reference.page_format import through_page

CODED = [name for name, format in FORMATS.items() if not format.stores_values]
INTEGERS = ["int8", "int4", "int2"]


def stored(cache, slot=(0, 0, 0)):
    """K and V (tokens, dim) of a slot's full pages, float64."""
    slots = cache._slots
    pages = slots.table[slot][: slots.lengths[slot] // cache.page_size].long()
    return [x.flatten(0, 1).double() for x in slots.layout.decode(pool_of(cache)[pages], torch.float32)]


def filled(k, v, kv_format, page_size=16, chunks=None):
    """A cache of one layer and head with these (tokens, dim) keys and values."""
    cache = lcore.PagedCache(
        1, 1, k.shape[1], head_dim_v=v.shape[1], dtype=k.dtype, kv_format=kv_format, page_size=page_size
    )
    for part_k, part_v in zip(k.split(chunks or len(k)), v.split(chunks or len(v)), strict=True):
        cache.append(0, part_k[None, :, None], part_v[None, :, None])
    return cache


def check(x, kv_format, page_size=16):
    cache = filled(x, x, kv_format, page_size)
    for value, got in enumerate(stored(cache)):
        pages = x[: len(got)].split(page_size)
        want = torch.cat([through_page(page, kv_format, bool(value)) for page in pages])
        same = torch.isclose(got, want, rtol=2e-7, atol=0, equal_nan=True)  # one rounding of zero + scale * code
        assert bool((same | (got - want).abs().lt(1e-7 * x[x.isfinite()].abs().amax())).all()), kv_format


@pytest.mark.parametrize("kv_format", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("page_size", "dim"), [(16, 1), (16, 40), (32, 64), (64, 128), (128, 72), (256, 13)])
def test_values_come_back_as_the_formula_says(kv_format, dtype, page_size, dim):
    check((torch.randn(2 * page_size + 3, dim) * torch.logspace(-2, 2, dim)).to(dtype), kv_format, page_size)


HARD = {
    "all equal": torch.full((32, 24), 0.3),
    "zero": torch.zeros(32, 24),
    "two values": torch.tensor([-1.0, 7.0]).repeat(32, 12),
    "far from zero": 1000 + torch.randn(32, 24),
    "tiny": torch.randn(32, 24) * 1e-9,
    "beyond float16": torch.randn(32, 24) * 1e6,
    "one outlier": torch.randn(32, 24).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(5000.0)),
    "negative": -torch.rand(32, 24) - 2,
}


@pytest.mark.parametrize("kv_format", CODED)
@pytest.mark.parametrize("name", HARD)
def test_hard_values(kv_format, name):
    check(HARD[name], kv_format)


@pytest.mark.parametrize("kv_format", INTEGERS)
def test_the_grid_covers_its_values(kv_format):
    """No value is further from its code than half a step: neither a zero nor a scale was rounded the wrong way."""
    x = torch.randn(64, 64) * 3 + 5
    levels = (1 << FORMATS[kv_format].bits) - 1
    for value, got in enumerate(stored(filled(x, x, kv_format, 64))):
        groups, axis = (x, 1) if value else (x, 0)
        extent = groups.amax(axis, keepdim=True) - groups.amin(axis, keepdim=True)
        size = groups.abs().amax(axis, keepdim=True)
        # Half a step, of an extent that float16 zeros and scales have widened.
        assert bool(((got - x).abs() <= (extent + 2**-10 * size) / levels / 2 * (1 + 2**-9)).all())


@pytest.mark.parametrize("kv_format", CODED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_group_alone(kv_format, bad):
    x = torch.randn(32, 128)
    x[20, 70] = bad
    k, v = stored(filled(x, x, kv_format))
    assert k[16:, 70].isnan().all() and v[20, 64:].isnan().all()
    k[16:, 70], v[20, 64:] = 0, 0
    assert k.isfinite().all() and v.isfinite().all()


@pytest.mark.parametrize("kv_format", CODED)
@given(chunks=st.integers(1, 70), page_size=st.sampled_from([16, 32, 64]))
@settings(max_examples=10, deadline=None)
def test_bytes_do_not_depend_on_chunks(kv_format, chunks, page_size):
    generator = torch.Generator().manual_seed(chunks)
    k, v = torch.randn(130, 20, generator=generator), torch.randn(130, 36, generator=generator)
    whole, parts = filled(k, v, kv_format, page_size), filled(k, v, kv_format, page_size, chunks)
    pages = 130 // page_size
    assert torch.equal(pool_of(whole)[:pages], pool_of(parts)[:pages])


@pytest.mark.parametrize("kv_format", list(FORMATS))
@pytest.mark.parametrize(("page_size", "dim", "dim_v"), [(16, 1, 1), (64, 128, 128), (32, 72, 200)])
def test_bytes_are_those_of_the_kernels(kv_format, page_size, dim, dim_v):
    """The op refuses a pool whose pages have another size than its own layout."""
    layout = page_layout("test", dim, dim_v, kv_format, page_size)
    x = torch.randn(page_size, max(dim, dim_v))
    filled(x[:, :dim], x[:, :dim_v], kv_format, page_size)
    assert layout.page_bytes % 64 == 0


def test_bits_per_value():
    bits = {name: page_layout("test", 128, None, name, 64).bits_per_value for name in CODED}
    assert bits == {"fp8": 8.25, "int8": 8.5, "int4": 4.5, "int2": 2.5}
