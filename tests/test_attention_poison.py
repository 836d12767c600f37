"""Memory that must not be read holds NaN or infinity, and no bit of a result changes."""

import itertools
import math

import pytest
import torch
from attention_cases import FLOATS, everything, gradients, lcore_with_lse, random_packed, random_qkv
from cache_cases import DTYPE_OF, NAME_OF, inside, poison, pool_of, random_kv
from tolerance import assert_same_bits

import lcore

DTYPES = tuple(NAME_OF)
POISONS = (math.nan, math.inf, -math.inf)
FAR = 1024  # no block of keys or tile of rows is longer


def surrounded(x, value, *, heads_first=False):
    """x's values in memory that holds `value` before, after and between all rows of head_dim."""
    shape = [n + 2 for n in x.shape]
    order = [0, 2, 1, 3] if heads_first else [0, 1, 2, 3]
    memory = torch.full([shape[d] for d in order], value, dtype=x.dtype).permute(order)
    return memory[tuple(slice(1, -1) for _ in shape)].copy_(x)


def interleaved(x, value):
    """Every second element of the last dimension."""
    return torch.full((*x.shape[:-1], 2 * x.shape[-1]), value, dtype=x.dtype)[..., 1::2].copy_(x)


LAYOUTS = {
    "rows": surrounded,
    "heads first": lambda x, value: surrounded(x, value, heads_first=True),
    "every second element": interleaved,
}


def assert_same(got, want, what=""):
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(x, y, f"{what} result {i}")


def call(q, k, v, dout=None, **arguments):
    """out, lse, and the gradients when dout is given."""
    results = list(lcore_with_lse(q, k, v, **arguments))
    if dout is not None:
        results += gradients(lcore_with_lse, q, k, v, dout, torch.ones_like(results[1]), arguments).values()
    return results


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gaps_between_strides(layout, dtype, value):
    """Head sizes that fill no vector and sequences that fill no block: what is read too far is poison."""
    place = LAYOUTS[layout]
    for seq_q, seq_k, dim, dim_v in ((70, 131, 40, 59), (1, 129, 3, 16), (5, 300, 17, 1), (33, 65, 128, 80)):
        q, k, v = random_qkv(seq_q, seq_k, batch=2, heads=6, kv_heads=2, head_dim=dim, head_dim_v=dim_v, dtype=dtype)
        dout = torch.randn(2, seq_q, 6, dim_v).to(dtype)
        want = call(q, k, v, dout, causal=True)
        assert_same(call(*(place(x, value) for x in (q, k, v, dout)), causal=True), want)


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seq_q", [1, 8, 64, 200])
def test_keys_far_left_of_every_window(seq_q, dtype, value):
    seen, far = seq_q + 100, 4096 + FAR
    q, k, v = random_qkv(seq_q, far + FAR + seen, heads=4, kv_heads=2, dtype=dtype)
    dout = torch.randn_like(q)
    arguments = {**everything(4), "window_size": (100, -1)}
    want = call(q, k, v, dout, **arguments)
    k[:, :far], v[:, :far] = value, value
    got = call(q, k, v, dout, **arguments)
    assert_same(got, want)
    assert not got[3][:, :far].any() and not got[4][:, :far].any(), "keys that nobody sees have no gradient"


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_far_above_every_key(dtype, value):
    """With more queries than keys, causal rows at the top see nothing."""
    q, k, v = random_qkv(2 * FAR + 90, 90, heads=4, kv_heads=2, dtype=dtype)
    dout = torch.randn_like(q)
    arguments = {"causal": True, "sinks": torch.randn(4)}
    want = call(q, k, v, dout, **arguments)
    for name, x in (("q", q), ("dout", dout)):
        clean = x.clone()
        x[:, :FAR] = value
        out, lse, dq, dk, dv, dsinks = call(q, k, v, dout, **arguments)
        assert_same((out, lse, dk, dv), (*want[:2], *want[3:5]), name)
        assert not dq[:, :FAR].any(), "rows without keys have no gradient"
        if name == "q":
            assert_same_bits(dsinks, want[5])
        x.copy_(clean)


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_neighbours_gaps_and_tails(dtype, value):
    """Sequence 1 and the tail are poison; 0, 2 and 3 read up to their borders and no further."""
    lengths_q, lengths_k = [131, 9, 1, 70], [131, 40, 77, 70]
    q, k, v, offsets = random_packed(lengths_q, lengths_k, 11, heads=4, kv_heads=2, head_dim=24, dtype=dtype)
    dout = torch.randn_like(q)
    arguments = {**everything(4, rows=4), **offsets, "sinks": None}
    want = call(q, k, v, dout, **arguments)
    ends_q, ends_k = (x.tolist() for x in offsets.values())
    for x, ends in ((q, ends_q), (dout, ends_q), (k, ends_k), (v, ends_k)):
        x[ends[1] : ends[2]], x[ends[4] :] = value, value
    out, lse, dq, dk, dv = call(q, k, v, dout, **arguments)
    for i in (0, 2, 3):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        got = (out[rows], lse[:, rows], dq[rows], dk[keys], dv[keys])
        assert_same(got, (want[0][rows], want[1][:, rows], want[2][rows], want[3][keys], want[4][keys]), f"{i}:")
    assert not out[ends_q[4] :].any() and lse[:, ends_q[4] :].isneginf().all()
    assert not any(x[end:].any() for x, end in ((dq, ends_q[4]), (dk, ends_k[4]), (dv, ends_k[4])))


