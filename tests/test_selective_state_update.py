"""lcore.selective_state_update: one step of the scan, in place."""

import pytest
import torch
from recurrent_cases import FLOATS, random_scan, widened
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

pytestmark = pytest.mark.usefixtures("one_thread")
RENAMED = {"u": "x", "delta": "dt", "delta_bias": "dt_bias", "delta_softplus": "dt_softplus", "initial_state": "state"}


def step_of(arguments, t=0, **change):
    """Step t of a scan as an update's arguments."""
    cut = {k: v[..., t] if k in ("u", "delta", "z", "B", "C") else v for k, v in arguments.items()}
    return {**{RENAMED.get(k, k): v for k, v in cut.items()}, **change}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("dim", "states", "groups"), [(1, 1, 1), (19, 5, 1), (32, 16, 2), (9, 130, 3)])
def test_values(dim, states, groups, dtype):
    arguments = random_scan(1, dim=dim, states=states, groups=groups, dtype=dtype)
    want = reference.selective_scan(**widened(arguments), return_final_state=True)
    working = reference.selective_scan(**arguments, return_final_state=True)
    state = arguments["initial_state"].clone()
    out = lcore.selective_state_update(**step_of(arguments, state=state))
    assert_close(out, want[0][..., 0], working[0][..., 0], "out")
    assert_close(state, want[1], working[1], "state")


@pytest.mark.parametrize("dtype", FLOATS)
def test_steps_have_the_bits_of_a_scan(dtype):
    arguments = random_scan(70, dtype=dtype)
    out, final_state = lcore.selective_scan(**arguments, return_final_state=True)
    state = arguments["initial_state"].clone()
    outs = [lcore.selective_state_update(**step_of(arguments, t, state=state)) for t in range(70)]
    assert_same_bits(torch.stack(outs, dim=-1), out)
    assert_same_bits(state, final_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_of_16_bits_is_rounded_once_a_step(dtype):
    arguments = random_scan(1)
    state = arguments["initial_state"].to(dtype)
    _, want = lcore.selective_scan(**{**arguments, "initial_state": state.float()}, return_final_state=True)
    lcore.selective_state_update(**step_of(arguments, state=state))
    assert_same_bits(state, want.to(dtype))


def test_slots():
    arguments = random_scan(1, batch=4)
    pool = torch.randn(7, 19, 5)
    before, slots = pool.clone(), torch.tensor([5, -1, 0, 2])
    out = lcore.selective_state_update(**step_of(arguments, state=pool), state_indices=slots)
    state = before[slots.clamp(min=0)]
    want = lcore.selective_state_update(**step_of(arguments, state=state))
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert not out[row].any()
        else:
            assert_same_bits(out[row], want[row])
            assert_same_bits(pool[slot], state[row])
    others = [i for i in range(7) if i not in slots]
    assert_same_bits(pool[others], before[others])


@pytest.mark.parametrize("groups", [1, 3])
def test_heads(groups):
    """Mamba-2's form: a group serves heads / groups heads."""
    arguments = random_scan(1, dim=24, groups=groups)
    want_state, state = arguments["initial_state"].clone(), arguments["initial_state"].clone().unflatten(1, (6, 4))
    flat = step_of(arguments, state=want_state)
    want = lcore.selective_state_update(**flat)
    heads = {k: flat[k].unflatten(1, (6, 4)) for k in ("x", "dt", "z")}
    heads.update({k: flat[k].unflatten(0, (6, 4)) for k in ("A", "D", "dt_bias")})
    out = lcore.selective_state_update(**{**flat, **heads, "state": state})
    assert_same_bits(out, want.unflatten(1, (6, 4)))
    assert_same_bits(state, want_state.unflatten(1, (6, 4)))


def test_threads_do_not_change_bits(threads):
    arguments = random_scan(1, dim=300, states=16, batch=5)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        state = arguments["initial_state"].clone()
        results.append((lcore.selective_state_update(**step_of(arguments, state=state)), state))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


def test_no_gradient():
    arguments = random_scan(1)
    x = arguments["u"][..., 0].requires_grad_()
    out = lcore.selective_state_update(**step_of(arguments, x=x))
    assert not out.requires_grad


def test_opcheck_and_compile():
    arguments = step_of(random_scan(1))
    order = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")
    torch.library.opcheck(torch.ops.lcore.selective_state_update.default, [arguments[name] for name in order])
    states = [arguments["state"].clone() for _ in range(2)]
    compiled = torch.compile(lcore.selective_state_update, fullgraph=True, backend="aot_eager")
    outs = [
        f(**{**arguments, "state": s}) for f, s in zip((compiled, lcore.selective_state_update), states, strict=True)
    ]
    assert_same_bits(*outs)
    assert_same_bits(*states)


GOOD = step_of(random_scan(1, dim=4, states=3))
X, STATE = GOOD["x"], GOOD["state"]
ERRORS = [
    ({"x": X[0]}, ValueError, "x must have shape (batch, dim) or (batch, heads, head_dim), got (4,)"),
    ({"dt": X[:, :3]}, ValueError, "dt must have shape (batch, dim) = (2, 4), got (2, 3)"),
    ({"state": STATE[:1]}, ValueError, "state must have shape (batch, dim, states) = (2, 4, 3), got (1, 4, 3)"),
    ({"state": STATE.double()}, TypeError, "state must have dtype float32 or float16 or bfloat16, got float64"),
    ({"state": STATE.mT.contiguous().mT}, ValueError, "state must be contiguous, got strides (12, 1, 4)"),
    ({"B": X}, ValueError, "B must have shape (batch, groups, states) = (2, *, 3), got (2, 1, 4)"),
    ({"state_indices": torch.tensor([0, 2])}, ValueError, "state_indices must be below 2 slots, got 2"),
    ({"state_indices": torch.tensor([1, 1])}, ValueError, "state_indices must name no slot twice, got 1"),
    ({"state_indices": torch.tensor([1])}, ValueError, "state_indices must have shape (batch,) = (2,), got (1,)"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[case[-1][:60] for case in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error) as info:
        lcore.selective_state_update(**{**GOOD, **change})
    assert str(info.value) == f"lcore.selective_state_update: {message}"


def test_a_direct_call_of_the_op_refuses_slots_that_it_has_not():
    order = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")
    for slots in ([0, 2], [1, 1]):
        with pytest.raises(RuntimeError, match="state_indices must be different slots below 2"):
            torch.ops.lcore.selective_state_update(*(GOOD[name] for name in order), torch.tensor(slots))
