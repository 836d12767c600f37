"""The CUDA kernels of lcore.attention's backward, emulated: gradients against those of the float64 formula."""

import math

import attention_cases
import pytest
import torch
from attention_cases import (
    FLOATS,
    HALVES,
    check_backward,
    everything,
    gradients,
    lcore_with_lse,
    random_packed,
    random_qkv,
)
from emulated import cuda_kernels
from test_emulator_attention import PACKINGS
from tolerance import assert_same_bits

import lcore


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setattr(attention_cases, "multiplies_in", lambda dtype: dtype in HALVES)  # as tensor cores do
    with cuda_kernels("attention", "attention_backward"):
        yield


# 64 keys, or rows, against 64 of the other side, 32 where head_dim is above 64.
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (1, 65), (63, 65), (65, 64), (130, 33)])
@pytest.mark.parametrize("head_dim", [8, 72])
def test_sizes_round_the_tiles(seq_q, seq_k, head_dim):
    check_backward(*random_qkv(seq_q, seq_k, heads=1, head_dim=head_dim, dtype=torch.bfloat16), causal=True)
    check_backward(*random_qkv(seq_q, seq_k, heads=1, head_dim=head_dim, dtype=torch.bfloat16))


@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (65, 66)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_round_the_tiles_without_tensor_cores(seq_q, seq_k, dtype):
    check_backward(*random_qkv(seq_q, seq_k, heads=1, head_dim=3, dtype=dtype), causal=True)


