"""lcore.merge_states: the algebra of attention states."""

import math

import pytest
import torch
from attention_cases import FLOATS, random_qkv
from tolerance import assert_close, assert_same_bits, assert_same_specials

import lcore
from lcore import reference

INF = math.inf


def random_states(shape=(2, 70, 3, 40), dtype=torch.float32, lse_scale=3.0):
    batch, seq, heads, _ = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [torch.randn(shape).to(dtype) for _ in range(2)]
    lses = [torch.randn(batch, heads, seq, dtype=wide) * lse_scale for _ in range(2)]
    return outs[0], lses[0], outs[1], lses[1]


def widened(states):
    return [x.double() for x in states]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [1, 15, 16, 40, 128])
def test_values(head_dim, dtype):
    states = random_states((2, 67, 3, head_dim), dtype)
    got, want = lcore.merge_states(*states), reference.merge_states(*widened(states))
    working = reference.merge_states(*states)
    assert got[0].dtype == dtype and got[1].dtype == states[1].dtype
    for name, x, y, z in zip(("out", "lse"), got, want, working, strict=True):
        assert_close(x, y, z, name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_is_one_row_of_dense(dtype):
    states = random_states((1, 33, 3, 24), dtype)
    dense = lcore.merge_states(*states)
    packed = lcore.merge_states(*(x[0] for x in states))
    for x, y in zip(packed, dense, strict=True):
        assert_same_bits(x, y[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_neutral_on_both_sides(dtype):
    out, lse, zero, _ = random_states(dtype=dtype)
    zero, nothing = torch.zeros_like(zero), torch.full_like(lse, -INF)
    for got in (lcore.merge_states(out, lse, zero, nothing), lcore.merge_states(zero, nothing, out, lse)):
        assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    both = lcore.merge_states(zero, nothing, zero, nothing)
    assert not both[0].any() and both[1].isneginf().all()


def one_state(value, lse):
    return torch.full((1, 1, 1, 2), value), torch.full((1, 1, 1), lse)


@pytest.mark.parametrize(
    ("lse_a", "lse_b", "out", "lse"),
    [
        (INF, 1.0, 3.0, INF),
        (1.0, INF, 5.0, INF),
        (INF, -INF, 3.0, INF),
        (INF, INF, 4.0, INF),  # two infinite masses share
        (1e4, -1e4, 3.0, 1e4),
        (3e38, 3e38, 4.0, 3e38),
        (-1e30, -INF, 3.0, -1e30),
    ],
)
def test_extreme_masses(lse_a, lse_b, out, lse):
    got = lcore.merge_states(*one_state(3.0, lse_a), *one_state(5.0, lse_b))
    assert torch.equal(got[0], torch.full((1, 1, 1, 2), out))
    assert torch.equal(got[1], torch.full((1, 1, 1), lse))


@pytest.mark.parametrize(("lse_a", "lse_b"), [(math.nan, 0.0), (0.0, math.nan), (-INF, math.nan), (math.nan, -INF)])
def test_nan_is_not_hidden(lse_a, lse_b):
    out, lse = lcore.merge_states(*one_state(3.0, lse_a), *one_state(5.0, lse_b))
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cut", [1, 100, 200, 299])
def test_two_halves_make_the_attention_over_all_keys(cut, dtype):
    q, k, v = random_qkv(50, 300, heads=6, kv_heads=2, dtype=dtype)
    parts = [lcore.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(cut), slice(cut, None))]
    want = lcore.attention(q.double(), k.double(), v.double(), return_lse=True)
    out, lse = lcore.merge_states(*parts[0], *parts[1])
    rounded = [(x.double(), y.double()) for x, y in parts]
    working = reference.merge_states(*rounded[0], *rounded[1])
    assert_close(out, want[0], working[0].to(dtype), "out")
    assert_close(lse, want[1], working[1], "lse", slack_ulp=64 if dtype != torch.float64 else None)


def merge_gradients(merge, states, dout, dlse):
    leaves = [x.detach().requires_grad_() for x in states]
    return torch.autograd.grad(merge(*leaves), leaves, [dout.to(states[0].dtype), dlse.to(states[1].dtype)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(dtype):
    states = random_states(dtype=dtype)
    dout, dlse = torch.randn_like(states[0]), torch.randn_like(states[1])
    got = merge_gradients(lcore.merge_states, states, dout, dlse)
    want = merge_gradients(reference.merge_states, widened(states), dout, dlse)
    working = merge_gradients(reference.merge_states, states, dout, dlse)
    for name, *values in zip(("out_a", "lse_a", "out_b", "lse_b"), got, want, working, strict=True):
        assert_close(*values, f"gradient of {name}")


def test_gradients_at_the_neutral_element():
    states = list(random_states((1, 6, 1, 8)))
    states[1][..., :2], states[3][..., 1:3] = -INF, -INF
    states[0][:, :2], states[2][:, 1:3] = 0.0, 0.0
    dout, dlse = torch.randn_like(states[0]), torch.randn_like(states[1])
    got = merge_gradients(lcore.merge_states, states, dout, dlse)
    want = merge_gradients(reference.merge_states, widened(states), dout, dlse)
    for x, y in zip(got, want, strict=True):
        assert_same_specials(x, y)
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
    assert not got[0][:, 1].any() and not got[1][..., 1].any() and not got[3][..., 1].any()


def test_gradcheck():
    states = [x.requires_grad_() for x in random_states((1, 5, 2, 3), torch.float64, lse_scale=1.0)]
    assert torch.autograd.gradcheck(torch.ops.lcore.merge_states, states)


def test_strided_inputs():
    out_a, lse_a, out_b, lse_b = random_states()
    views = (
        out_a.transpose(1, 2).contiguous().transpose(1, 2),
        lse_a.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([out_b, out_b], dim=-1)[..., 0],
        lse_b[..., :1].expand_as(lse_b),
    )
    want = lcore.merge_states(*(x.contiguous() for x in views))
    for x, y in zip(lcore.merge_states(*views), want, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4)])
def test_empty(shape):
    out, lse = lcore.merge_states(*random_states(shape))
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])


