"""lcore.rwkv7 against its recurrence, the delta rule as a case of it, and what must not change its bits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from linear_attention_cases import FLOATS, LENGTHS, check, gradients, offsets, random_state, run
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def random_rwkv(shape, key_dim=9, value_dim=17, *, heads=2, strength=0.6, dtype=torch.float32, sequences=None):
    """As a model has them: w > -0.61, a = -kk, b = eta kk; with an initial state where `sequences` are given."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    one = (*shape, heads, key_dim)
    kk = F.normalize(torch.randn(one, dtype=wide), dim=-1)
    inputs = {
        "r": torch.randn(one).to(dtype),
        "w": -strength * torch.rand(one, dtype=wide),
        "k": torch.randn(one).to(dtype),
        "v": torch.randn(*shape, heads, value_dim).to(dtype),
        "a": (-kk).to(dtype),
        "b": (kk * torch.rand(one, dtype=wide)).to(dtype),
    }
    if sequences is not None:
        inputs["initial_state"] = random_state({"q": inputs["r"], "v": inputs["v"]}, sequences)
    return inputs


def tokens(inputs, which):
    return {name: x[:, which] for name, x in inputs.items() if name != "initial_state"}


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length):
    check("rwkv7", random_rwkv((2, length), sequences=2), floor=4.0)


@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (40, 100), (17, 128), (256, 17)])
def test_head_dims(dims):
    check("rwkv7", random_rwkv((1, 70), *dims, sequences=1), floor=4.0, scale=0.3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype):
    check("rwkv7", random_rwkv((1, 70), dtype=dtype, sequences=1), floor=4.0)


@pytest.mark.parametrize("strength", [0.0, 50.0])
def test_no_decay_and_strong_decay(strength):
    check("rwkv7", random_rwkv((1, 100), strength=strength, sequences=1), floor=10.0)


def test_a_decay_of_zero():
    inputs = random_rwkv((1, 130), sequences=1)
    inputs["w"][:, ::7] = -50.0
    inputs["w"][:, 3::11] = -math.inf
    check("rwkv7", inputs, floor=4.0)


def test_long_keys_let_the_state_grow():
    inputs = random_rwkv((1, 70))
    inputs["b"] = inputs["b"] * -1.2
    check("rwkv7", inputs, floor=1e3)


@pytest.mark.parametrize("use", [(True, False), (False, True)])
def test_gradient_of_one_result_only(use):
    check("rwkv7", random_rwkv((1, 90), sequences=1), use=use, floor=4.0)


def test_packed_sequences():
    lengths = [5, 0, 1, 64, 70, 2]
    inputs = random_rwkv((sum(lengths) + 3,), sequences=len(lengths))
    out, state = check("rwkv7", inputs, cu_seqlens=offsets(lengths), floor=4.0)
    assert not out[-3:].any()
    assert_same_bits(state[1], inputs["initial_state"][1])


def test_the_delta_rule_is_a_case_of_it():
    """a = -beta e^g k and b = k write what the delta rule writes."""
    inputs = random_rwkv((2, 150), sequences=2, dtype=torch.float64)
    k, v, w = F.normalize(inputs["k"], dim=-1), inputs["v"], inputs["w"]
    beta = torch.rand(v.shape[:-1], dtype=torch.float64)
    state = inputs["initial_state"]
    want = lcore.gated_delta_rule(inputs["r"], k, v, w, beta, scale=1.0, initial_state=state)
    a = -beta[..., None] * w.exp() * k
    got = lcore.rwkv7(inputs["r"], w, k, beta[..., None] * v, a, k, initial_state=state)
    torch.testing.assert_close(got, want)


def test_a_token_at_a_time_and_pieces():
    inputs = random_rwkv((2, 150), sequences=2)
    want, last = run(lcore, "rwkv7", inputs)
    exact = run(reference, "rwkv7", {name: x.double() for name, x in inputs.items()})
    for cuts, same in (([0, 64, 128, 150], True), ([0, 50, 51, 150], False)):
        state, outs = inputs["initial_state"], []
        for begin, end in itertools.pairwise(cuts):
            out, state = run(lcore, "rwkv7", tokens(inputs, slice(begin, end)), initial_state=state)
            outs.append(out)
        got = torch.cat(outs, 1)
        if same:
            assert_same_bits(got, want)
            assert_same_bits(state, last)
        assert_close(got, exact[0], want, "pieces", slack_ulp=16, floor=4.0)
    stepped = inputs["initial_state"].clone()
    outs = [lcore.rwkv7_update(stepped, **tokens(inputs, t)) for t in range(150)]
    assert_close(torch.stack(outs, 1), exact[0], want, "out", slack_ulp=16, floor=4.0)
    assert_close(stepped, exact[1], last, "state", slack_ulp=16, floor=4.0)


