"""lcore.rope: exact phases at any distance, every layout, gradients."""

import math
from fractions import Fraction

import pytest
import torch
from attention_cases import FLOATS
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

# 60 digits: more than any phase below needs, so the reduction to one turn is exact.
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494")
HEAD_DIM = 64


def frequencies(half=HEAD_DIM // 2, base=10000.0):
    return base ** (-torch.arange(half, dtype=torch.float32) / half)


def exact_phase(position, inv_freq):
    """position * inv_freq modulo a turn, in [-pi, pi], from exact fractions."""
    turns = Fraction(position) * Fraction(inv_freq) / (2 * PI)
    return float((turns - round(turns)) * 2 * PI)


def unit_phases(positions, inv_freq, **arguments):
    """The phases that rope turned by, read off rotated unit vectors: x = 1, y = 0 becomes cos, sin."""
    x = torch.zeros(len(positions), 1, 2 * len(inv_freq))
    x[..., : len(inv_freq)] = 1
    turned = lcore.rope(x, positions, inv_freq, **arguments)[:, 0].double()
    cosine, sine = turned.tensor_split(2, dim=-1)
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones_like(cosine), rtol=0, atol=1e-6)
    return torch.atan2(sine, cosine)


POSITIONS = [0, 1, 2**11 + 1, 2**17, 2**20, 10**7, 10**7 + 1, -3, -(10**7), 2**31 + 5]


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor(POSITIONS),
        torch.tensor(POSITIONS[:-1], dtype=torch.int32),
        torch.tensor([*POSITIONS, 0.25, 1048576.75, -9999999.5], dtype=torch.float64),
        torch.tensor([0.0, 0.5, -3.25, 2.0**17, 1048576.5, 1e7]),
    ],
    ids=["int64", "int32", "float64", "float32"],
)
@pytest.mark.parametrize("freq_dtype", [torch.float32, torch.float64])
def test_phases_are_exact_to_a_millionth(positions, freq_dtype):
    inv_freq = frequencies().to(freq_dtype)
    got = unit_phases(positions, inv_freq)
    want = torch.tensor([[exact_phase(p, f) for f in inv_freq.tolist()] for p in positions.tolist()]).double()
    error = (got - want + math.pi).remainder(2 * math.pi) - math.pi
    assert error.abs().max() <= 1e-6, f"{error.abs().max():.2e} at {error.abs().argmax()}"


def test_float32_products_would_fail_that_bound():
    positions, inv_freq = torch.tensor([10**7]), frequencies()
    product = positions.float()[:, None] * inv_freq
    want = torch.tensor([[exact_phase(10**7, f) for f in inv_freq.tolist()]])
    error = (product - want + math.pi).remainder(2 * math.pi) - math.pi
    assert error.abs().max() > 0.1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(2, 1), (64, 32), (64, 16), (80, 37), (7, 3), (5, 0), (128, 64)])
def test_values(head_dim, half, interleaved, dtype):
    x = torch.randn(2, 67, 3, head_dim).to(dtype)
    positions = torch.randint(-100, 1 << 20, (67,))
    inv_freq = frequencies(half) if half else torch.empty(0)
    arguments = {"interleaved": interleaved, "attention_scaling": 1.3}
    got = lcore.rope(x, positions, inv_freq, **arguments)
    want = reference.rope(x.double(), positions, inv_freq, **arguments)
    assert got.dtype == dtype and got.is_contiguous()
    slack_ulp = 1 << 22 if dtype == torch.float64 else None  # of a phase of 2^20 radians
    assert_close(got, want, reference.rope(x, positions, inv_freq, **arguments), slack_ulp=slack_ulp)
    assert_same_bits(got[..., 2 * half :], x[..., 2 * half :], "dims behind the rotary ones pass")


def test_scaling_leaves_passing_dims_alone():
    x = torch.ones(3, 1, 6)
    got = lcore.rope(x, torch.zeros(3, dtype=torch.int64), frequencies(2), attention_scaling=2.0)
    assert torch.equal(got[0, 0], torch.tensor([2.0, 2.0, 2.0, 2.0, 1.0, 1.0]))


def test_the_two_pairings_are_one_permutation():
    x = torch.randn(9, 2, 8)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # dims (m, m + 4) side by side
    halves = lcore.rope(x, torch.arange(9), frequencies(4))
    assert_same_bits(lcore.rope(x[..., order], torch.arange(9), frequencies(4), interleaved=True), halves[..., order])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_turns_back(interleaved, dtype):
    x = torch.randn(2, 50, 3, 24).to(dtype)
    positions = torch.arange(50) * 199_999
    there = lcore.rope(x, positions, frequencies(10), interleaved=interleaved)
    back = lcore.rope(there, positions, frequencies(10), interleaved=interleaved, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=16 * torch.finfo(dtype).eps)
    opposite = lcore.rope(there, -positions, frequencies(10), interleaved=interleaved)
    torch.testing.assert_close(opposite, back, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, HEAD_DIM), torch.randn(1, 1, 1, HEAD_DIM)
    scores = []
    for start in (0, 1 << 20, 10**7):
        q_turned = lcore.rope(q, torch.tensor([start + 77]), frequencies())
        scores.append((q_turned * lcore.rope(k, torch.tensor([start]), frequencies())).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=0, atol=3e-5)


