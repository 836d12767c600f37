"""PagedCache.key_mass and the lse of PagedCache.attend: the same as over contiguous keys, whatever the pages."""

import math

import pytest
import torch
from cache_cases import DTYPE_OF, NAME_OF, Twins, inside, poison, random_kv
from test_cache_ops import ATTEND, attend_arguments
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

ops = torch.ops.lcore
ARGUMENTS = {"window_size": (70, -1), "softmax_scale": 0.4, "softcap": 4.0}


def queries(cache, new, group=2):
    heads = cache.num_kv_heads * group
    return torch.randn(cache.batch_size, new, heads, cache.head_dim).to(cache.dtype)


def check(twins, new, lengths=None, group=2, layer=0, reduction="sum", **arguments):
    """Against the formula on the tokens that the model cache holds."""
    q = queries(twins.cache, new, group)
    _, lse = twins.cache.attend(layer, q, lengths, **arguments, return_lse=True)
    arguments.pop("sinks", None)
    got = twins.cache.key_mass(layer, q, lse, lengths, reduction=reduction, **arguments)
    held = twins.cache.lengths(layer)
    assert got.shape == (*held.shape, int(held.max())) and got.dtype == torch.float32
    slopes = arguments.pop("alibi_slopes", None)
    for b, row in enumerate(twins.model.tokens[layer]):
        n = new if lengths is None else int(lengths[b])
        for h, (k, _) in enumerate(row):
            heads = slice(h * group, (h + 1) * group)
            one = {**arguments, "causal": True, "reduction": reduction}
            one["alibi_slopes"] = None if slopes is None else slopes.expand(held.shape[0], -1)[b, heads]
            inputs = (q[b : b + 1, :n, heads], k[None, :, None], lse[b : b + 1, heads, :n])
            want = reference.key_mass(*(x.double() for x in inputs), **one)
            working = reference.key_mass(*(x.float() for x in inputs), **one)
            mine = got[b : b + 1, h : h + 1]
            assert_close(mine[..., : len(k)], want, working, f"row {b}, head {h}", slack_ulp=16)
            assert not mine[..., len(k) :].any()
    return got


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("page_size", [1, 16, 64, 100])
@pytest.mark.parametrize("dtype", NAME_OF)
def test_values(dtype, page_size, reduction):
    twins = Twins(batch_size=2, head_dim=24, page_size=page_size, dtype=dtype)
    for new in (1, 15, 70, 200):
        twins.append(new)
        for arguments in ({}, ARGUMENTS, {**ARGUMENTS, "alibi_slopes": torch.rand(2, 4), "sinks": torch.zeros(4)}):
            check(twins, new, reduction=reduction, **arguments)
        check(twins, 1, reduction=reduction)


@pytest.mark.parametrize("k_format", DTYPE_OF)
@pytest.mark.parametrize("group", [1, 4, 6])
def test_formats_and_groups(k_format, group):
    twins = Twins(kv_format=(k_format, "bf16"), dtype=torch.bfloat16, head_dim=40, head_dim_v=8, page_size=16)
    twins.append(600)
    for new in (1, 3, 90):
        check(twins, new, group=group)


@pytest.mark.parametrize("dtype", NAME_OF)
def test_the_same_bits_as_over_contiguous_keys(dtype):
    """With pages in the keys' own type; 5000 tokens for one query, where few rows are read in another way."""
    for held, new in ((300, 300), (300, 64), (5000, 1)):
        k, v = random_kv(2, held, 2, 16, dtype=dtype)
        cache = lcore.PagedCache(1, 2, 16, batch_size=2, dtype=dtype, kv_format=NAME_OF[dtype])
        cache.append(0, k, v)
        q = queries(cache, new)
        out, lse = cache.attend(0, q, **ARGUMENTS, return_lse=True)
        want, want_lse = lcore.attention(q, k, v, causal=True, **ARGUMENTS, return_lse=True)
        assert_same_bits(out, want)
        assert_same_bits(lse, want_lse)
        want = lcore.key_mass(q, k, lse, causal=True, **ARGUMENTS)
        assert_same_bits(cache.key_mass(0, q, lse, **ARGUMENTS), want)


def test_padded_rows():
    twins = Twins(batch_size=3, page_size=16)
    twins.append(50, lengths=torch.tensor([50, 3, 20]))
    counts = torch.tensor([30, 0, 7])
    twins.append(30, lengths=counts)
    _, lse = twins.cache.attend(0, queries(twins.cache, 30), counts, return_lse=True)
    assert lse[1].isneginf().all() and lse[2, :, 7:].isneginf().all() and lse[2, :, :7].isfinite().all()
    mass = check(twins, 30, lengths=counts)
    torch.testing.assert_close(mass.sum(-1), torch.tensor([60.0, 0.0, 14.0])[:, None].expand(3, 2))
    assert_same_bits(check(twins, 30, lengths=counts.int(), reduction="max")[1], torch.zeros(2, 80))