def test_threads_do_not_change_bits(threads):
    states = random_states((2, 300, 3, 16))
    dout, dlse = torch.randn_like(states[0]), torch.randn_like(states[1])
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results.append([*lcore.merge_states(*states), *merge_gradients(lcore.merge_states, states, dout, dlse)])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


def error_cases():
    out, lse = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3)
    good = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}
    floats = "float32 or float64 or float16 or bfloat16"
    return [
        pytest.param({**good, **change}, error, message, id=message[:60])
        for change, error, message in [
            ({"out_a": [1]}, TypeError, "out_a must be a torch.Tensor, got list"),
            ({"out_a": out.int()}, TypeError, f"out_a must have dtype {floats}, got int32"),
            (
                {"out_a": out[0, 0]},
                ValueError,
                "out_a must have shape (batch, seq, heads, head_dim) or (tokens, heads, head_dim), got (4, 8)",
            ),
            ({"out_b": out.half()}, TypeError, "out_b must have dtype float32, got float16"),
            (
                {"out_b": out[:, :2]},
                ValueError,
                "out_b must have shape (batch, seq, heads, head_dim) = (2, 3, 4, 8), got (2, 2, 4, 8)",
            ),
            ({"lse_a": lse.double()}, TypeError, "lse_a must have dtype float32, got float64"),
            (
                {"lse_a": lse.transpose(1, 2)},
                ValueError,
                "lse_a must have shape (batch, heads, seq) = (2, 4, 3), got (2, 3, 4)",
            ),
            ({"lse_b": lse[0]}, ValueError, "lse_b must have shape (batch, heads, seq) = (2, 4, 3), got (4, 3)"),
            ({"lse_b": lse.to("meta")}, ValueError, "lse_b must be on device cpu, got meta"),
        ]
    ]


@pytest.mark.parametrize(("arguments", "error", "message"), error_cases())
def test_errors(arguments, error, message):
    with pytest.raises(error) as info:
        lcore.merge_states(**arguments)
    assert str(info.value) == f"lcore.merge_states: {message}"


def test_packed_error_names_the_packed_shape():
    with pytest.raises(ValueError, match=r"lse_a must have shape \(heads, tokens\) = \(4, 3\), got \(3, 4\)"):
        lcore.merge_states(torch.zeros(3, 4, 8), torch.zeros(3, 4), torch.zeros(3, 4, 8), torch.zeros(4, 3))


def test_second_derivatives_are_refused():
    states = [x.requires_grad_() for x in random_states((1, 2, 1, 2))]
    (grad,) = torch.autograd.grad(lcore.merge_states(*states)[0].sum(), states[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative; use lcore\.reference\.merge_states"):
        torch.autograd.grad(grad.sum(), states[1])
