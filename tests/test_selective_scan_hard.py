"""lcore.selective_scan where scans go wrong: extreme decays, NaN beside, cuts, threads, a million steps."""

import itertools
import math

import pytest
import torch
from recurrent_cases import CHUNK, FLOATS, check, gradients, offsets_of, random_scan, widened
from tolerance import assert_same_bits, assert_same_specials

import lcore
from lcore import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(steps=CHUNK + 6, **shape):
    """Without softplus: delta as the test sets it."""
    return {**random_scan(steps, **shape), "delta_softplus": False, "delta_bias": None}


def test_a_strong_decay_forgets_everything_and_keeps_gradients_finite():
    arguments = plain()
    arguments["delta"] = arguments["delta"].abs() * 1e4
    arguments["delta"][..., ::3] = 1e-2
    arguments["A"] -= 0.1
    check("selective_scan", arguments)


def test_no_step_is_no_change():
    arguments = {**plain(), "D": None, "z": None}
    arguments["delta"] = torch.zeros_like(arguments["delta"])
    _, state = check("selective_scan", arguments)
    assert torch.equal(state, arguments["initial_state"])


def test_no_decay_is_a_sum():
    arguments = plain(300)
    arguments["A"] = torch.full_like(arguments["A"], -0.0)
    arguments["delta"] = arguments["delta"].abs()
    check("selective_scan", arguments)


@pytest.mark.parametrize("sign", [1, -1])
def test_growth(sign):
    """A > 0, or a negative step: states grow."""
    arguments = plain()
    arguments["delta"] = sign * arguments["delta"].abs() * 0.05
    arguments["A"] = -sign * arguments["A"]
    check("selective_scan", arguments)


def test_growth_without_bound_is_infinity():
    arguments = plain(dim=8)
    arguments["A"][:, 0], arguments["delta"][:] = 200.0, 1.0
    arguments["u"], arguments["initial_state"] = arguments["u"].abs() + 1, arguments["initial_state"].abs() + 1
    arguments["B"], arguments["C"] = arguments["B"].abs() + 0.1, arguments["C"].abs() + 0.1
    got = lcore.selective_scan(**arguments, return_final_state=True)
    want = reference.selective_scan(**arguments, return_final_state=True)
    for x, y in zip(got, want, strict=True):
        assert_same_specials(x, y)
    assert got[1][..., 0].isinf().all() and got[1][..., 1:].isfinite().all()


