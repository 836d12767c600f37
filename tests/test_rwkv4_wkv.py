"""lcore.rwkv4_wkv against its recurrence: values, gradients, keys of any size, and what must not change its bits."""

import itertools
import math

import pytest
import torch
from recurrent_cases import FLOATS, LENGTHS, check, gradients, offsets_of, wide
from tolerance import assert_same_bits

import lcore

pytestmark = pytest.mark.usefixtures("one_thread")


def random_wkv(steps, *, batch=2, dim=19, dtype=torch.float32, lengths=None, size=1.0, state=True):
    """Every argument; with lengths, sequences packed in one row."""
    shape = (batch, steps, dim) if lengths is None else (steps, dim)
    kind = wide(dtype)
    arguments = {
        "w": -torch.rand(dim, dtype=kind),
        "u": torch.randn(dim, dtype=kind),
        "k": (size * torch.randn(shape)).to(dtype),
        "v": torch.randn(shape).to(dtype),
    }
    if state:
        states = torch.randn(batch if lengths is None else len(lengths), 3, dim, dtype=kind)
        states[:, 1] = states[:, 1].abs() + 0.5  # a sum of weights
        arguments["initial_state"] = states
    if lengths is not None:
        arguments["cu_seqlens"] = offsets_of(lengths)
    return arguments


def steps_of(arguments, which):
    return {**arguments, "k": arguments["k"][:, which], "v": arguments["v"][:, which]}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("state", [False, True])
def test_lengths(length, state):
    check("rwkv4_wkv", random_wkv(length, state=state), floor=1.0, slack_ulp=16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [1, 64, 129])
def test_dtypes_and_widths(dtype, dim):
    check("rwkv4_wkv", random_wkv(70, dtype=dtype, dim=dim), floor=1.0 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("size", [0.0, 100.0])
def test_keys_of_any_size(size):
    """With 100, e^k alone would overflow and underflow. aa and bb make good what rounding does to a pp of 300: alone
    they are as far off as pp is, so the gradient is that of out.
    """
    check("rwkv4_wkv", random_wkv(150, size=size), floor=10.0, slack_ulp=16, use=(True, False))


def test_keys_that_rise_and_fall():
    """An ulp of a key of 300 is 3e-5 of its weight."""
    arguments = random_wkv(130, batch=1, dim=2)
    arguments["k"] = torch.linspace(-300, 300, 130)[None, :, None].repeat(1, 1, 2)
    arguments["k"][..., 1] = arguments["k"][..., 0].flip(1)
    check("rwkv4_wkv", arguments, floor=10.0, slack_ulp=64, use=(True, False))


def test_no_decay_and_a_decay_of_zero():
    arguments = random_wkv(100)
    arguments["w"][::2] = 0.0
    check("rwkv4_wkv", arguments, floor=10.0)
    arguments["w"][1::2] = -math.inf
    out = lcore.rwkv4_wkv(**{**arguments, "initial_state": None})
    assert out.isfinite().all()


@pytest.mark.parametrize("use", [(True, False), (False, True)])
def test_gradient_of_one_result_only(use):
    check("rwkv4_wkv", random_wkv(90), use=use, floor=4.0)


def test_packed_sequences():
    lengths = [5, 0, 1, 64, 70, 2]
    arguments = random_wkv(sum(lengths) + 3, lengths=lengths)
    out, state = check("rwkv4_wkv", arguments, floor=1.0)
    assert not out[-3:].any()
    assert_same_bits(state[1], arguments["initial_state"][1])


def test_cuts_and_steps_have_the_same_bits():
    arguments = random_wkv(150)
    want, last = lcore.rwkv4_wkv(**arguments, return_final_state=True)
    state, outs = arguments["initial_state"], []
    for begin, end in itertools.pairwise([0, 1, 50, 128, 150]):
        part = {**steps_of(arguments, slice(begin, end)), "initial_state": state}
        out, state = lcore.rwkv4_wkv(**part, return_final_state=True)
        outs.append(out)
    assert_same_bits(torch.cat(outs, 1), want)
    assert_same_bits(state, last)
    state = arguments.pop("initial_state").clone()
    outs = [lcore.rwkv4_wkv_update(state, **steps_of(arguments, t)) for t in range(150)]
    assert_same_bits(torch.stack(outs, 1), want)
    assert_same_bits(state, last)


def test_update_by_slots():
    arguments = steps_of(random_wkv(1, batch=3), 0)
    states = torch.randn(5, 3, 19)
    del arguments["initial_state"]
    want_states, got_states = states[[4, 1, 0]].clone(), states.clone()
    want = lcore.rwkv4_wkv_update(want_states, **arguments)
    got = lcore.rwkv4_wkv_update(got_states, **arguments, state_indices=torch.tensor([4, -1, 0]))
    assert_same_bits(got[[0, 2]], want[[0, 2]])
    assert not got[1].any()
    for slot, row in ((4, want_states[0]), (0, want_states[2]), (1, states[1]), (2, states[2]), (3, states[3])):
        assert_same_bits(got_states[slot], row)


def test_threads_and_strides(threads):
    arguments = {**random_wkv(150, dim=200), "return_final_state": True}
    views = {**arguments, **{name: arguments[name].mT.contiguous().mT for name in ("k", "v")}}
    douts = [torch.randn_like(x) for x in lcore.rwkv4_wkv(**arguments)]
    results = []
    for n, inputs in ((1, arguments), (2, arguments), (7, arguments), (1, views)):
        torch.set_num_threads(n)
        outs, grads = gradients(lcore.rwkv4_wkv, inputs, douts)
        results.append([*outs, *grads.values()])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_stays_in_its_channel_sequence_and_future(name):
    lengths = [70, 5, 66]
    arguments = random_wkv(sum(lengths), lengths=lengths)
    poisoned = {**arguments, name: arguments[name].clone()}
    poisoned[name][72, 3] = math.nan
    want, got = (lcore.rwkv4_wkv(**x) for x in (arguments, poisoned))
    assert got[72:75, 3].isnan().all()
    clean = torch.ones_like(want, dtype=torch.bool)
    clean[72:75, 3] = False
    assert_same_bits(got[clean], want[clean])


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    lengths = [3, 0, 4] if packed else None
    arguments = random_wkv(7, dim=2, dtype=torch.float64, lengths=lengths)
    cu_seqlens = arguments.pop("cu_seqlens", None)

    def call(*values):
        return torch.ops.lcore.rwkv4_wkv(*values, cu_seqlens)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in arguments.values()])


