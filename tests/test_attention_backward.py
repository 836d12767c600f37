"""Gradients of lcore.attention against those of the float64 formula."""

import math

import pytest
import torch
from attention_cases import (
    FLOATS,
    GROUPS,
    HALVES,
    HEAD_DIM_PAIRS,
    HEAD_DIMS,
    SIZES,
    WINDOWS,
    check_backward,
    everything,
    gradients,
    lcore_with_lse,
    random_packed,
    random_qkv,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_same_bits

import lcore


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_sizes_round_the_tiles(seq_q, seq_k, causal):
    check_backward(*random_qkv(seq_q, seq_k, batch=2, heads=3), causal=causal)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    check_backward(*random_qkv(67, 131, head_dim=head_dim, dtype=dtype), causal=True)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIM_PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_another_head_dim(head_dim, head_dim_v, dtype):
    q, k, v = random_qkv(67, 131, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    check_backward(q, k, v, causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_grouped_heads_with_every_argument(heads, kv_heads, dtype):
    q, k, v = random_qkv(130, 200, batch=2, heads=heads, kv_heads=kv_heads, dtype=dtype)
    check_backward(q, k, v, **everything(heads))
    check_backward(q, k, v, **everything(heads, rows=2), with_lse=False)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 300), (200, 300), (300, 140)])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window, seq_q, seq_k):
    check_backward(*random_qkv(seq_q, seq_k), window_size=window)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_softcap_has_its_slope_before_alibi_and_mask(alibi, dtype):
    q, k, v = random_qkv(70, 150, dtype=dtype)
    slopes = torch.tensor([0.3, 0.01]) if alibi else None
    check_backward(q * 4, k, v, softcap=2.0, alibi_slopes=slopes, causal=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sinks_learn(dtype):
    q, k, v = random_qkv(60, 40, heads=4, kv_heads=2, dtype=dtype)
    found = check_backward(q, k, v, sinks=torch.tensor([0.0, -math.inf, -20.0, 5.0]), causal=True)
    assert found["sinks"][1] == 0
    sinks = torch.randn(4).to(torch.bfloat16)
    found = gradients(lcore_with_lse, q, k, v, torch.ones_like(q), None, {"sinks": sinks})
    assert found["sinks"].dtype == torch.bfloat16


def test_a_sink_of_infinity_takes_the_gradient_of_lse():
    """lse = ln(e^inf + ...) moves as the sink moves; out stays 0."""
    q, k, v = (x.requires_grad_() for x in random_qkv(5, 7, heads=1))
    sinks = torch.tensor([math.inf], requires_grad=True)
    out, lse = lcore.attention(q, k, v, sinks=sinks, return_lse=True)
    dlse = torch.randn_like(lse)
    *dqkv, dsinks = torch.autograd.grad([out, lse], [q, k, v, sinks], [torch.randn_like(out), dlse])
    assert not any(x.any() for x in dqkv)
    torch.testing.assert_close(dsinks, dlse.sum().reshape(1))


def test_gradient_through_lse_alone():
    q, k, v = random_qkv(50, 80)
    arguments = {"causal": True}
    zero = gradients(lcore_with_lse, q, k, v, torch.zeros_like(q), torch.ones(1, 2, 50), arguments)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    lse = lcore.attention(*leaves, **arguments, return_lse=True)[1]
    dq, dk, dv = torch.autograd.grad(lse.sum(), leaves, allow_unused=True)
    assert_same_bits(dq, zero["q"])
    assert_same_bits(dk, zero["k"])
    assert not dv.any()


@pytest.mark.parametrize("arguments", [{"causal": True}, {"window_size": (3, 2)}, {"causal": True, "softcap": 2.0}])
def test_rows_without_keys_have_no_gradient(arguments):
    found = check_backward(*random_qkv(333, 100), **arguments)
    assert not found["q"][:, :230].any() and found["q"][:, 233:].any()


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_inputs(shape, sinks):
    batch, seq_q, seq_k = shape
    found = check_backward(*random_qkv(seq_q, seq_k, batch=batch), sinks=torch.randn(2) if sinks else None)
    assert not any(found[name].any() for name in "qkv")


def test_few_keys_under_many_rows_do_not_overflow():
    """Keys that only pad a tile have score 0: e^(0 - lse) would be infinite if they were not masked."""
    q, k, v, offsets = random_packed([76, 34, 146], [1, 1, 1], heads=2, head_dim=64, dtype=torch.float16)
    check_backward(q * 5, k * 3, v, **offsets)
    check_backward(q * 5, -k.abs() * 3, v, **offsets, causal=True)


def test_lse_far_below_zero():
    q, k, v = random_qkv(131, 131)
    q, k = q.abs() * 20, -k.abs() * 20
    for arguments in ({}, {"causal": True}, {"window_size": (2, 2)}):
        check_backward(q, k, v, **arguments)


@pytest.mark.parametrize("layout", ["heads first", "every second", "dims last but one", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_output_gradients(layout, dtype):
    def view(x):
        memory = {
            "heads first": lambda: torch.empty(2, x.shape[2], 70, 24).transpose(1, 2),
            "every second": lambda: torch.full((2, 140, x.shape[2], 24), math.nan)[:, ::2],
            "dims last but one": lambda: torch.empty(2, 70, 24, x.shape[2]).transpose(2, 3),
            "expanded": lambda: torch.empty(1, 70, x.shape[2], 24),
        }[layout]()
        return memory.copy_(x[: memory.shape[0]]).to(dtype, memory_format=torch.preserve_format).expand_as(x)

    q, k, v = (view(x) for x in random_qkv(70, 70, batch=2, heads=6, kv_heads=2, head_dim=24))
    dout = view(torch.randn(2, 70, 6, 24))
    dense = [x.contiguous() for x in (q, k, v, dout)]
    got = gradients(lcore_with_lse, q, k, v, dout, None, {"causal": True})
    want = gradients(lcore_with_lse, *dense, None, {"causal": True})
    for name, x in got.items():
        assert_same_bits(x, want[name], name)


def test_one_number_as_the_gradient_of_everything():
    """sum() and mean() hand back an expanded gradient of stride 0."""
    leaves = [x.requires_grad_() for x in random_qkv(40, 40)]
    got = torch.autograd.grad(lcore.attention(*leaves).sum(), leaves)
    want = torch.autograd.grad(lcore.attention(*leaves), leaves, torch.ones(1, 40, 2, 16))
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize(
    "extra",
    [
        {"causal": True},
        {"window_size": [2, 1], "softcap": 3.0},
        {"alibi": True, "softcap": 2.0},
        {"sinks": True, "causal": True},
    ],
)
def test_gradcheck(extra):
    """Numerical derivatives of the op itself, rows without keys, the sinks and lse included."""
    q, k, v = (x.requires_grad_() for x in random_qkv(7, 5, heads=4, kv_heads=2, head_dim=3, head_dim_v=2,
                                                      dtype=torch.float64))  # fmt: skip
    extra = dict(extra)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if extra.pop("sinks", False) else None
    slopes = torch.rand(4) if extra.pop("alibi", False) else None

    def call(q, k, v, *sinks):
        out, lse = torch.ops.lcore.attention(q, k, v, **extra, alibi_slopes=slopes, sinks=sinks[0] if sinks else None)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v) if sinks is None else (q, k, v, sinks))


def test_gradcheck_packed():
    q, k, v, offsets = random_packed([3, 0, 2], [2, 2, 0], tail=1, heads=2, head_dim=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        out, lse = torch.ops.lcore.attention(q, k, v, causal=True, **offsets)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(call, leaves)


def test_second_derivatives_are_refused():
    leaves = [x.requires_grad_() for x in random_qkv(3, 3)]
    dq, *_ = torch.autograd.grad(lcore.attention(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"lcore\.attention: no second derivative; use lcore\.reference"):
        torch.autograd.grad(dq.sum(), leaves[1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_calls(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 2**31))
    kv_heads, group, batch = draw(1, 2), draw(1, 4), draw(1, 2)
    heads = kv_heads * group
    sizes = {"heads": heads, "kv_heads": kv_heads, "batch": batch}
    dims = {"head_dim": draw(1, 70), "head_dim_v": draw(1, 70)}
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, *HALVES]))
    q, k, v = random_qkv(draw(0, 210), draw(0, 210), **sizes, **dims, dtype=dtype)
    arguments = {"causal": data.draw(st.booleans()), "window_size": (draw(-1, 230), draw(-1, 230))}
    if data.draw(st.booleans()):
        arguments["softcap"] = data.draw(st.floats(0.5, 50))
    if data.draw(st.booleans()):
        arguments["sinks"] = torch.randn(heads) * 3
    if data.draw(st.booleans()):
        arguments["alibi_slopes"] = torch.rand(heads) if data.draw(st.booleans()) else torch.rand(batch, heads)
    check_backward(q, k, v, **arguments, with_lse=data.draw(st.booleans()))
