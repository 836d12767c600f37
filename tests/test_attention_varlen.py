"""Packed sequences: each must be what it is alone, whatever stands beside it."""

import math

import pytest
import torch
from attention_cases import (
    FLOATS,
    check_backward,
    check_forward,
    everything,
    gradients,
    lcore_with_lse,
    random_packed,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_same_bits

import lcore

# (lengths of queries, lengths of keys)
PACKINGS = {
    "one": ([131], [131]),
    "several": ([1, 200, 65, 97], [129, 130, 65, 300]),
    "empty first": ([0, 70, 20], [0, 90, 20]),
    "empty middle": ([70, 0, 20], [90, 0, 20]),
    "empty last": ([70, 20, 0], [90, 20, 0]),
    "all empty": ([0, 0, 0], [0, 0, 0]),
    "no queries": ([0, 60, 0], [50, 60, 3]),
    "no keys": ([50, 60, 3], [0, 60, 0]),
    "more queries than keys": ([200, 140], [7, 130]),
    "single tokens": ([1] * 40, [1] * 40),
    "single tokens and gaps": ([1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 5, 2]),
}


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("tail", [0, 37])
def test_values(name, tail):
    q, k, v, offsets = random_packed(*PACKINGS[name], tail, heads=6, kv_heads=2)
    sequences = len(PACKINGS[name][0])
    for arguments in ({}, {"causal": True}, {"window_size": (20, 9)}, everything(6), everything(6, sequences)):
        check_forward(q, k, v, **arguments, **offsets)


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("tail", [0, 37])
def test_gradients(name, tail):
    q, k, v, offsets = random_packed(*PACKINGS[name], tail, heads=6, kv_heads=2)
    for arguments in ({"causal": True}, {"window_size": (20, 9)}, everything(6, len(PACKINGS[name][0]))):
        found = check_backward(q, k, v, **arguments, **offsets)
        used = sum(PACKINGS[name][0])
        assert not found["q"][used:].any(), "the tail has no gradient"


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype):
    sizes = {"heads": 3, "kv_heads": 3, "head_dim": 40, "head_dim_v": 24}
    q, k, v, offsets = random_packed(*PACKINGS["several"], 5, **sizes, dtype=dtype)
    check_forward(q, k, v, **everything(3, 4), **offsets)
    check_backward(q, k, v, **everything(3, 4), **offsets)


def test_a_packing_without_sequences():
    q, k, v, _ = random_packed([5], [5])
    none = torch.zeros(1, dtype=torch.int32)
    out, lse = lcore.attention(q, k, v, cu_seqlens_q=none, cu_seqlens_k=none, return_lse=True)
    assert not out.any() and lse.isneginf().all()


def test_the_tail_is_neutral():
    q, k, v, offsets = random_packed([3, 4], [3, 4], tail=5)
    out, lse = lcore.attention(q, k, v, **offsets, return_lse=True, sinks=torch.ones(2))
    assert not out[7:].any() and lse[:, 7:].isneginf().all()


@pytest.mark.parametrize("causal", [False, True])
def test_each_sequence_has_the_bits_it_has_alone(causal):
    lengths_q, lengths_k = [3, 97, 0, 193, 1], [3, 130, 8, 260, 4200]
    q, k, v, offsets = random_packed(lengths_q, lengths_k, heads=3)
    arguments = {"causal": causal, "sinks": torch.randn(3), "softcap": 3.0}
    slopes = torch.rand(5, 3)
    out, lse = lcore.attention(q, k, v, **arguments, **offsets, alibi_slopes=slopes, return_lse=True)
    dout = torch.randn_like(out)
    found = gradients(lcore_with_lse, q, k, v, dout, None, {**arguments, **offsets, "alibi_slopes": slopes})
    ends_q, ends_k = (x.tolist() for x in offsets.values())
    for i in range(5):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        alone = [x[None] for x in (q[rows], k[keys], v[keys])]
        extra = {**arguments, "alibi_slopes": slopes[i]}
        one_out, one_lse = lcore.attention(*alone, **extra, return_lse=True)
        assert_same_bits(out[rows], one_out[0], f"out of sequence {i}")
        assert_same_bits(lse[:, rows], one_lse[0], f"lse of sequence {i}")
        one = gradients(lcore_with_lse, *alone, dout[rows][None], None, extra)
        assert_same_bits(found["q"][rows], one["q"][0], f"dq of sequence {i}")
        assert_same_bits(found["k"][keys], one["k"][0], f"dk of sequence {i}")
        assert_same_bits(found["v"][keys], one["v"][0], f"dv of sequence {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_of_a_neighbour_or_the_tail_does_not_spread(dtype):
    q, k, v, offsets = random_packed([100, 30, 100], [100, 30, 100], tail=9, dtype=dtype)
    clean = lcore.attention(q, k, v, causal=True, **offsets, return_lse=True)
    dout = torch.randn_like(clean[0])
    clean_grads = gradients(lcore_with_lse, q, k, v, dout, None, {"causal": True, **offsets})
    for x in (q, k, v, dout):
        x[100:130], x[230:] = math.nan, math.nan
    out, lse = lcore.attention(q, k, v, causal=True, **offsets, return_lse=True)
    found = gradients(lcore_with_lse, q, k, v, dout, None, {"causal": True, **offsets})
    assert not out[230:].any() and lse[:, 230:].isneginf().all() and not found["q"][230:].any()
    for part in (slice(0, 100), slice(130, 230)):
        assert_same_bits(out[part], clean[0][part])
        assert_same_bits(lse[:, part], clean[1][:, part])
        for name in "qkv":
            assert_same_bits(found[name][part], clean_grads[name][part], f"gradient of {name}")


def test_strided_packed_inputs():
    memory = torch.full((90, 12, 40), math.nan)
    packed = memory[..., 3:35:2]
    packed.copy_(torch.randn(packed.shape))
    q, k, v = packed.split([6, 3, 3], dim=1)
    cu = torch.tensor([0, 40, 40, 81], dtype=torch.int32)
    offsets = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    want = lcore.attention(q.contiguous(), k.contiguous(), v.contiguous(), **offsets)
    assert_same_bits(lcore.attention(q, k, v, **offsets), want)
    check_backward(q, k, v, **offsets, causal=True)


def test_longest_lengths_do_not_change_the_result():
    q, k, v, offsets = random_packed([3, 40], [9, 50])
    want = lcore.attention(q, k, v, **offsets)
    assert_same_bits(lcore.attention(q, k, v, **offsets, max_seqlen_q=40, max_seqlen_k=1 << 20), want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_packings(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    lengths = st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 150))
    pairs = data.draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5))
    q, k, v, offsets = random_packed(
        [a for a, _ in pairs], [b for _, b in pairs], data.draw(st.integers(0, 3)), heads=4, kv_heads=2, head_dim=8
    )
    window = data.draw(st.tuples(st.integers(-1, 160), st.integers(-1, 160)))
    arguments = {"causal": data.draw(st.booleans()), "window_size": window}
    if data.draw(st.booleans()):
        arguments["alibi_slopes"] = torch.rand(len(pairs), 4)
    if data.draw(st.booleans()):
        arguments["sinks"] = torch.randn(4)
    check_forward(q, k, v, **arguments, **offsets)
    check_backward(q, k, v, **arguments, **offsets)
