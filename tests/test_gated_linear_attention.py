"""lcore.gated_linear_attention and lcore.gated_delta_rule against their recurrences: values and gradients."""

import math

import pytest
import torch
from linear_attention_cases import (
    DECAYS,
    FLOATS,
    HEAD_DIMS,
    LENGTHS,
    OPS,
    check,
    gradients,
    offsets,
    random_inputs,
    random_state,
    run,
)
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

pytestmark = pytest.mark.usefixtures("one_thread")
both = pytest.mark.parametrize("op", OPS)
each_decay = pytest.mark.parametrize("decay", DECAYS)


@both
@each_decay
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(op, decay, length):
    inputs = random_inputs(op, (2, length), 8, 12, decay=decay)
    check(op, {**inputs, "initial_state": random_state(inputs, 2)})


@both
@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("dims", HEAD_DIMS)
def test_head_dims(op, decay, dims):
    check(op, random_inputs(op, (1, 70), *dims, decay=decay))


@both
@each_decay
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(op, decay, dtype):
    inputs = random_inputs(op, (1, 70), decay=decay, dtype=dtype)
    check(op, {**inputs, "initial_state": random_state(inputs, 1)}, scale=0.3)


@both
@each_decay
@pytest.mark.parametrize("heads_v", [3, 6, 21])
def test_grouped_heads(op, decay, heads_v):
    check(op, random_inputs(op, (2, 66), 8, 8, heads=3, heads_v=heads_v, decay=decay))


@both
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_more_chunks_than_are_kept_at_once(op, decay):
    """The backward keeps the states of 64 chunks: 4096 tokens."""
    inputs = random_inputs(op, (1, 4096 + 65), 3, 2, heads=1, heads_v=1, decay=decay, dtype=torch.float64)
    cuts = [slice(0, 2048), slice(2048, 4096), slice(4096, None)]
    tensors = {**inputs, "initial_state": random_state(inputs, 1)}
    grads = (torch.randn_like(inputs["v"]), None)
    whole = gradients(lcore, op, tensors, grads)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    state, outs = leaves["initial_state"], []
    for cut in cuts:
        piece = {name: x[:, cut] for name, x in leaves.items() if name != "initial_state"}
        out, state = run(lcore, op, piece, initial_state=state)
        outs.append(out)
    pieces = torch.autograd.grad(torch.cat(outs, 1), list(leaves.values()), grads[0])
    for (name, x), y in zip(whole.items(), pieces, strict=True):
        assert_same_bits(x, y, name)


@both
@each_decay
@pytest.mark.parametrize("strength", [0.0, 50.0])
def test_no_decay_and_strong_decay(op, decay, strength):
    inputs = random_inputs(op, (1, 100), decay=decay, strength=strength)
    check(op, {**inputs, "initial_state": random_state(inputs, 1)}, floor=10.0)


@both
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_strong_and_weak_decay_side_by_side(op, decay):
    """After a token that wipes the state out the next ones must not lose digits to it."""
    inputs = random_inputs(op, (1, 130), decay=decay, strength=0.05)
    inputs["g"][:, ::7] = -50.0
    inputs["g"][:, 3::11] = -math.inf
    check(op, inputs)


@both
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_growth(op, decay):
    inputs = random_inputs(op, (1, 70), decay=decay)
    inputs["g"] = inputs["g"].abs() * 0.5
    check(op, inputs, floor=1e3)


@both
@pytest.mark.parametrize("use", [(True, False), (False, True)])
def test_gradient_of_one_result_only(op, use):
    inputs = random_inputs(op, (1, 90), decay="channel")
    check(op, {**inputs, "initial_state": random_state(inputs, 1)}, use=use)


def test_keys_that_repeat_under_full_strength():
    """Where (I + L)^-1 has its largest entries: beta 2, no decay, every key the same."""
    inputs = random_inputs("gated_delta_rule", (1, 100), strength=0.0)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    check("gated_delta_rule", inputs, floor=1000.0)


@both
@each_decay
def test_packed_sequences(op, decay):
    lengths = [5, 0, 1, 64, 70, 0, 17]
    inputs = random_inputs(op, (sum(lengths) + 3,), decay=decay)
    tensors = {**inputs, "initial_state": random_state(inputs, len(lengths))}
    out, state = check(op, tensors, cu_seqlens=offsets(lengths))
    assert not out[-3:].any()
    assert_same_bits(state[1], tensors["initial_state"][1])


@both
@each_decay
def test_strided_inputs(op, decay):
    inputs = random_inputs(op, (2, 70), heads=2, heads_v=4, decay=decay)
    state = random_state(inputs, 2)
    views = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    views["q"] = torch.stack([inputs["q"]] * 2, dim=-1)[..., 0]
    views["v"] = inputs["v"].transpose(1, 2).contiguous().transpose(1, 2)
    want = run(lcore, op, inputs, initial_state=state)
    got = run(lcore, op, views, initial_state=state.transpose(2, 3).contiguous().transpose(2, 3))
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)


@both
@each_decay
@pytest.mark.parametrize("heads_v", [2, 6])
def test_a_token_at_a_time_is_the_whole(op, decay, heads_v):
    inputs = random_inputs(op, (3, 70), heads=2, heads_v=heads_v, decay=decay)
    state = random_state(inputs, 3)
    want, last = run(reference, op, {name: x.double() for name, x in inputs.items()}, initial_state=state.double())
    working = run(reference, op, inputs, initial_state=state)
    step, states, outs, pieces = getattr(lcore, f"{op}_update"), state.clone(), [], []
    carried = state
    for t in range(70):
        token = {name: x if x.dim() == 1 else x[:, t] for name, x in inputs.items()}
        outs.append(step(states, **token))
        piece = {name: x if x.dim() == 1 else x[:, t : t + 1] for name, x in inputs.items()}
        out, carried = run(lcore, op, piece, initial_state=carried)
        pieces.append(out[:, 0])
    for name, out, state in (("step", outs, states), ("pieces", pieces, carried)):
        assert_close(torch.stack(out, 1), want, working[0], f"{name}: out", floor=1.0)
        assert_close(state, last, working[1], f"{name}: state", floor=1.0)


@both
def test_update_by_slots(op):
    inputs = {name: x[:, 0] for name, x in random_inputs(op, (3, 1)).items()}
    states = random_state(inputs, 5)
    slots = torch.tensor([4, -1, 0])
    step = getattr(lcore, f"{op}_update")
    want_states = states[[4, 1, 0]].clone()
    want = step(want_states, **inputs)
    got_states = states.clone()
    got = step(got_states, **inputs, state_indices=slots)
    assert_same_bits(got[[0, 2]], want[[0, 2]])
    assert not got[1].any()
    for slot, row in ((4, want_states[0]), (0, want_states[2]), (1, states[1]), (2, states[2]), (3, states[3])):
        assert_same_bits(got_states[slot], row)


@both
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(op, shape):
    inputs = random_inputs(op, shape)
    state = random_state(inputs, shape[0])
    out, last = run(lcore, op, inputs, initial_state=state)
    assert out.shape == inputs["v"].shape and torch.equal(last, state)
    assert not run(lcore, op, inputs)[1].any()


def test_long_horizon():
    """100,000 tokens that barely decay: the error stays that of the recurrence in float32."""
    inputs = random_inputs("gated_linear_attention", (1, 100_000), 2, 2, heads=1, heads_v=1, strength=1e-4)
    exact = {name: x.double() for name, x in inputs.items()}
    got, want = run(lcore, "gated_linear_attention", inputs), run(lcore, "gated_linear_attention", exact)
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() < 2e-5 * y.abs().max()