def test_positions_of_each_batch_row():
    x = torch.randn(3, 130, 2, 16)
    positions = torch.randint(0, 1 << 20, (3, 130))
    got = lcore.rope(x, positions, frequencies(8))
    for row in range(3):
        assert_same_bits(got[row], lcore.rope(x[row], positions[row], frequencies(8)), f"row {row}")
    strided = torch.stack([positions, positions], dim=-1)[..., 0]
    assert_same_bits(lcore.rope(x, strided, frequencies(8)), got)
    shared = lcore.rope(x, positions[0], frequencies(8))
    assert_same_bits(lcore.rope(x, positions[:1].expand(3, 130), frequencies(8)), shared)


def test_strided_inputs():
    memory = torch.full((2, 3, 2, 40, 20), math.nan)
    x = memory[:, :, 1, :, 2:18].transpose(1, 2)
    x.copy_(torch.randn(x.shape))
    want = lcore.rope(x.contiguous(), torch.arange(40), frequencies(8))
    assert_same_bits(lcore.rope(x, torch.arange(40), frequencies(8)), want)
    want = lcore.rope(x[..., ::2].contiguous(), torch.arange(40), frequencies(8)[::2].contiguous())
    assert_same_bits(lcore.rope(x[..., ::2], torch.arange(40), frequencies(8)[::2]), want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradient_is_the_inverse_rotation(inverse, dtype):
    x = torch.randn(2, 20, 3, 24).to(dtype).requires_grad_()
    dout = torch.randn(2, 20, 3, 24).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    arguments = {"attention_scaling": 0.7, "interleaved": True}
    out = lcore.rope(x, torch.arange(20), frequencies(10), inverse=inverse, **arguments)
    (got,) = torch.autograd.grad(out, x, dout)
    want = lcore.rope(dout, torch.arange(20), frequencies(10), inverse=not inverse, **arguments)
    assert_same_bits(got, want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    x = torch.randn(2, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    call = lambda x: torch.ops.lcore.rope(x, torch.tensor([0, 5, 10**7]), frequencies(3), 1.2, interleaved)  # noqa: E731
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4), (0, 2, 4)])
def test_empty(shape):
    assert lcore.rope(torch.zeros(shape), torch.arange(shape[-3]), frequencies(2)).shape == shape


def test_threads_and_neighbours_do_not_change_bits(threads):
    x, positions = torch.randn(2, 200, 3, 24), torch.arange(200) + 10**6
    whole = lcore.rope(x, positions, frequencies(12))
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        assert_same_bits(lcore.rope(x, positions, frequencies(12)), whole)
    for token in (0, 63, 64, 199):
        alone = lcore.rope(x[:, token : token + 1], positions[token : token + 1], frequencies(12))
        assert_same_bits(alone, whole[:, token : token + 1])


def error_cases():
    x, positions, inv_freq = torch.zeros(2, 3, 4, 8), torch.arange(3), torch.ones(4)
    good = {"x": x, "positions": positions, "inv_freq": inv_freq}
    return [
        pytest.param({**good, **change}, error, message, id=message[:60])
        for change, error, message in [
            ({"x": 1}, TypeError, "x must be a torch.Tensor, got int"),
            ({"x": x.int()}, TypeError, "x must have dtype float32 or float64 or float16 or bfloat16, got int32"),
            (
                {"x": x[0, 0]},
                ValueError,
                "x must have shape (batch, seq, heads, head_dim) or (tokens, heads, head_dim), got (4, 8)",
            ),
            (
                {"positions": positions.half()},
                TypeError,
                "positions must have dtype int64 or int32 or float32 or float64, got float16",
            ),
            ({"positions": torch.arange(4)}, ValueError, "positions must have shape (3,) or (2, 3), got (4,)"),
            ({"positions": positions.expand(5, 3)}, ValueError, "positions must have shape (3,) or (2, 3), got (5, 3)"),
            ({"x": x[0], "positions": positions[None]}, ValueError, "positions must have shape (3,), got (1, 3)"),
            ({"positions": positions.to("meta")}, ValueError, "positions must be on device cpu, got meta"),
            ({"inv_freq": inv_freq.half()}, TypeError, "inv_freq must have dtype float32 or float64, got float16"),
            ({"inv_freq": inv_freq[None]}, ValueError, "inv_freq must have shape (rotary_dim / 2,) = (*,), got (1, 4)"),
            ({"inv_freq": torch.ones(5)}, ValueError, "inv_freq must have at most head_dim / 2 = 4 entries, got 5"),
            ({"attention_scaling": math.inf}, ValueError, "attention_scaling must be a finite number, got inf"),
        ]
    ]


@pytest.mark.parametrize(("arguments", "error", "message"), error_cases())
def test_errors(arguments, error, message):
    with pytest.raises(error) as info:
        lcore.rope(**arguments)
    assert str(info.value) == f"lcore.rope: {message}"
