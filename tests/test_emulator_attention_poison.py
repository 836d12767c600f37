"""What a row may not see, NaN or infinity, changes no bit of what the emulated CUDA kernels of attention make of it."""

import math

import pytest
import torch
from attention_cases import FLOATS, everything, gradients, lcore_with_lse, random_packed, random_qkv
from emulated import cuda_kernels
from test_attention_invisible import MASKS, bad_keys, seeing
from test_attention_poison import LAYOUTS, assert_same, call
from tolerance import assert_same_bits

POISONS = (math.nan, math.inf)
SHAPE = (70, 70)  # two tiles of rows without tensor cores, two blocks of keys with them


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_kernels("attention", "attention_backward"):
        yield


def inputs(dtype, seq_q, seq_k, heads=2):
    return random_qkv(seq_q, seq_k, heads=heads, kv_heads=heads // 2, head_dim=8, dtype=dtype)


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_one_bad_key(which, dtype, value):
    """Its rows show it, as the formula says; all others have the bits that they had."""
    for mask in MASKS if dtype == torch.bfloat16 else ("window",):
        arguments = MASKS[mask][0]
        for seq_q, seq_k, key, blind in bad_keys(mask, SHAPE):
            q, k, v = inputs(dtype, seq_q, seq_k, heads=4 if "everything" in mask else 2)
            want_out, want_lse = lcore_with_lse(q, k, v, **arguments)
            {"k": k, "v": v}[which][:, key] = value
            out, lse = lcore_with_lse(q, k, v, **arguments)
            assert_same_bits(out[:, blind], want_out[:, blind], mask)
            assert_same_bits(lse[:, :, blind], want_lse[:, :, blind], f"lse, {mask}")
            if which == "v":
                shown = out[:, ~blind]
                assert (shown.isnan() if math.isnan(value) else shown == value).all() and lse.isfinite().all()


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
def test_gradients_beside_one_bad_row_or_key(which, dtype, value):
    """dq of the rows, dk and dv of the keys that do not meet it."""
    mask = "causal window"
    arguments = MASKS[mask][0]
    q, k, v = inputs(dtype, *SHAPE)
    dout = torch.randn_like(q)
    want = gradients(lcore_with_lse, q, k, v, dout, None, arguments)
    at = 40
    {"q": q, "k": k, "v": v, "dout": dout}[which][:, at] = value
    found = gradients(lcore_with_lse, q, k, v, dout, None, arguments)
    sees = seeing(mask, *SHAPE)
    if which in "kv":
        rows = ~sees[:, at]
        keys = ~(sees & sees[:, at : at + 1]).any(dim=0)
    else:
        rows = torch.arange(SHAPE[0]) != at
        keys = ~sees[at]
    assert rows.any() and keys.any()
    assert_same_bits(found["q"][:, rows], want["q"][:, rows], "dq")
    for name in "kv":
        assert_same_bits(found[name][:, keys], want[name][:, keys], f"d{name}")
    if which == "dout":  # and the keys that do meet it show it
        shown = found["v"][:, sees[at]]
        assert (shown.isnan() if math.isnan(value) else shown == value).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gaps_between_strides(layout, dtype):
    place = LAYOUTS[layout]
    for seq_q, seq_k, dim, dim_v in ((5, 66, 40, 59), (1, 9, 3, 16)):
        q, k, v = random_qkv(seq_q, seq_k, heads=2, head_dim=dim, head_dim_v=dim_v, dtype=dtype)
        dout = torch.randn(1, seq_q, 2, dim_v).to(dtype)
        want = call(q, k, v, dout, causal=True)
        assert_same(call(*(place(x, math.nan) for x in (q, k, v, dout)), causal=True), want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_neighbours_and_tails(dtype):
    """Sequence 1 and the tail are NaN; 0 and 2 read up to their borders and no further."""
    lengths_q, lengths_k = [33, 9, 20], [40, 30, 20]
    q, k, v, offsets = random_packed(lengths_q, lengths_k, 11, heads=2, head_dim=8, dtype=dtype)
    dout = torch.randn_like(q)
    arguments = {**everything(2, rows=3), **offsets, "sinks": None}
    want = call(q, k, v, dout, **arguments)
    ends_q, ends_k = (x.tolist() for x in offsets.values())
    for x, ends in ((q, ends_q), (dout, ends_q), (k, ends_k), (v, ends_k)):
        x[ends[1] : ends[2]], x[ends[3] :] = math.nan, math.nan
    out, lse, dq, dk, dv = call(q, k, v, dout, **arguments)
    for i in (0, 2):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        got = (out[rows], lse[:, rows], dq[rows], dk[keys], dv[keys])
        assert_same(got, (want[0][rows], want[1][:, rows], want[2][rows], want[3][keys], want[4][keys]), f"{i}:")
    assert not out[ends_q[3] :].any() and lse[:, ends_q[3] :].isneginf().all()