def fill_page(cache, ids, value):
    """K and V of these pages of the pool, the padding behind each included."""
    layout = cache._slots.layout
    pool = pool_of(cache)
    for where, name in zip((slice(0, layout.v_begin), slice(layout.v_begin, None)), cache.kv_format, strict=True):
        pool[ids, where] = torch.full((pool[0, where].numel() // DTYPE_OF[name].itemsize,), value).to(
            DTYPE_OF[name]
        ).view(torch.uint8)  # fmt: skip


def poisoned(k, v, lengths, page_size, formats, value, garbage):
    """A cache of rows of these lengths whose unused pages, tails and table entries are poison."""
    cache = lcore.PagedCache(1, k.shape[2], k.shape[3], head_dim_v=v.shape[3], batch_size=k.shape[0], dtype=k.dtype,
                             kv_format=formats, page_size=page_size)  # fmt: skip
    cache.reserve(k.shape[1] + 4 * page_size)
    padded = []
    for x in (k, v):
        padded.append(x.clone())
        for b, n in enumerate(lengths.tolist()):
            padded[-1][b, n:] = value
    fill_page(cache, slice(None), value)
    poison(cache)
    cache.append(0, *padded, lengths=lengths)
    table, held, tail_k, tail_v = inside(cache)
    used = set()
    for b, h in itertools.product(*(range(n) for n in held.shape)):
        full, rest = divmod(int(held[b, h]), page_size)
        used.update(table[b, h, :full].tolist())
        table[b, h, full:] = garbage
        tail_k[b, h, rest:], tail_v[b, h, rest:] = value, value
    fill_page(cache, [i for i in range(pool_of(cache).shape[0]) if i not in used], value)
    return cache


@pytest.mark.parametrize(("value", "garbage"), [(math.nan, -1), (math.inf, 2**31 - 1), (-math.inf, -(2**31))])
@pytest.mark.parametrize("page_size", [1, 16, 48, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_pages_tails_and_table_entries(dtype, page_size, value, garbage):
    lengths = torch.tensor([4 * page_size + 1, page_size, 0, 3 * page_size - 1, 1])
    k, v = random_kv(5, int(lengths.max()), 2, 24, 40, dtype)
    cache = poisoned(k, v, lengths, page_size, NAME_OF[dtype], value, garbage)
    for new in (1, 3, 100):
        counts = lengths.clamp(max=new)
        q = torch.randn(5, new, 6, 24).to(dtype)
        for b, n in enumerate(counts.tolist()):
            q[b, n:] = value
        for arguments in ({}, {"window_size": (20, -1), "softcap": 5.0, "sinks": torch.randn(6)}):
            out = cache.attend(0, q, lengths=counts, **arguments)
            for b, (n, held) in enumerate(zip(counts.tolist(), lengths.tolist(), strict=True)):
                row = [q[b : b + 1, :n], k[b : b + 1, :held], v[b : b + 1, :held]]
                assert_same_bits(out[b, :n], lcore.attention(*row, causal=True, **arguments)[0], f"row {b}")
                assert not out[b, n:].any()


@pytest.mark.parametrize("formats", itertools.product(DTYPE_OF, DTYPE_OF), ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_memory_of_every_format(dtype, formats):
    """Against a cache without poison; K and V of a page are padded to cache lines, which are poison too."""
    k, v = random_kv(2, 75, 2, 5, 3, dtype)
    lengths = torch.tensor([75, 20])
    q = torch.randn(2, 9, 4, 5).to(dtype)
    clean = poisoned(k, v, lengths, 16, formats, 0.0, 0)
    for value in POISONS:
        cache = poisoned(k, v, lengths, 16, formats, value, -1)
        assert_same_bits(cache.attend(0, q), clean.attend(0, q))
        assert_same_bits(cache.attend(0, q[:, -1:]), clean.attend(0, q[:, -1:]))


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_far_left_of_the_window(dtype, value):
    """What they hold was appended as it should be, and is out of every row's sight."""
    k, v = random_kv(1, 4096 + 2 * FAR, 2, 16, dtype=dtype)
    q = torch.randn(1, 70, 6, 16).to(dtype)
    want = {n: lcore.attention(q[:, -n:], k, v, causal=True, window_size=(90, -1)) for n in (1, 5, 70)}
    k[:, :4096], v[:, :4096] = value, value
    cache = lcore.PagedCache(1, 2, 16, dtype=dtype, kv_format=NAME_OF[dtype], page_size=64)
    cache.append(0, k, v)
    for n, rows in want.items():
        assert_same_bits(cache.attend(0, q[:, -n:], window_size=(90, -1)), rows, f"{n} rows")
