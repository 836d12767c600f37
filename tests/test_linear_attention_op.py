"""The ops of linear attention as torch sees them, and their derivatives by finite differences."""

import pytest
import torch
from linear_attention_cases import DECAYS, OPS, offsets, random_inputs, random_state
from test_ssd import extras, random_ssd
from tolerance import assert_same_bits

import lcore

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.lcore
both = pytest.mark.parametrize("op", OPS)


def leaves(tensors):
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def sample(op, packed=False, decay="token", dtype=torch.float32, heads_v=2):
    lengths = [3, 0, 4]
    shape = (sum(lengths),) if packed else (2, 5)
    inputs = random_inputs(op, shape, 3, 2, heads=1, heads_v=heads_v, decay=decay, dtype=dtype)
    state = random_state(inputs, 3 if packed else 2)
    return {**inputs, "initial_state": state}, {"cu_seqlens": offsets(lengths)} if packed else {}


@both
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(op, decay, packed):
    tensors, arguments = sample(op, packed, decay, torch.float64)

    def call(*values):
        return getattr(ops, op)(**dict(zip(tensors, values, strict=True)), **arguments, scale=0.7)

    assert torch.autograd.gradcheck(call, list(leaves(tensors).values()))


@both
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_gradcheck_over_chunks(op, decay):
    inputs = random_inputs(op, (1, 67), 2, 1, heads=1, heads_v=1, decay=decay, dtype=torch.float64)
    inputs["k"] = inputs["k"] * 0.5

    def call(*values):
        return getattr(ops, op)(**dict(zip(inputs, values, strict=True)))[0][:, -1]

    assert torch.autograd.gradcheck(call, list(leaves(inputs).values()))


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_ssd(packed):
    tensors = random_ssd((7,) if packed else (1, 5), heads=2, head_dim=2, groups=1, state_dim=3, dtype=torch.float64)
    tensors = {**tensors, **extras(tensors, 2 if packed else 1)}
    cu_seqlens = offsets([3, 4]) if packed else None

    def call(*values):
        return ops.ssd(**dict(zip(tensors, values, strict=True)), dt_softplus=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, list(leaves(tensors).values()))


@pytest.mark.parametrize(
    ("op", "packed", "decay", "dtype"),
    [(OPS[0], True, "channel", torch.bfloat16), (OPS[1], False, "token", torch.float32)],
)
def test_opcheck(op, packed, decay, dtype):
    tensors, arguments = sample(op, packed, decay, dtype)
    torch.library.opcheck(getattr(ops, op).default, (), {**leaves(tensors), **arguments})
    q, k, v, g = (tensors[name] for name in ("q", "k", "v", "g"))
    rest = (0.5, tensors["initial_state"], arguments.get("cu_seqlens"), tensors.get("beta"), *(None,) * 6)
    torch.library.opcheck(ops._linear_attention.default, (*leaves({"q": q, "k": k, "v": v, "g": g}).values(), *rest))
    dstate = torch.randn_like(tensors["initial_state"])
    torch.library.opcheck(ops._linear_attention_backward.default, (torch.randn_like(v), dstate, q, k, v, g, *rest))


@both
def test_opcheck_update(op):
    tensors, _ = sample(op, True)
    state = tensors.pop("initial_state")
    step = {name: x[:3] for name, x in tensors.items()}
    torch.library.opcheck(getattr(ops, f"{op}_update").default, (state,), step)
    values = (step["q"], step["k"], step["v"], step["g"], 0.5, torch.tensor([2, -1, 0]), step.get("beta"))
    torch.library.opcheck(ops._linear_attention_update.default, (state, *values))


def test_opcheck_ssd():
    tensors = random_ssd((2, 5))
    torch.library.opcheck(ops.ssd.default, (), leaves({**tensors, **extras(tensors, 2)}))


def test_compile_without_a_graph_break():
    """Static at first, with a symbolic length at the second."""
    torch.compiler.reset()

    def model(gla, delta, ssd):
        out, state = lcore.gated_linear_attention(**gla, return_final_state=True)
        mixed = lcore.gated_delta_rule(**delta, initial_state=state)
        return (out * mixed).mean() + lcore.ssd(**ssd, dt_softplus=True).square().mean()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (20, 33):
        tensors = random_ssd((2, length))
        groups = [
            leaves(random_inputs("gated_linear_attention", (2, length), decay="channel")),
            leaves(random_inputs("gated_delta_rule", (2, length))),
            leaves({**tensors, **extras(tensors, 2)}),
        ]
        inputs = [x for group in groups for x in group.values()]
        want, got = model(*groups), compiled(*groups)
        assert_same_bits(got, want)
        for x, y in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@both
def test_compile_a_step(op):
    torch.compiler.reset()
    tensors, _ = sample(op, True)
    state = tensors.pop("initial_state")
    step = {name: x[:3] for name, x in tensors.items()}
    update = getattr(lcore, f"{op}_update")
    want_state, got_state = state.clone(), state.clone()
    want = update(want_state, **step)
    got = torch.compile(update, fullgraph=True, backend="aot_eager")(got_state, **step)
    assert_same_bits(got, want)
    assert_same_bits(got_state, want_state)


def test_meta_tensors_give_shapes_and_no_work():
    q = torch.empty(1, 1 << 20, 2, 128, dtype=torch.bfloat16, device="meta")
    v = torch.empty(1, 1 << 20, 8, 64, dtype=torch.bfloat16, device="meta")
    g = torch.empty(1, 1 << 20, 8, device="meta")
    out, state = lcore.gated_linear_attention(q, q, v, g, return_final_state=True)
    assert out.shape == v.shape and out.dtype == torch.bfloat16
    assert state.shape == (1, 8, 128, 64) and state.dtype == torch.float32
    assert lcore.ssd(v, g, g[0, 0], q, q).shape == v.shape


@both
def test_second_derivatives_are_refused(op):
    tensors = leaves(random_inputs(op, (1, 2)))
    (grad,) = torch.autograd.grad(getattr(lcore, op)(**tensors).sum(), tensors["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative; use lcore\.reference"):
        torch.autograd.grad(grad.sum(), tensors["k"])


def test_direct_calls_do_not_read_outside_a_tensor():
    tensors, _ = sample("gated_delta_rule")
    q, k, v, g, beta, state = tensors.values()
    for change in (
        {"k": k[:, :4]}, {"v": v[:, :4]}, {"g": g[:, :4]}, {"beta": beta[:, :4]}, {"initial_state": state[:1]},
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"must have|must be"):
            ops.gated_delta_rule(**{**tensors, **change})
    with pytest.raises(RuntimeError, match="state_indices must name each slot once, below 2"):
        ops.gated_delta_rule_update(
            state, q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state_indices=torch.tensor([0, 2])
        )
