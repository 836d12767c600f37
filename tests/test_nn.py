"""The modules alone: formulas in float64, and rows that do not depend on their company."""

import math

import pytest
import torch

from lcore.nn import Attention, GatedMLP, Linear, RMSNorm, Rotary, silu
from lcore.positions import RopeConfig, rope_frequencies

ROWS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 17, 64, 100, 255)


def across_threads(check):
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [(64, 96), (300, 1000), (1000, 130)])
def test_linear_rows_are_schedule_invariant(sizes):
    torch.manual_seed(0)
    layer = Linear(*sizes)
    x = torch.randn(256, sizes[0])
    with torch.no_grad():
        want = layer(x)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    assert (want - exact).abs().max() < 1e-5

    def check():
        with torch.no_grad():
            for rows in ROWS:
                assert torch.equal(layer(x[:rows]), want[:rows]), rows
                assert torch.equal(layer(x[256 - rows :]), want[256 - rows :]), rows

    across_threads(check)


def test_linear_keeps_shape_and_gradient():
    layer = Linear(8, 6)
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.no_grad():
        assert layer(x).shape == (2, 3, 6)
        assert layer(x[:, :0]).shape == (2, 0, 6)
        torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
        assert layer(x[0, 0]).shape == (6,)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, 3, 8))


def test_silu_bits_do_not_depend_on_the_split():
    torch.manual_seed(0)
    x = torch.randn(300, 1000) * 5
    exact = x.double() * torch.sigmoid(x.double())
    with torch.no_grad():
        want = silu(x)
        assert ((want - exact).abs() <= 4e-7 * exact.abs() + 1e-38).all()
        edges = torch.tensor([-math.inf, -200.0, -0.0, 200.0, math.inf, math.nan])
        torch.testing.assert_close(silu(edges[1:5]), torch.tensor([-0.0, -0.0, 200.0, math.inf]))
        assert silu(edges[5:]).isnan().all()

    def check():
        with torch.no_grad():
            for rows in ROWS:
                assert torch.equal(silu(x[:rows]), want[:rows]), rows

    across_threads(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(200, eps=1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(200))
    x = (torch.randn(4, 5, 200) * 0.1).to(dtype)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    got = norm(x)
    assert got.dtype == dtype
    assert ((got - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_rotary_frequencies_stay_float32():
    rope = RopeConfig(theta=777.0)
    rotary = Rotary(rope, 16).to(torch.bfloat16).half().double()
    assert torch.equal(rotary.inv_freq, rope_frequencies(rope, 16)[0])
    assert "inv_freq" not in rotary.state_dict()
    x = torch.randn(1, 5, 2, 16)
    positions = torch.arange(5) * 1000
    turned = Rotary(rope, 16)(x, positions)
    torch.testing.assert_close(Rotary(rope, 16)(turned, positions, inverse=True), x)


def attention_float64(layer, x, window):
    """softmax(q k^T / sqrt(d)) v with an explicit mask, every head on its own."""
    layer, x = layer.double(), x.double()
    dim, seq = layer.head_dim, x.shape[1]
    heads = (*x.shape[:2], -1, dim)
    q, k, v = layer.q_proj(x).view(heads), layer.k_proj(x).view(heads), layer.v_proj(x).view(heads)
    if layer.q_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if layer.rotary is not None:
        angle = torch.arange(seq).double()[:, None] * layer.rotary.inv_freq.double()
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def turn(y):
            a, b = y.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        q, k = turn(q), turn(k)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    gap = torch.arange(seq)[:, None] - torch.arange(seq)
    hidden = (gap < 0) | (gap >= (window or seq))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(dim)
    out = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
    return layer.o_proj(out.flatten(2))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "options"),
    [
        (4, None, {}),
        (4, 2, {"rope": RopeConfig(theta=100.0)}),
        (6, 1, {"rope": RopeConfig(), "window": 5, "bias": True, "qk_norm_eps": 1e-6}),
        (2, 2, {"window": 1, "output_bias": True}),
    ],
)
def test_attention_alone(heads, kv_heads, options):
    torch.manual_seed(0)
    layer = Attention(48, heads, kv_heads, 16, **options)
    x = torch.randn(2, 23, 48) * 3
    got = layer(x)
    want = attention_float64(layer, x, options.get("window"))
    torch.testing.assert_close(got, want.float(), rtol=0, atol=2e-5)


def test_attention_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="num_heads") as caught:
        Attention(48, 4, 3)
    assert str(caught.value) == "lcore.nn.Attention: num_heads must be a multiple of num_kv_heads, got 4 and 3"
    with pytest.raises(ValueError, match="window") as caught:
        Attention(48, 4, window=0)
    assert str(caught.value) == "lcore.nn.Attention: window must be positive or None, got 0"
    with pytest.raises(ValueError, match="x must") as caught:
        Attention(48, 4)(torch.randn(3, 48))
    assert str(caught.value) == "lcore.nn.Attention: x must have shape (batch, seq, hidden_size), got (3, 48)"


def test_mlp():
    torch.manual_seed(0)
    mlp = GatedMLP(24, 40, bias=True)
    x = torch.randn(3, 7, 24)
    inner = mlp.gate_proj(x)
    want = mlp.down_proj(inner * torch.sigmoid(inner) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), want)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), want)