@pytest.mark.parametrize("dims", [(1, 1), (40, 59), (128, 128), (129, 17), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", HALVES)
def test_head_dims(dims, dtype):
    q, k, v = random_qkv(17, 40, head_dim=dims[0], head_dim_v=dims[1], dtype=dtype)
    check_backward(q, k, v, causal=True)


@pytest.mark.parametrize(
    ("dims", "dtype"), [((5, 129), torch.float32), ((260, 3), torch.bfloat16), ((3, 300), torch.float16)]
)
def test_head_dims_without_tensor_cores(dims, dtype):
    q, k, v = random_qkv(3, 5, heads=1, head_dim=dims[0], head_dim_v=dims[1], dtype=dtype)
    check_backward(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_grouped_heads_with_every_argument(dtype):
    q, k, v = random_qkv(20, 34, batch=2, heads=4, kv_heads=2, head_dim=8, dtype=dtype)
    check_backward(q, k, v, **{**everything(4), "window_size": (20, -1)})
    check_backward(q, k, v, **everything(4, rows=2), with_lse=False)


@pytest.mark.parametrize("window", [(0, 0), (5, 3), (70, 0), (-1, 66)])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(70, 140), (140, 70)])
def test_windows(window, seq_q, seq_k):
    check_backward(*random_qkv(seq_q, seq_k, heads=1, dtype=torch.float16), window_size=window)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_softcap_has_its_slope_before_alibi_and_mask(alibi, dtype):
    q, k, v = random_qkv(9, 20, head_dim=8, dtype=dtype)
    slopes = torch.tensor([0.3, 0.01]) if alibi else None
    check_backward(q * 4, k, v, softcap=2.0, alibi_slopes=slopes, causal=True)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales(scale, dtype):
    check_backward(*random_qkv(9, 20, head_dim=8, dtype=dtype), softmax_scale=scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sinks_learn(dtype):
    """Heads enough for a mean: out is rounded to dtype, and a sink's gradient to what that leaves of it."""
    q, k, v = random_qkv(30, 20, heads=24, kv_heads=2, head_dim=8, dtype=dtype)
    sinks = torch.tensor([0.0, -math.inf, -20.0, 5.0, *torch.randn(20)])
    found = check_backward(q, k, v, sinks=sinks, causal=True)
    assert found["sinks"][1] == 0


def test_a_sink_of_infinity_takes_the_gradient_of_lse():
    q, k, v = (x.requires_grad_() for x in random_qkv(5, 7, heads=1, dtype=torch.bfloat16))
    sinks = torch.tensor([math.inf], requires_grad=True)
    out, lse = lcore.attention(q, k, v, sinks=sinks, return_lse=True)
    dlse = torch.randn_like(lse)
    *dqkv, dsinks = torch.autograd.grad([out, lse], [q, k, v, sinks], [torch.randn_like(out), dlse])
    assert not any(x.any() for x in dqkv)
    torch.testing.assert_close(dsinks, dlse.sum().reshape(1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_without_keys_have_no_gradient(dtype):
    found = check_backward(*random_qkv(90, 20, heads=1, head_dim=8, dtype=dtype), causal=True)
    assert not found["q"][:, :69].any() and found["q"][:, 73:].any()


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_inputs(shape, sinks):
    q, k, v = random_qkv(shape[1], shape[2], batch=shape[0], dtype=torch.bfloat16)
    found = check_backward(q, k, v, sinks=torch.randn(2) if sinks else None)
    assert not any(found[name].any() for name in "qkv")


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed(name, dtype):
    lengths_q, lengths_k = PACKINGS[name]
    if dtype == torch.float32:  # without tensor cores the emulator is slow
        lengths_q, lengths_k = [min(n, 66) for n in lengths_q], [min(n, 30) for n in lengths_k]
    q, k, v, offsets = random_packed(lengths_q, lengths_k, 5, heads=2, head_dim=8, dtype=dtype)
    found = check_backward(q, k, v, **{**everything(2, len(lengths_q)), "window_size": (30, -1)}, **offsets)
    assert not found["q"][sum(lengths_q) :].any() and not found["k"][sum(lengths_k) :].any()


def test_few_keys_under_many_rows_do_not_overflow():
    """Keys that only pad a tile have score 0: e^(0 - lse) would be infinite if they were not masked."""
    q, k, v, offsets = random_packed([76, 34], [1, 1], heads=2, head_dim=64, dtype=torch.float16)
    check_backward(q * 5, -k.abs() * 3, v, **offsets, causal=True)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_products_beyond_float16(head_dim):
    """dP and delta are about 1e6, the largest float16 is 65504; all gradients fit."""
    q, k, v = random_qkv(70, 100, head_dim=head_dim, dtype=torch.float16)
    dout = torch.randn(1, 70, 2, head_dim).to(torch.float16) * 300
    found = check_backward(q * 1e-3, k * 1e-3, v * 300, dout=dout, causal=True)
    assert all(x.isfinite().all() and x.any() for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_output_gradients(dtype):
    def view(x):
        return torch.full((2, 18, x.shape[2], 24), math.nan, dtype=dtype)[:, ::2, :, 3:19].copy_(x)

    q, k, v = (view(x) for x in random_qkv(9, 9, batch=2, heads=4, kv_heads=2))
    dout = view(torch.randn(2, 9, 4, 16))
    got = gradients(lcore_with_lse, q, k, v, dout, None, {"causal": True})
    want = gradients(lcore_with_lse, *(x.contiguous() for x in (q, k, v, dout)), None, {"causal": True})
    for name, x in got.items():
        assert_same_bits(x, want[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_twice_the_same_and_whatever_stands_beside_it(dtype):
    q, k, v = random_qkv(70, 70, batch=2, heads=2, head_dim=8, dtype=dtype)
    dout = torch.randn_like(q)
    arguments = {"causal": True, "sinks": torch.randn(2)}
    first = gradients(lcore_with_lse, q, k, v, dout, None, arguments)
    again = gradients(lcore_with_lse, q, k, v, dout, None, arguments)
    alone = gradients(lcore_with_lse, q[1:], k[1:], v[1:], dout[1:], None, arguments)
    for name, x in first.items():
        assert_same_bits(x, again[name], name)
        if name != "sinks":
            assert_same_bits(x[1:], alone[name], name)
