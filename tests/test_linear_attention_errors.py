"""Bad arguments of the ops of linear attention: one clear error, before any work."""

import pytest
import torch
from linear_attention_cases import offsets, random_inputs, random_state
from test_ssd import random_ssd

import lcore


def attention_errors():
    good = random_inputs("gated_linear_attention", (2, 5), 4, 6, heads=2, heads_v=4)
    q, k, v, g = good.values()
    cu = offsets([2, 3])
    packed = {"q": q[0], "k": k[0], "v": v[0], "g": g[0]}
    shapes = "(heads_v,) = (4,), (batch, len, heads_v) = (2, 5, 4) or (batch, len, heads_v, key_dim) = (2, 5, 4, 4)"
    beside = "float32 or float16 or bfloat16"
    return [
        pytest.param({**good, **change}, error, message, id=message[:60])
        for change, error, message in [
            ({"q": q[0]}, ValueError, "q must have shape (batch, len, heads, key_dim) = (*, *, *, *), got (5, 2, 4)"),
            ({"k": k.half()}, TypeError, "k must have dtype float32, got float16"),
            (
                {"k": k[:, :4]},
                ValueError,
                "k must have shape (batch, len, heads, key_dim) = (2, 5, 2, 4), got (2, 4, 2, 4)",
            ),
            (
                {"v": v[:, :4]},
                ValueError,
                "v must have shape (batch, len, heads_v, value_dim) = (2, 5, *, *), got (2, 4, 4, 6)",
            ),
            ({"v": v[:, :, :3]}, ValueError, "v must have heads a multiple of the 2 of q, got 3"),
            ({"v": v[..., :0]}, ValueError, "the last size of v must lie in [1, 512], got 0"),
            ({"g": g.double()}, TypeError, f"g must have dtype {beside}, got float64"),
            ({"g": g[..., :2]}, ValueError, f"g must have shape {shapes}, got (2, 5, 2)"),
            ({"scale": "one"}, TypeError, "scale must be a finite number, got one"),
            ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
            (
                {"initial_state": torch.zeros(2, 4, 6, 4)},
                ValueError,
                "initial_state must have shape (sequences, heads_v, key_dim, value_dim) = (2, 4, 4, 6),"
                " got (2, 4, 6, 4)",
            ),
            (
                {"initial_state": torch.zeros(2, 4, 4, 6).double()},
                TypeError,
                "initial_state must have dtype float32, got float64",
            ),
            (
                {"cu_seqlens": cu},
                ValueError,
                "q must have shape (tokens, heads, key_dim) = (*, *, *), got (2, 5, 2, 4)",
            ),
            ({**packed, "cu_seqlens": cu.long()}, TypeError, "cu_seqlens must have dtype int32, got int64"),
            ({**packed, "cu_seqlens": cu + 1}, ValueError, "cu_seqlens must begin with 0, got 1"),
            ({**packed, "cu_seqlens": cu * 2}, ValueError, "cu_seqlens must end within 5 tokens, got 10"),
        ]
    ]


@pytest.mark.parametrize(("arguments", "error", "message"), attention_errors())
def test_errors(arguments, error, message):
    with pytest.raises(error) as info:
        lcore.gated_linear_attention(**arguments)
    assert str(info.value) == f"lcore.gated_linear_attention: {message}"


def test_errors_of_the_delta_rule():
    good = random_inputs("gated_delta_rule", (2, 5))
    with pytest.raises(
        ValueError, match=r"beta must have shape \(batch, len, heads_v\) = \(2, 5, 2\), got \(2, 4, 2\)"
    ):
        lcore.gated_delta_rule(**{**good, "beta": good["beta"][:, :4]})
    with pytest.raises(TypeError, match="beta must have dtype float32 or float16 or bfloat16, got int32"):
        lcore.gated_delta_rule(**{**good, "beta": good["beta"].int()})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dt": torch.zeros(2, 5, 3)}, ValueError, "dt must have shape (batch, len, heads) = (2, 5, 4), got (2, 5, 3)"),
        ({"A": torch.zeros(3)}, ValueError, "A must have shape (heads,) = (4,), got (3,)"),
        (
            {"D": torch.zeros(8)},
            ValueError,
            "D must have shape (heads,) = (4,) or (heads, head_dim) = (4, 8), got (8,)",
        ),
        ({"dt_limit": (1, 0)}, ValueError, "dt_limit must be two numbers, the second not below the first, got (1, 0)"),
        ({"dt_limit": 1}, TypeError, "dt_limit must be two numbers, the second not below the first, got 1"),
        ({"dt_softplus": 1}, TypeError, "dt_softplus must be a bool, got 1"),
        ({"z": torch.zeros(2, 5, 4, 8).half()}, TypeError, "z must have dtype float32, got float16"),
    ],
)
def test_errors_of_ssd(change, error, message):
    with pytest.raises(error) as info:
        lcore.ssd(**{**random_ssd((2, 5)), **change})
    assert str(info.value) == f"lcore.ssd: {message}"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"state": torch.zeros(3, 2, 3, 3)},
            ValueError,
            "state must have shape (slots, heads_v, key_dim, value_dim) = (3, 2, 3, 2), got (3, 2, 3, 3)",
        ),
        (
            {"state": torch.zeros(3, 2, 2, 3).transpose(2, 3)},
            ValueError,
            "state must be contiguous, got strides (12, 6, 1, 3)",
        ),
        (
            {"state_indices": torch.tensor([0, 1])},
            ValueError,
            "state_indices must have shape (batch,) = (3,), got (2,)",
        ),
        ({"state_indices": torch.tensor([0, 3, 1])}, ValueError, "state_indices must be below 3 slots, got 3"),
        ({"state_indices": torch.tensor([0, 0, 1])}, ValueError, "state_indices must name no slot twice, got 0"),
    ],
)
def test_errors_of_updates(change, error, message):
    step = random_inputs("gated_linear_attention", (3,), 3, 2, heads=1)
    arguments = {**step, "state": random_state(step, 3), **change}
    before = arguments["state"].clone()
    with pytest.raises(error) as info:
        lcore.gated_linear_attention_update(**arguments)
    assert str(info.value) == f"lcore.gated_linear_attention_update: {message}"
    assert torch.equal(arguments["state"], before)
