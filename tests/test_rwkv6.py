"""lcore.rwkv6 against its recurrence, and what its bonus must not change."""

import math

import pytest
import torch
from linear_attention_cases import DECAYS, FLOATS, LENGTHS, check, gradients, offsets, random_inputs, random_state, run
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def random_rwkv(shape, *sizes, sequences=None, **settings):
    """With an initial state where `sequences` are given."""
    inputs = random_inputs("gated_linear_attention", shape, *sizes, **settings)
    u = torch.randn(inputs["v"].shape[-2], inputs["q"].shape[-1], dtype=inputs["g"].dtype)
    more = {} if sequences is None else {"initial_state": random_state(inputs, sequences)}
    return {"r": inputs.pop("q"), **inputs, "u": u, **more}


def tokens(inputs, which):
    """Those tokens alone; u and a constant decay have none."""
    return {name: x if name == "u" or x.dim() == 1 else x[:, which] for name, x in inputs.items()}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(decay, length):
    check("rwkv6", random_rwkv((2, length), 8, 12, decay=decay, sequences=2))


@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (40, 100), (17, 128)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_head_dims_and_dtypes(dims, dtype):
    check("rwkv6", random_rwkv((1, 70), *dims, decay="channel", dtype=dtype), scale=0.3)


@pytest.mark.parametrize("heads_v", [3, 12])
def test_grouped_heads(heads_v):
    check("rwkv6", random_rwkv((2, 66), 8, 8, heads=3, heads_v=heads_v, decay="channel"))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strength", [0.0, 50.0])
def test_no_decay_and_strong_decay(decay, strength):
    check("rwkv6", random_rwkv((1, 100), decay=decay, strength=strength, sequences=1), floor=10.0)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_sequences(decay):
    lengths = [5, 0, 1, 64, 70]
    check("rwkv6", random_rwkv((sum(lengths) + 3,), decay=decay, sequences=5), cu_seqlens=offsets(lengths))


@pytest.mark.parametrize("decay", DECAYS)
def test_a_token_at_a_time_and_pieces(decay):
    inputs = random_rwkv((2, 150), 9, 17, decay=decay)
    state = random_state({"q": inputs["r"], "v": inputs["v"]}, 2)
    want, last = run(lcore, "rwkv6", inputs, initial_state=state)
    exact = run(reference, "rwkv6", {name: x.double() for name, x in inputs.items()}, initial_state=state.double())
    first, carried = run(lcore, "rwkv6", tokens(inputs, slice(128)), initial_state=state)
    second, carried = run(lcore, "rwkv6", tokens(inputs, slice(128, None)), initial_state=carried)
    assert_same_bits(torch.cat([first, second], 1), want)
    assert_same_bits(carried, last)
    stepped = state.clone()
    outs = [lcore.rwkv6_update(stepped, **tokens(inputs, t)) for t in range(150)]
    assert_close(torch.stack(outs, 1), exact[0], want, "out", slack_ulp=16, floor=4.0)
    assert_close(stepped, exact[1], last, "state", slack_ulp=16, floor=1.0)


def test_threads(threads):
    inputs = random_rwkv((1, 150), 40, 100, heads_v=4, decay="channel", sequences=1)
    grads = (torch.randn_like(inputs["v"]), torch.randn_like(inputs["initial_state"]))
    results = []
    for n in (1, 2, 7):
        torch.set_num_threads(n)
        results.append([*run(lcore, "rwkv6", inputs), *gradients(lcore, "rwkv6", inputs, grads).values()])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("at", [0, 15, 16, 63, 64, 99])
@pytest.mark.parametrize("name", ["r", "k", "v", "g"])
def test_a_token_never_reaches_those_before_it(at, name):
    """Nor does its own decay reach itself."""
    inputs = random_rwkv((1, 100), 9, 17, decay="channel")
    want, _ = run(lcore, "rwkv6", inputs)
    poisoned = {key: x.clone() for key, x in inputs.items()}
    poisoned[name][:, at, 0, 0] = math.nan
    got, _ = run(lcore, "rwkv6", poisoned)
    clean = at + 1 if name == "g" else at
    assert_same_bits(got[:, :clean], want[:, :clean])
    assert got[:, at, 0].isnan().any() == (name != "g")


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(decay, packed):
    settings = {"heads": 1, "heads_v": 2, "decay": decay, "dtype": torch.float64}
    inputs = random_rwkv((7,) if packed else (2, 5), 3, 2, sequences=3 if packed else 2, **settings)
    cu_seqlens = offsets([3, 0, 4]) if packed else None

    def call(*values):
        return torch.ops.lcore.rwkv6(**dict(zip(inputs, values, strict=True)), cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()])


def test_opcheck():
    inputs = random_rwkv((2, 5), 3, 2, sequences=2, decay="channel")
    torch.library.opcheck(torch.ops.lcore.rwkv6.default, (), {name: x.requires_grad_() for name, x in inputs.items()})


def test_errors():
    inputs = random_rwkv((2, 5))
    message = r"lcore\.rwkv6: u must have shape \(heads_v, key_dim\) = \(2, 16\), got \(16,\)"
    with pytest.raises(ValueError, match=message):
        lcore.rwkv6(**{**inputs, "u": inputs["u"][0]})
    with pytest.raises(TypeError, match=r"lcore\.rwkv6: k must have dtype float32, got float16"):
        lcore.rwkv6(**{**inputs, "k": inputs["k"].half()})