def test_tails_only_empty_caches_forks_and_crops():
    twins = Twins(layers=2, batch_size=2, page_size=64)
    assert twins.cache.key_mass(1, queries(twins.cache, 0), torch.zeros(2, 4, 0)).shape == (2, 2, 0)
    twins.append(9)
    check(twins, 4, layer=1)
    twins.append(180)
    fork = twins.fork()
    fork.append(5)
    twins.crop(torch.tensor([130, 64]))
    for one in (twins, fork):
        check(one, 30, layer=1)


def ragged(held, dtype=torch.float32):
    """Arguments of the op for a cache whose heads hold different numbers of tokens."""
    arguments = attend_arguments(dtype, held=40, new=3)
    arguments["pool"].view(dtype).normal_()
    arguments["kv_lengths"] = torch.tensor(held, dtype=torch.int32)
    del arguments["sinks"]
    return arguments


def with_lse(arguments, width=40, reduction="sum"):
    _, lse = ops.attention_paged(**arguments, sinks=None)
    return {**arguments, "lse": lse, "reduction": reduction, "width": width}


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_heads_of_unequal_length(reduction):
    """Each head is as if it were alone, and the row ends with zeros."""
    held = [[40, 3], [0, 17]]
    arguments = ragged(held)
    mass = ops.key_mass_paged(**with_lse(arguments, reduction=reduction))
    assert mass.shape == (2, 2, 40)
    for b in range(2):
        for h in range(2):
            n = held[b][h]
            alone = {**arguments, "kv_lengths": torch.full((2, 2), n, dtype=torch.int32)}
            want = ops.key_mass_paged(**with_lse(alone, n, reduction))
            assert want.shape == (2, 2, n)
            assert_same_bits(mass[b, h, :n], want[b, h])
            assert not mass[b, h, n:].any()


def test_threads(threads):
    arguments = with_lse(ragged([[40, 3], [0, 17]], torch.bfloat16))
    want = ops.key_mass_paged(**arguments)
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        assert_same_bits(ops.key_mass_paged(**arguments), want)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_held_is_not_read(value):
    twins = Twins(batch_size=2, page_size=16)
    twins.append(75)
    q = queries(twins.cache, 20)
    _, lse = twins.cache.attend(0, q, return_lse=True)
    want = twins.cache.key_mass(0, q, lse)
    poison(twins.cache)
    inside(twins.cache)[2][:, :, 75 % 16 :] = value
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, 3), value=value)
    assert_same_bits(twins.cache.key_mass(0, q, lse), want)
    more = torch.nn.functional.pad(lse, (0, 3), value=value)
    assert_same_bits(twins.cache.key_mass(0, padded, more, torch.tensor([20, 20])), want)


@pytest.mark.parametrize("dtype", NAME_OF)
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 0])])
def test_opcheck(lengths, dtype):
    arguments = with_lse({**ragged([[40, 3], [0, 17]], dtype), "lengths": lengths})
    torch.library.opcheck(ops.key_mass_paged.default, tuple(arguments.values()))


BAD = [case for case in ATTEND if case[0] != "sinks"] + [
    ("lse", lambda x: x[..., :1], "lse must"),
    ("lse", lambda x: x.double(), "lse must"),
    ("lse", lambda x: x.transpose(1, 2), "lse must"),
    ("reduction", lambda x: "mean", "reduction must be sum or max, got mean"),
    ("width", lambda x: 39, "width must be at least the longest head's 40 tokens, got 39"),
    ("width", lambda x: -1, "width must"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_arguments_of_the_op_are_errors(name, change, message):
    arguments = with_lse(ragged([[40, 40], [40, 40]]))
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        ops.key_mass_paged(**{**arguments, name: change(arguments[name])})


def test_errors():
    twins = Twins(page_size=16)
    twins.append(20)
    cache, q, lse = twins.cache, queries(twins.cache, 3), torch.zeros(1, 4, 3)
    for arguments, error, message in (
        ((1, q, lse), ValueError, r"layer must be an integer in \[0, 0\], got 1"),
        ((0, q.double(), lse), TypeError, "q must have dtype float32, got float64"),
        ((0, q[:, :, :3], lse), ValueError, "q must have heads a positive multiple of num_kv_heads 2, got 3"),
        ((0, q, lse[..., :2]), ValueError, r"lse must have shape \(batch, heads, new\) = \(1, 4, 3\), got \(1, 4, 2\)"),
        ((0, q, lse.double()), TypeError, "lse must have dtype float32, got float64"),
        ((0, queries(cache, 21), torch.zeros(1, 4, 21)), ValueError, r"q must have at most the \[20\] tokens held"),
        ((0, q, lse, torch.tensor([4])), ValueError, r"lengths must lie in \[0, 3\], got \[4\]"),
    ):
        with pytest.raises(error, match=r"lcore\.PagedCache\.key_mass: " + message):
            cache.key_mass(*arguments)
    with pytest.raises(ValueError, match='reduction must be "sum" or "max", got \'mean\''):
        cache.key_mass(0, q, lse, reduction="mean")
    cache.close()
    with pytest.raises(ValueError, match=r"lcore\.PagedCache\.key_mass: the cache must be open"):
        cache.key_mass(0, q, lse)
