"""lcore.causal_conv1d as torch sees it, and what it refuses."""

import pytest
import torch
from test_causal_conv1d import random_conv
from tolerance import assert_same_bits

import lcore

ops = torch.ops.lcore
pytestmark = pytest.mark.usefixtures("one_thread")


def positional(arguments, **change):
    values = {**arguments, "silu": arguments["activation"] is not None, **change}
    inputs = [values.get(name) for name in ("x", "weight", "bias", "silu", "initial_state", "cu_seqlens")]
    return [v.detach().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]


SAMPLES = [
    pytest.param(positional(random_conv(7)), id="plain"),
    pytest.param(positional(random_conv(7, dtype=torch.float64, channel_last=True), bias=None), id="channel last"),
    pytest.param(positional(random_conv(0, lengths=[3, 0, 5], dtype=torch.bfloat16)), id="packed"),
    pytest.param(positional(random_conv(2, width=1), initial_state=None), id="width 1"),
]


@pytest.mark.parametrize("inputs", SAMPLES)
def test_opcheck(inputs):
    torch.library.opcheck(ops.causal_conv1d.default, inputs)
    out, state = ops.causal_conv1d(*inputs)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    arguments = (torch.randn_like(out), torch.randn_like(state), *inputs)
    torch.library.opcheck(ops.causal_conv1d_backward.default, arguments)


def test_opcheck_and_compile_of_the_update():
    arguments = random_conv(3)
    x, state, weight, bias = (arguments[k] for k in ("x", "initial_state", "weight", "bias"))
    torch.library.opcheck(ops.causal_conv1d_update.default, (x, state, weight, bias, True))
    states = [state.clone() for _ in range(2)]
    compiled = torch.compile(lcore.causal_conv1d_update, fullgraph=True, backend="aot_eager")
    functions = (compiled, lcore.causal_conv1d_update)
    assert_same_bits(*(f(x[..., 0], s, weight, bias) for f, s in zip(functions, states, strict=True)))
    assert_same_bits(*states)


def test_compile_without_a_graph_break():
    torch.compiler.reset()

    def model(x, arguments):
        out, state = lcore.causal_conv1d(x, **arguments, return_final_state=True)
        return out.square().mean() + state.sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, steps in ((2, 20), (3, 133)):
        arguments = random_conv(steps, batch=batch)
        x = arguments.pop("x").requires_grad_()
        got, want = compiled(x, arguments), model(x, arguments)
        assert_same_bits(got, want)
        assert_same_bits(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])


def test_meta_tensors_give_shapes_and_no_work():
    x, weight = torch.empty(1, 4096, 1 << 20, device="meta"), torch.empty(4096, 4, device="meta")
    out, state = lcore.causal_conv1d(x, weight, return_final_state=True)
    assert (out.shape, state.shape) == (x.shape, (1, 4096, 3))


def test_second_derivatives_are_refused():
    arguments = random_conv(5)
    x = arguments["x"].requires_grad_()
    (grad,) = torch.autograd.grad(lcore.causal_conv1d(**arguments).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative; use lcore\.reference\.causal_conv1d"):
        torch.autograd.grad(grad.sum(), x)


GOOD = random_conv(7, dim=4)
X, WEIGHT = GOOD["x"], GOOD["weight"]
ERRORS = [
    ({"x": X.int()}, TypeError, "x must have dtype float32 or float64 or float16 or bfloat16, got int32"),
    ({"x": X[0]}, ValueError, "x must have shape (batch, dim, len) = (*, *, *), got (4, 7)"),
    ({"weight": WEIGHT[:3]}, ValueError, "weight must have shape (dim, width) = (4, *), got (3, 4)"),
    ({"weight": torch.zeros(4, 9)}, ValueError, "weight must have a width of 1 to 8, got 9"),
    ({"weight": WEIGHT.double()}, TypeError, "weight must have dtype float32 or float16 or bfloat16, got float64"),
    ({"bias": WEIGHT}, ValueError, "bias must have shape (dim,) = (4,), got (4, 4)"),
    ({"activation": "relu"}, ValueError, 'activation must be None, "silu" or "swish", got \'relu\''),
    (
        {"initial_state": torch.zeros(2, 4, 4)},
        ValueError,
        "initial_state must have shape (batch, dim, width - 1) = (2, 4, 3), got (2, 4, 4)",
    ),
    ({"initial_state": torch.zeros(2, 4, 3).half()}, TypeError, "initial_state must have dtype float32, got float16"),
    ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, ValueError, "batch must be 1 with cu_seqlens, got 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[case[-1][:60] for case in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error) as info:
        lcore.causal_conv1d(**{**GOOD, **change})
    assert str(info.value) == f"lcore.causal_conv1d: {message}"


def test_errors_of_the_update():
    state = torch.zeros(2, 4, 3)
    for change, message in (
        ({"x": X[0, 0]}, "x must have shape (batch, dim) or (batch, dim, len), got (7,)"),
        ({"state": state[:1]}, "state must have shape (batch, dim, width - 1) = (2, 4, 3), got (1, 4, 3)"),
        ({"state": torch.zeros(2, 3, 4).mT}, "state must be contiguous, got strides (12, 1, 4)"),
        ({"state_indices": torch.tensor([1, 1])}, "state_indices must name no slot twice, got 1"),
    ):
        with pytest.raises(ValueError, match=r"lcore\.causal_conv1d_update: ") as info:
            lcore.causal_conv1d_update(**{"x": X, "state": state, "weight": WEIGHT, **change})
        assert str(info.value) == f"lcore.causal_conv1d_update: {message}"


DIRECT = [
    ({"weight": WEIGHT[:3]}, "weight must have shape"),
    ({"weight": torch.zeros(4, 9)}, "weight must have shape"),
    ({"bias": torch.zeros(3)}, "bias must have shape"),
    ({"initial_state": torch.zeros(2, 4, 2)}, "initial_state must have shape"),
]


@pytest.mark.parametrize(("change", "message"), DIRECT, ids=[message for _, message in DIRECT])
def test_a_direct_call_of_the_op_cannot_read_outside_its_tensors(change, message):
    with pytest.raises(RuntimeError, match=f"lcore.causal_conv1d: {message}"):
        ops.causal_conv1d(*positional(GOOD, **change))
