"""lcore.selective_scan as torch sees it, and what it refuses."""

import pytest
import torch
from recurrent_cases import random_scan
from tolerance import assert_same_bits

import lcore

ops = torch.ops.lcore
ORDER = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens")
pytestmark = pytest.mark.usefixtures("one_thread")


def positional(arguments, **change):
    values = [{**arguments, **change}.get(name) for name in ORDER]
    return [x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


SAMPLES = [
    pytest.param(positional(random_scan(70, dim=9)), id="plain"),
    pytest.param(positional(random_scan(7), D=None, z=None, delta_bias=None, initial_state=None), id="least"),
    pytest.param(positional(random_scan(0, lengths=[3, 0, 66])), id="packed"),
    pytest.param(positional(random_scan(7, dtype=torch.bfloat16, channel_last=True)), id="channel last"),
    pytest.param(positional(random_scan(7, dtype=torch.float64, groups=19)), id="float64"),
]


@pytest.mark.parametrize("inputs", SAMPLES)
def test_opcheck(inputs):
    torch.library.opcheck(ops.selective_scan.default, inputs)
    out, state, kept = ops.selective_scan(*inputs)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    for dstate in (None, torch.randn_like(state)):
        torch.library.opcheck(
            ops.selective_scan_backward.default, (torch.randn_like(out), dstate, *inputs, kept.detach())
        )


def test_states_are_kept_only_for_a_backward():
    arguments = random_scan(70)
    inputs = [arguments.get(name) for name in ORDER]
    assert ops.selective_scan(*inputs, False)[2].numel() == 0
    assert ops.selective_scan(*inputs)[2].shape == (2 * 2, 5, 19)
    inputs[0].requires_grad_()
    out = ops.selective_scan(*inputs, False)[0]
    with pytest.raises(RuntimeError, match="keep=True"):
        out.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic):
    torch.compiler.reset()

    def model(u, arguments):
        out, state = lcore.selective_scan(u, **arguments, return_final_state=True)
        return out.square().mean() + state.sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, steps in ((2, 20), (3, 133), (2, 7)):
        arguments = random_scan(steps, batch=batch)
        u = arguments.pop("u").requires_grad_()
        got, want = compiled(u, arguments), model(u, arguments)
        assert_same_bits(got, want)
        assert_same_bits(torch.autograd.grad(got, u)[0], torch.autograd.grad(want, u)[0])


def test_compile_packed_sequences():
    torch.compiler.reset()
    arguments = random_scan(0, lengths=[3, 0, 66])
    compiled = torch.compile(lcore.selective_scan, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(**arguments), lcore.selective_scan(**arguments))


def test_meta_tensors_give_shapes_and_no_work():
    u = torch.empty(1, 4096, 1 << 20, dtype=torch.bfloat16, device="meta")
    A, B = torch.empty(4096, 16, device="meta"), torch.empty(1, 16, 1 << 20, dtype=torch.bfloat16, device="meta")
    out, state = lcore.selective_scan(u, u, A, B, B, return_final_state=True)
    assert (out.shape, out.dtype) == (u.shape, u.dtype)
    assert (state.shape, state.dtype) == ((1, 4096, 16), torch.float32)