def test_rates_of_minus_infinity_reset_at_every_step():
    arguments = plain()
    arguments["delta"] = arguments["delta"].abs() + 0.1
    arguments["A"][:, 1] = -math.inf
    check("selective_scan", arguments, backward=False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_steps_round_the_threshold_of_softplus(dtype):
    arguments = {**random_scan(80, dtype=dtype), "delta_bias": None, "z": None}
    arguments["delta"] = torch.linspace(-30, 40, 80).repeat(2, 19, 1).to(dtype)
    arguments["delta"][..., 40] = 20.0
    check("selective_scan", arguments)


@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C", "A", "D", "delta_bias", "initial_state"])
def test_nan_reaches_what_the_formula_says(name):
    arguments = random_scan(CHUNK + 6, groups=1)
    arguments[name].flatten()[-3] = math.nan
    got = lcore.selective_scan(**arguments, return_final_state=True)
    want = reference.selective_scan(**arguments, return_final_state=True)
    for x, y in zip(got, want, strict=True):
        assert_same_specials(x, y)


@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C", "initial_state"])
def test_nan_in_one_packed_sequence_reaches_no_other(name):
    lengths = [5, 0, CHUNK + 3, 1, 30]
    arguments = {**random_scan(0, lengths=lengths), "return_final_state": True}
    spoiled = {**arguments, name: arguments[name].clone()}
    begin, end = 5, 5 + CHUNK + 3
    if name == "initial_state":
        spoiled[name][2] = math.nan
    else:
        spoiled[name][..., begin:end] = math.nan
    douts = [torch.randn(1, 19, sum(lengths)), torch.randn(5, 19, 5)]
    (want, want_state), want_grads = gradients(lcore.selective_scan, arguments, douts)
    (got, got_state), got_grads = gradients(lcore.selective_scan, spoiled, douts)
    steps = torch.ones(sum(lengths), dtype=torch.bool)
    steps[begin:end] = False
    sequences = torch.arange(5) != 2
    assert got[..., begin:end].isnan().any()
    assert_same_bits(got[..., steps], want[..., steps])
    assert_same_bits(got_state[sequences], want_state[sequences])
    for key in ("u", "delta", "z", "B", "C"):
        assert_same_bits(got_grads[key][..., steps], want_grads[key][..., steps], key)
    assert_same_bits(got_grads["initial_state"][sequences], want_grads["initial_state"][sequences])


def test_a_thousand_tiny_sequences():
    lengths = torch.randint(0, 4, (1000,)).tolist()
    arguments = random_scan(0, lengths=lengths, dim=8, states=2)
    got = lcore.selective_scan(**arguments, return_final_state=True)
    for i, (begin, end) in list(enumerate(itertools.pairwise(offsets_of(lengths).tolist())))[::97]:
        alone = {k: v[..., begin:end] if k in ("u", "delta", "z", "B", "C") else v for k, v in arguments.items()}
        alone.update(cu_seqlens=None, initial_state=arguments["initial_state"][i : i + 1])
        out, state = lcore.selective_scan(**alone, return_final_state=True)
        assert_same_bits(got[0][..., begin:end], out)
        assert_same_bits(got[1][i : i + 1], state)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cuts_do_not_change_bits(dtype):
    arguments = random_scan(200, dtype=dtype)
    want = lcore.selective_scan(**arguments, return_final_state=True)
    state, outs = arguments["initial_state"], []
    for begin, end in itertools.pairwise((0, 1, 65, 66, 130, 200)):
        cut = {k: v[..., begin:end] for k, v in arguments.items() if k in ("u", "delta", "z", "B", "C")}
        out, state = lcore.selective_scan(**{**arguments, **cut, "initial_state": state}, return_final_state=True)
        outs.append(out)
    assert_same_bits(torch.cat(outs, -1), want[0])
    assert_same_bits(state, want[1])


def test_cuts_at_chunks_do_not_change_bits_of_gradients():
    arguments = {**random_scan(3 * CHUNK + 7), "return_final_state": True}
    douts = [torch.randn(2, 19, 3 * CHUNK + 7), torch.randn(2, 19, 5)]
    _, want = gradients(lcore.selective_scan, arguments, douts)
    cut = 2 * CHUNK
    names = ("u", "delta", "z", "B", "C")
    parts = [{k: v[..., s] if k in names else v for k, v in arguments.items()} for s in (slice(cut), slice(cut, None))]
    _, state = lcore.selective_scan(**parts[0])
    _, second = gradients(lcore.selective_scan, {**parts[1], "initial_state": state}, [douts[0][..., cut:], douts[1]])
    _, first = gradients(lcore.selective_scan, parts[0], [douts[0][..., :cut], second["initial_state"]])
    for name in names:
        assert_same_bits(torch.cat([first[name], second[name]], -1), want[name], name)
    assert_same_bits(first["initial_state"], want["initial_state"])


@pytest.mark.parametrize("lengths", [None, [100, 0, 3, 200]])
def test_threads_and_batch_do_not_change_bits(threads, lengths):
    arguments = {**random_scan(2200, dim=90, groups=2, states=3, lengths=lengths), "return_final_state": True}
    steps, sequences = arguments["u"].shape[-1], len(arguments["initial_state"])
    douts = [torch.randn(len(arguments["u"]), 90, steps), torch.randn(sequences, 90, 3)]
    runs = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results, grads = gradients(lcore.selective_scan, arguments, douts)
        runs.append({**dict(enumerate(results)), **grads})
    for other in runs[1:]:
        for name, value in other.items():
            assert_same_bits(value, runs[0][name], str(name))
    if lengths is None:
        torch.set_num_threads(1)
        alone = {k: v[1:] if k in ("u", "delta", "z", "B", "C", "initial_state") else v for k, v in arguments.items()}
        results, grads = gradients(lcore.selective_scan, alone, [d[1:] for d in douts])
        assert_same_bits(results[0], runs[0][0][1:])
        for name in ("u", "delta", "z", "B", "C", "initial_state"):
            assert_same_bits(grads[name], runs[0][name][1:], name)


def test_sums_over_channels_of_many_rows_are_held_for_a_short_time_and_have_the_same_bits():
    arguments = {**random_scan(2 * CHUNK + 2, batch=512, dim=1, states=256), "return_final_state": True}
    douts = [torch.randn(512, 1, 2 * CHUNK + 2), torch.randn(512, 1, 256)]
    alone = {k: v[:1] if k in ("u", "delta", "z", "B", "C", "initial_state") else v for k, v in arguments.items()}
    _, many = gradients(lcore.selective_scan, arguments, douts)
    _, one = gradients(lcore.selective_scan, alone, [d[:1] for d in douts])
    for name in ("B", "C", "u"):
        assert_same_bits(many[name][:1], one[name], name)


@pytest.mark.slow
def test_a_million_steps_do_not_drift():
    """Against float64, relative to the largest value. What grows with a state's life (10 to 10,000 steps) is the
    rounding of its decay; nothing grows with the length."""
    steps = 1 << 20
    arguments = {**plain(steps, batch=1, dim=8, states=4), "return_final_state": True}
    arguments["delta"] = torch.rand(1, 8, steps) * 0.2
    arguments["A"] = -torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(8, 1)
    douts = [torch.randn(1, 8, steps), torch.randn(1, 8, 4)]
    got, grads = gradients(lcore.selective_scan, arguments, douts)
    want, want_grads = gradients(lcore.selective_scan, widened(arguments), douts)
    pairs = {"out": (got[0], want[0]), "state": (got[1], want[1])}
    pairs.update({name: (grads[name], want_grads[name]) for name in grads})
    errors = {name: ((x - y).abs().max() / y.abs().max()).item() for name, (x, y) in pairs.items()}
    assert max(errors.values()) < 1e-5, errors