def test_update_by_slots():
    inputs = tokens(random_rwkv((3, 1)), 0)
    states = random_state({"q": inputs["r"], "v": inputs["v"]}, 5)
    want_states, got_states = states[[4, 1, 0]].clone(), states.clone()
    want = lcore.rwkv7_update(want_states, **inputs)
    got = lcore.rwkv7_update(got_states, **inputs, state_indices=torch.tensor([4, -1, 0]))
    assert_same_bits(got[[0, 2]], want[[0, 2]])
    assert not got[1].any()
    for slot, row in ((4, want_states[0]), (0, want_states[2]), (1, states[1]), (2, states[2]), (3, states[3])):
        assert_same_bits(got_states[slot], row)


def test_threads_and_strides(threads):
    inputs = random_rwkv((1, 150), 40, 100, sequences=1)
    grads = (torch.randn_like(inputs["v"]), torch.randn_like(inputs["initial_state"]))
    views = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    results = []
    for n, tensors in ((1, inputs), (2, inputs), (7, inputs), (1, views)):
        torch.set_num_threads(n)
        results.append([*run(lcore, "rwkv7", tensors), *gradients(lcore, "rwkv7", tensors, grads).values()])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("at", [0, 15, 16, 63, 64, 99])
@pytest.mark.parametrize("name", ["r", "w", "k", "v", "a", "b"])
def test_a_token_never_reaches_those_before_it(at, name):
    inputs = random_rwkv((1, 100))
    want, _ = run(lcore, "rwkv7", inputs)
    poisoned = {key: x.clone() for key, x in inputs.items()}
    poisoned[name][:, at, 0, 0] = math.nan
    got, _ = run(lcore, "rwkv7", poisoned)
    assert_same_bits(got[:, :at], want[:, :at])
    assert_same_bits(got[:, :, 1], want[:, :, 1], "the other head")
    if at > 0 or name not in "wab":  # the first token meets no state
        assert got[:, at, 0].isnan().any()


def test_nan_in_one_packed_sequence_reaches_no_other():
    lengths = [70, 5, 66]
    inputs = random_rwkv((sum(lengths),), sequences=3)
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name, x in poisoned.items():
        (x[1] if name == "initial_state" else x[72]).fill_(math.nan)
    grads = (torch.randn_like(inputs["v"]), torch.randn_like(inputs["initial_state"]))
    others = [*range(70), *range(75, sum(lengths))]
    want, got = (gradients(lcore, "rwkv7", x, grads, cu_seqlens=offsets(lengths)) for x in (inputs, poisoned))
    for name, x in got.items():
        keep = [0, 2] if name == "initial_state" else others
        assert_same_bits(x[keep], want[name][keep], f"gradient of {name}")


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    inputs = random_rwkv((7,) if packed else (2, 5), 3, 2, heads=1, dtype=torch.float64, sequences=3 if packed else 2)
    cu_seqlens = offsets([3, 0, 4]) if packed else None

    def call(*values):
        return torch.ops.lcore.rwkv7(**dict(zip(inputs, values, strict=True)), scale=0.7, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()])


def test_gradcheck_over_chunks():
    inputs = random_rwkv((1, 67), 2, 1, heads=1, dtype=torch.float64)

    def call(*values):
        return torch.ops.lcore.rwkv7(**dict(zip(inputs, values, strict=True)))[0][:, -1]

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()])


def test_opcheck_and_compile():
    inputs = random_rwkv((2, 5), 3, 2, sequences=2)
    torch.library.opcheck(torch.ops.lcore.rwkv7.default, (), {name: x.requires_grad_() for name, x in inputs.items()})
    torch.compiler.reset()
    state, step = inputs["initial_state"].detach(), {name: x.detach() for name, x in tokens(inputs, 0).items()}
    torch.library.opcheck(torch.ops.lcore.rwkv7_update.default, (state.clone(),), step)
    compiled = torch.compile(lcore.rwkv7, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(**inputs), lcore.rwkv7(**inputs))
    want, got = state.clone(), state.clone()
    update = torch.compile(lcore.rwkv7_update, fullgraph=True, backend="aot_eager")
    assert_same_bits(update(got, **step), lcore.rwkv7_update(want, **step))
    assert_same_bits(got, want)


def test_errors():
    inputs = random_rwkv((2, 5))
    shapes = r"\(batch, len, heads, key_dim\) = \(2, 5, 2, 9\)"
    for change, error, message in (
        ({"w": inputs["w"][..., 0]}, ValueError, rf"w must have shape {shapes}, got \(2, 5, 2\)"),
        ({"a": inputs["a"].half()}, TypeError, "a must have dtype float32, got float16"),
        ({"b": inputs["b"][:, :4]}, ValueError, rf"b must have shape {shapes}, got \(2, 4, 2, 9\)"),
        ({"v": inputs["v"].repeat(1, 1, 2, 1)}, ValueError, "v must have the 2 heads of r, got 4"),
    ):
        with pytest.raises(error, match=rf"lcore\.rwkv7: {message}"):
            lcore.rwkv7(**{**inputs, **change})
    r, w, k, v, a, b = inputs.values()
    with pytest.raises(RuntimeError, match="b must have v's dtype, tokens and heads"):
        torch.ops.lcore.rwkv7(r, w, k, v, a, b[:, :4])