def test_gradcheck_over_chunks():
    arguments = random_wkv(67, batch=1, dim=1, dtype=torch.float64, state=False)

    def call(*values):
        out, state = torch.ops.lcore.rwkv4_wkv(*values)
        return out[:, -1], state

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in arguments.values()])


def test_opcheck_and_compile():
    arguments = random_wkv(5)
    state = arguments["initial_state"]
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}
    torch.library.opcheck(torch.ops.lcore.rwkv4_wkv.default, tuple(leaves.values()))
    step = {name: x.detach() for name, x in steps_of(arguments, 0).items() if name != "initial_state"}
    states = [state.detach().clone() for _ in range(3)]
    torch.library.opcheck(torch.ops.lcore.rwkv4_wkv_update.default, (states[0], *step.values()))
    torch.compiler.reset()
    compiled = torch.compile(lcore.rwkv4_wkv, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(**leaves), lcore.rwkv4_wkv(**leaves))
    update = torch.compile(lcore.rwkv4_wkv_update, fullgraph=True, backend="aot_eager")
    assert_same_bits(update(states[1], **step), lcore.rwkv4_wkv_update(states[2], **step))
    assert_same_bits(states[1], states[2])


def test_errors():
    arguments = random_wkv(5)
    for change, error, message in (
        (
            {"k": arguments["k"][0]},
            ValueError,
            r"k must have shape \(batch, len, dim\) = \(\*, \*, \*\), got \(5, 19\)",
        ),
        ({"v": arguments["v"].half()}, TypeError, "v must have dtype float32, got float16"),
        ({"w": arguments["w"][:4]}, ValueError, r"w must have shape \(dim,\) = \(19,\), got \(4,\)"),
        ({"u": arguments["u"].double()}, TypeError, "u must have dtype float32 or float16 or bfloat16, got float64"),
        ({"initial_state": torch.zeros(2, 2, 19)}, ValueError, r"initial_state must have shape \(sequences, 3, dim\)"),
    ):
        with pytest.raises(error, match=rf"lcore\.rwkv4_wkv: {message}"):
            lcore.rwkv4_wkv(**{**arguments, **change})
    state, *rest = torch.zeros(2, 3, 19), *(arguments[name] for name in ("w", "u")), *arguments["k"], arguments["v"][0]
    with pytest.raises(ValueError, match=r"v must have shape \(batch, dim\) = \(5, 19\), got"):
        lcore.rwkv4_wkv_update(state, rest[0], rest[1], rest[2], rest[4][:2])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        leaf = arguments["k"].requires_grad_()
        (grad,) = torch.autograd.grad(lcore.rwkv4_wkv(**arguments).sum(), leaf, create_graph=True)
        torch.autograd.grad(grad.sum(), leaf)
