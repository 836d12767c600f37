"""What a row may not see never reaches it: NaN or infinity there leaves its bits alone, in the same block of keys too.

A weight of 0 is not enough for this: 0 x NaN is NaN. Keys that no row of a product may see must not enter it.
"""

import math

import pytest
import torch
from attention_cases import FLOATS, gradients, lcore_with_lse, random_packed, random_qkv
from cache_cases import NAME_OF, random_kv
from tolerance import assert_same_bits

import lcore

POISONS = (math.nan, math.inf, -math.inf)
# Arguments, and with n queries at the end of m keys, who sees whom: (position of the query, key) -> seen.
MASKS = {
    "causal": ({"causal": True}, lambda at, key: key <= at),
    "window": ({"window_size": (20, 5)}, lambda at, key: (at - 20 <= key) & (key <= at + 5)),
    "causal window": ({"causal": True, "window_size": (33, -1)}, lambda at, key: (at - 33 <= key) & (key <= at)),
    "with everything": (
        {"window_size": (70, 0), "softcap": 3.0, "sinks": torch.zeros(4), "alibi_slopes": torch.ones(4)},
        lambda at, key: (at - 70 <= key) & (key <= at),
    ),
}  # fmt: skip


def seeing(mask, seq_q, seq_k):
    """(seq_q, seq_k) bool."""
    at = torch.arange(seq_q)[:, None] + seq_k - seq_q
    return MASKS[mask][1](at, torch.arange(seq_k))


def bad_keys(mask, *shapes):
    """(seq_q, seq_k, key, rows that do not see the key) for a key that some rows see and others do not."""
    for seq_q, seq_k in shapes:
        rows = ~seeing(mask, seq_q, seq_k)
        some = (rows.any(dim=0) & ~rows.all(dim=0)).nonzero()
        assert some.numel()
        key = int(some[len(some) * 2 // 3])
        yield seq_q, seq_k, key, rows[:, key]


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_one_bad_key(which, mask, dtype, value):
    """Its rows show it (a score of -inf may hide an infinite key); all others have the bits that they had."""
    for seq_q, seq_k, key, blind in bad_keys(mask, (150, 150), (64, 64), (5, 200), (300, 4300)):
        q, k, v = random_qkv(seq_q, seq_k, heads=4, kv_heads=2, dtype=dtype)
        want_out, want_lse = lcore_with_lse(q, k, v, **MASKS[mask][0])
        x = {"k": k, "v": v}[which]
        x[:, key] = value
        out, lse = lcore_with_lse(q, k, v, **MASKS[mask][0])
        assert_same_bits(out[:, blind], want_out[:, blind], f"{seq_q} x {seq_k}")
        assert_same_bits(lse[:, :, blind], want_lse[:, :, blind], f"lse of {seq_q} x {seq_k}")
        if which == "v":
            assert not out[:, ~blind].isfinite().any() and lse.isfinite().all()


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_packed_neighbour(which, dtype, value):
    """Sequences shorter than any block of keys, all but one of them bad."""
    lengths = [3, 20, 1, 17, 64]
    q, k, v, offsets = random_packed(lengths, lengths, heads=4, kv_heads=2, dtype=dtype)
    want_out, want_lse = lcore_with_lse(q, k, v, causal=True, **offsets)
    ends = offsets["cu_seqlens_q"].tolist()
    good = slice(*ends[3:5])
    x = {"k": k, "v": v}[which]
    x[: ends[3]], x[ends[4] :] = value, value
    out, lse = lcore_with_lse(q, k, v, causal=True, **offsets)
    assert_same_bits(out[good], want_out[good])
    assert_same_bits(lse[:, good], want_lse[:, good])


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", tuple(NAME_OF))
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("which", ["k", "v"])
def test_later_tokens_and_tokens_left_of_the_window_in_a_cache(which, page_size, dtype, value):
    held, new, bad_left, bad_right = 150, 40, 60, 140
    k, v = random_kv(1, held, 2, 16, dtype=dtype)
    q = torch.randn(1, new, 4, 16).to(dtype)
    arguments = {"window_size": (60, -1)}
    want = lcore.attention(q, k, v, causal=True, **arguments)
    x = {"k": k, "v": v}[which]
    x[:, bad_left], x[:, bad_right] = value, value
    cache = lcore.PagedCache(1, 2, 16, dtype=dtype, kv_format=NAME_OF[dtype], page_size=page_size)
    cache.append(0, k, v)
    out = cache.attend(0, q, **arguments)
    at = torch.arange(new) + held - new
    blind = (at - 60 > bad_left) & (at < bad_right)
    assert int(blind.sum()) == 19
    assert_same_bits(out[:, blind], want[:, blind])


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_gradients_beside_a_bad_key(which, mask, dtype, value):
    """dq of the rows that do not see it, dk and dv of the keys that only such rows see."""
    arguments = MASKS[mask][0]
    for seq_q, seq_k, key, blind in bad_keys(mask, (150, 150), (5, 200)):
        q, k, v = random_qkv(seq_q, seq_k, heads=4, kv_heads=2, dtype=dtype)
        dout = torch.randn_like(q)
        want = gradients(lcore_with_lse, q, k, v, dout, None, arguments)
        x = {"k": k, "v": v}[which]
        x[:, key] = value
        found = gradients(lcore_with_lse, q, k, v, dout, None, arguments)
        untouched = ~(seeing(mask, seq_q, seq_k) & ~blind[:, None]).any(dim=0)
        assert_same_bits(found["q"][:, blind], want["q"][:, blind], f"dq of {seq_q} x {seq_k}")
        for name in "kv":
            assert_same_bits(found[name][:, untouched], want[name][:, untouched], f"d{name} of {seq_q} x {seq_k}")


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("which", ["q", "dout"])
def test_gradients_beside_a_bad_row(which, mask, dtype, value):
    """dq of all other rows, dk and dv of the keys that it does not see."""
    arguments = MASKS[mask][0]
    for seq_q, seq_k, row in ((150, 150, 70), (5, 200, 1)):
        q, k, v = random_qkv(seq_q, seq_k, heads=4, kv_heads=2, dtype=dtype)
        dout = torch.randn_like(q)
        want = gradients(lcore_with_lse, q, k, v, dout, None, arguments)
        x = {"q": q, "dout": dout}[which]
        x[:, row] = value
        found = gradients(lcore_with_lse, q, k, v, dout, None, arguments)
        others = torch.arange(seq_q) != row
        unseen = ~seeing(mask, seq_q, seq_k)[row]
        assert_same_bits(found["q"][:, others], want["q"][:, others], f"dq of {seq_q} x {seq_k}")
        for name in "kv":
            assert_same_bits(found[name][:, unseen], want[name][:, unseen], f"d{name} of {seq_q} x {seq_k}")