def test_second_derivatives_are_refused():
    arguments = random_scan(5)
    u = arguments["u"].requires_grad_()
    (grad,) = torch.autograd.grad(lcore.selective_scan(**arguments).sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative; use lcore\.reference\.selective_scan"):
        torch.autograd.grad(grad.sum(), u)


GOOD = random_scan(7, dim=4, states=3, groups=2)
U, A, B = GOOD["u"], GOOD["A"], GOOD["B"]
OFFSETS = torch.tensor([0, 7], dtype=torch.int32)
HALVES = "float32 or float16 or bfloat16"
ERRORS = [
    ({"u": [1]}, TypeError, "u must be a torch.Tensor, got list"),
    ({"u": U.int()}, TypeError, "u must have dtype float32 or float64 or float16 or bfloat16, got int32"),
    ({"u": U[0]}, ValueError, "u must have shape (batch, dim, len) = (*, *, *), got (4, 7)"),
    ({"delta": U.double()}, TypeError, f"delta must have dtype {HALVES}, got float64"),
    ({"delta": U[..., :6]}, ValueError, "delta must have shape (batch, dim, len) = (2, 4, 7), got (2, 4, 6)"),
    ({"z": U[:1]}, ValueError, "z must have shape (batch, dim, len) = (2, 4, 7), got (1, 4, 7)"),
    ({"A": A[:3]}, ValueError, "A must have shape (dim, states) = (4, *), got (3, 3)"),
    ({"A": torch.zeros(4, 257)}, ValueError, "A must have 1 to 256 states, got 257"),
    ({"B": B[:, :, :2]}, ValueError, "B must have shape (batch, groups, states, len) = (2, *, 3, 7), got (2, 2, 2, 7)"),
    ({"B": A}, ValueError, "B must have shape (batch, groups, states, len) = (2, *, 3, 7), got (4, 3)"),
    ({"B": torch.zeros(2, 3, 3, 7)}, ValueError, "B must have groups that divide dim 4, got 3"),
    (
        {"C": B[:, :1]},
        ValueError,
        "C must have shape (batch, groups, states, len) = (2, 2, 3, 7), got (2, 1, 3, 7)",
    ),
    ({"D": torch.zeros(3)}, ValueError, "D must have shape (dim,) = (4,), got (3,)"),
    ({"delta_bias": torch.zeros(4, 1)}, ValueError, "delta_bias must have shape (dim,) = (4,), got (4, 1)"),
    ({"delta_softplus": 1}, TypeError, "delta_softplus must be a bool, got 1"),
    ({"initial_state": torch.zeros(2, 4, 3).half()}, TypeError, "initial_state must have dtype float32, got float16"),
    (
        {"initial_state": torch.zeros(1, 4, 3)},
        ValueError,
        "initial_state must have shape (batch, dim, states) = (2, 4, 3), got (1, 4, 3)",
    ),
    ({"cu_seqlens": OFFSETS}, ValueError, "batch must be 1 with cu_seqlens, got 2"),
    ({"cu_seqlens": OFFSETS.long()}, TypeError, "cu_seqlens must have dtype int32, got int64"),
    ({"A": A.to(torch.complex64)}, NotImplementedError, "no kernel for complex A; use a real A"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[case[-1][:60] for case in ERRORS])
def test_errors(change, error, message):
    lcore.selective_scan(**GOOD)
    with pytest.raises(error) as info:
        lcore.selective_scan(**{**GOOD, **change})
    assert str(info.value) == f"lcore.selective_scan: {message}"


PACKINGS = [
    ([1, 7], "cu_seqlens must begin with 0, got 1"),
    ([0, 5, 3, 7], "cu_seqlens must never fall, got [5, 3] at 1"),
    ([0, 8], "cu_seqlens must end within 7 steps, got 8"),
]


@pytest.mark.parametrize(("offsets", "message"), PACKINGS)
def test_errors_of_packing(offsets, message):
    one = {k: v[:1] if k in ("u", "delta", "z", "B", "C") else v for k, v in GOOD.items()}
    offsets = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"lcore\.selective_scan: ") as info:
        lcore.selective_scan(**{**one, "initial_state": None, "cu_seqlens": offsets})
    assert message in str(info.value)
    inputs = positional(one, initial_state=None, cu_seqlens=offsets)
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to at most 7 steps"):
        ops.selective_scan(*inputs)


DIRECT = [
    ({"delta": U[..., :6]}, "delta must have shape"),
    ({"delta": U.double()}, "delta must be float32"),
    ({"A": A[:3]}, "A must have shape"),
    ({"A": A.double()}, "A must be contiguous Float"),
    ({"B": B[:, :, :2]}, "B must have shape"),
    ({"C": B[..., :6]}, "C must have shape"),
    ({"initial_state": torch.zeros(1, 4, 3)}, "initial_state must have shape"),
]


@pytest.mark.parametrize(("change", "message"), DIRECT, ids=[message for _, message in DIRECT])
def test_a_direct_call_of_the_op_cannot_read_outside_its_tensors(change, message):
    with pytest.raises(RuntimeError, match=f"lcore.selective_scan: {message}"):
        ops.selective_scan(*positional(GOOD, **change))
