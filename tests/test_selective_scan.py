"""lcore.selective_scan against its formula: results and gradients."""

import pytest
import torch
from recurrent_cases import CHUNK, FLOATS, LENGTHS, check, random_scan
from tolerance import assert_same_bits

import lcore

OPTIONAL = ("D", "z", "delta_bias", "initial_state")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", LENGTHS)
def test_lengths(steps, dtype):
    check("selective_scan", random_scan(steps, dtype=dtype))


@pytest.mark.parametrize("states", [1, 2, 3, 4, 7, 8, 16, 23, 64])
def test_states(states):
    check("selective_scan", random_scan(70, states=states))


@pytest.mark.parametrize("states", [128, 256])
def test_many_states(states):
    check("selective_scan", random_scan(67, batch=1, dim=9, states=states))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("dim", "groups"), [(1, 1), (7, 1), (8, 1), (16, 2), (24, 8), (6, 6), (65, 1), (150, 1)])
def test_channels_and_groups(dim, groups, dtype):
    check("selective_scan", random_scan(21, batch=1, dim=dim, groups=groups, states=4, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [16, 19])
def test_channel_last_views(dim, dtype):
    arguments = random_scan(CHUNK + 9, dim=dim, dtype=dtype, channel_last=True)
    out, _ = check("selective_scan", arguments)
    assert out.stride() == arguments["u"].stride()


def test_any_strides():
    arguments = random_scan(40, dim=16)
    want = lcore.selective_scan(**arguments)
    wide = {name: torch.stack([arguments[name]] * 3, dim=-1)[..., 1] for name in ("u", "delta", "B", "C", "z")}
    assert_same_bits(lcore.selective_scan(**{**arguments, **wide}), want)
    halves = torch.cat([arguments["u"], arguments["z"]], dim=1)
    u, z = halves.chunk(2, dim=1)
    assert_same_bits(lcore.selective_scan(**{**arguments, "u": u, "z": z}), want)
    check("selective_scan", {**arguments, **wide, "z": z})


@pytest.mark.parametrize("missing", [*OPTIONAL, OPTIONAL])
@pytest.mark.parametrize("softplus", [False, True])
def test_without_what_is_optional(missing, softplus):
    arguments = {**random_scan(70), "delta_softplus": softplus}
    if not softplus:
        arguments["delta"] = arguments["delta"].abs() * 0.3
        arguments["delta_bias"] = arguments["delta_bias"].abs() * 0.1
    for name in [missing] if isinstance(missing, str) else missing:
        arguments[name] = None
    check("selective_scan", arguments)


@pytest.mark.parametrize("use", [(True, False), (False, True)])
def test_only_one_of_the_results_is_used(use):
    check("selective_scan", random_scan(70), use=use)


def test_dtypes_may_differ():
    arguments = random_scan(33, dtype=torch.bfloat16)
    arguments.update(delta=arguments["delta"].float(), B=arguments["B"].half(), z=arguments["z"].float())
    out, state = check("selective_scan", arguments)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_parameters_in_the_dtype_of_the_activations_get_gradients():
    arguments = random_scan(33, dtype=torch.bfloat16)
    for name in ("A", "D", "delta_bias"):
        arguments[name] = arguments[name].bfloat16().requires_grad_()
    lcore.selective_scan(**arguments).float().sum().backward()
    assert all(arguments[name].grad.dtype == torch.bfloat16 for name in ("A", "D", "delta_bias"))


def test_projections_without_groups():
    arguments = random_scan(33)
    flat = {name: arguments[name].squeeze(1) for name in ("B", "C")}
    assert_same_bits(lcore.selective_scan(**{**arguments, **flat}), lcore.selective_scan(**arguments))


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed(dtype):
    check("selective_scan", random_scan(0, lengths=[3, 0, CHUNK, 1, 2 * CHUNK + 1, 0], dtype=dtype))


def test_steps_behind_the_last_sequence_are_nothing():
    arguments = random_scan(0, lengths=[30, 40])
    short = {**arguments, "cu_seqlens": torch.tensor([0, 30, 60], dtype=torch.int32)}
    for name in ("u", "delta", "B", "C", "z"):
        short[name][..., 60:] = torch.nan
    out, _ = check("selective_scan", short)
    assert not out[..., 60:].any()


@pytest.mark.parametrize("optional", [True, False])
def test_gradcheck(optional):
    arguments = random_scan(5, batch=1, dim=3, states=2, dtype=torch.float64, lengths=[2, 3] if optional else None)
    names = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens"]
    if not optional:
        arguments.update(dict.fromkeys(OPTIONAL))
    values = [arguments.get(name) for name in names]
    inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]

    def results(*inputs):
        return torch.ops.lcore.selective_scan(*inputs)[:2]

    assert torch.autograd.gradcheck(results, inputs)


@pytest.mark.parametrize("shape", [{"batch": 0}, {"dim": 0, "groups": 1}])
def test_empty(shape):
    arguments = random_scan(5, **shape)
    for x in (v for v in arguments.values() if isinstance(v, torch.Tensor)):
        x.requires_grad_()
    out = lcore.selective_scan(**arguments)
    assert out.shape == arguments["u"].shape
    out.sum().backward()
    assert not arguments["A"].grad.any()


def test_no_steps_hand_the_state_on():
    arguments = random_scan(0)
    arguments["initial_state"].requires_grad_()
    out, state = lcore.selective_scan(**arguments, return_final_state=True)
    assert out.shape[-1] == 0 and torch.equal(state, arguments["initial_state"])
    dstate = torch.randn_like(state)
    (grad,) = torch.autograd.grad(state, arguments["initial_state"], dstate)
    assert torch.equal(grad, dstate)
