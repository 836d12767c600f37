"""lcore.compose_states: a sequence split into parts that are scanned apart."""

import functools
import itertools

import pytest
import torch
from recurrent_cases import FLOATS, random_scan
from tolerance import assert_close
from torch.nn import functional

import lcore
from lcore import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def effects(arguments, cuts):
    """(decay, state) of each part of a selective scan, from nothing but the part itself."""
    steps = functional.softplus(arguments["delta"] + arguments["delta_bias"][:, None])
    for begin, end in itertools.pairwise(cuts):
        part = {k: v[..., begin:end] if k in ("u", "delta", "z", "B", "C") else v for k, v in arguments.items()}
        _, state = lcore.selective_scan(**{**part, "initial_state": None}, return_final_state=True)
        total = steps[..., begin:end].sum(-1)
        yield torch.exp(total[..., None] * arguments["A"]), state


def test_parts_of_a_scan_make_the_whole():
    arguments = random_scan(200, dtype=torch.float64)
    arguments["A"] *= 0.05  # so that every part matters
    _, want = lcore.selective_scan(**arguments, return_final_state=True)
    parts = list(effects(arguments, [0, 1, 70, 134, 200]))
    start = (torch.ones_like(want), arguments["initial_state"])
    in_order = functools.reduce(lambda a, b: lcore.compose_states(*a, *b), parts, start)
    torch.testing.assert_close(in_order[1], want)
    left, right = lcore.compose_states(*parts[0], *parts[1]), lcore.compose_states(*parts[2], *parts[3])
    decay, state = lcore.compose_states(*left, *right)
    torch.testing.assert_close(decay * arguments["initial_state"] + state, want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 1, 1), (2, 3, 4, 5)), ((4,), (2, 1, 4)), ((0,), (0,))])
def test_the_formula(dtype, shapes):
    """Values and gradients, elementwise decays and decays that broadcast, against the twin in float64."""
    decay, state = shapes
    tensors = [torch.rand(decay).to(dtype), torch.randn(state).to(dtype)]
    tensors += [torch.rand(decay).to(dtype), torch.randn(state).to(dtype)]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for module, cast in ((lcore, dtype), (reference, torch.float64), (reference, work)):
        leaves = [x.to(cast).requires_grad_() for x in tensors]
        got = module.compose_states(*leaves)
        if not results:
            grads = [torch.randn_like(x) for x in got]
        found = torch.autograd.grad(got, leaves, [d.to(cast) for d in grads])
        results.append([x.detach() for x in (*got, *found)])
    for x, y, z in zip(*results, strict=True):
        assert x.dtype == dtype
        assert_close(x, y, z.to(dtype), floor=0.5)


def test_neutral_element_and_a_decay_a_head():
    decay, state = torch.rand(2, 3, 1, 1), torch.randn(2, 3, 4, 5)
    one, zero = torch.ones(()), torch.zeros(())
    for got in (lcore.compose_states(one, zero, decay, state), lcore.compose_states(decay, state, one, zero)):
        assert torch.equal(got[0], decay) and torch.equal(got[1], state)
    assert not lcore.compose_states(decay, state, zero, state)[0].any()


def test_gradcheck_and_compile():
    inputs = [torch.rand(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lcore.compose_states, inputs)
    assert torch.autograd.gradgradcheck(lcore.compose_states, inputs)
    compiled = torch.compile(lcore.compose_states, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(*inputs), lcore.compose_states(*inputs), strict=True):
        assert torch.equal(x, y)


X = torch.zeros(2, 3)
ERRORS = [
    ({"decay_a": 1.0}, TypeError, "decay_a must be a torch.Tensor, got float"),
    ({"state_b": X.double()}, TypeError, "state_b must have dtype float32, got float64"),
    (
        {"decay_b": torch.zeros(2, 4)},
        ValueError,
        "decays and states must have shapes that broadcast, got (2, 3), (2, 3), (2, 4), (2, 3)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[case[-1][:60] for case in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error) as info:
        lcore.compose_states(**{"decay_a": X, "state_a": X, "decay_b": X, "state_b": X, **change})
    assert str(info.value) == f"lcore.compose_states: {message}"
