"""The CUDA kernels of selective_scan and its update, emulated: the CPU's tests, and sizes round their tiles."""

import itertools

import pytest
import torch
from emulated import cuda_kernels
from recurrent_cases import CHUNK, FLOATS, check, gradients, random_scan
from test_selective_scan import (  # noqa: F401
    OPTIONAL,
    test_any_strides,
    test_dtypes_may_differ,
    test_empty,
    test_gradcheck,
    test_no_steps_hand_the_state_on,
    test_only_one_of_the_results_is_used,
    test_steps_behind_the_last_sequence_are_nothing,
    test_without_what_is_optional,
)
from test_selective_scan_hard import (  # noqa: F401
    test_a_strong_decay_forgets_everything_and_keeps_gradients_finite,
    test_growth,
    test_growth_without_bound_is_infinity,
    test_nan_in_one_packed_sequence_reaches_no_other,
    test_nan_reaches_what_the_formula_says,
    test_no_step_is_no_change,
    test_rates_of_minus_infinity_reset_at_every_step,
    test_steps_round_the_threshold_of_softplus,
)
from test_selective_state_update import step_of
from test_selective_state_update import test_slots as test_slots_of_an_update  # noqa: F401
from tolerance import assert_same_bits

import lcore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_kernels("selective_scan", "selective_scan_backward", "selective_state_update"):
        yield


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [1, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 15])
def test_lengths(steps, dtype):
    check("selective_scan", random_scan(steps, batch=1, dim=5, dtype=dtype))


@pytest.mark.parametrize("states", [1, 4, 15, 16, 17, 40])
def test_states(states):
    check("selective_scan", random_scan(19, batch=1, dim=3, states=states))


def test_the_most_states():
    check("selective_scan", random_scan(9, batch=1, dim=2, states=256))
    check("selective_scan", random_scan(9, batch=1, dim=2, states=256, dtype=torch.float64))


@pytest.mark.parametrize(("dim", "groups"), [(1, 1), (31, 1), (33, 1), (64, 2), (6, 6), (150, 3)])
def test_channels_and_groups(dim, groups):
    check("selective_scan", random_scan(11, batch=1, dim=dim, groups=groups, states=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 35])
def test_channel_last_views(dim, dtype):
    out, _ = check("selective_scan", random_scan(CHUNK + 9, batch=1, dim=dim, dtype=dtype, channel_last=True))
    assert out.stride(1) == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed(dtype):
    check("selective_scan", random_scan(0, dim=4, lengths=[3, 0, CHUNK, 1, CHUNK + 1, 0], dtype=dtype))


def test_many_sequences_share_sums_over_time():
    check("selective_scan", random_scan(0, dim=3, states=2, lengths=[2, 0, 1] * 30))


def test_cuts_and_updates_do_not_change_bits():
    arguments = random_scan(80, batch=2, dim=9)
    want, last = lcore.selective_scan(**arguments, return_final_state=True)
    state, outs = arguments["initial_state"], []
    for begin, end in itertools.pairwise((0, 1, 65, 66)):
        cut = {k: v[..., begin:end] for k, v in arguments.items() if k in ("u", "delta", "z", "B", "C")}
        out, state = lcore.selective_scan(**{**arguments, **cut, "initial_state": state}, return_final_state=True)
        outs.append(out)
    outs += [lcore.selective_state_update(**step_of(arguments, t, state=state))[..., None] for t in range(66, 80)]
    assert_same_bits(torch.cat(outs, -1), want)
    assert_same_bits(state, last)


def test_gradients_repeat_and_cuts_at_chunks_and_the_batch_do_not_change_them():
    arguments = {**random_scan(2 * CHUNK + 7, dim=5), "return_final_state": True}
    douts = [torch.randn(2, 5, 2 * CHUNK + 7), torch.randn(2, 5, 5)]
    _, want = gradients(lcore.selective_scan, arguments, douts)
    _, again = gradients(lcore.selective_scan, arguments, douts)
    for name in want:
        assert_same_bits(again[name], want[name], name)
    names = ("u", "delta", "z", "B", "C")
    rows = (*names, "initial_state")
    alone = {k: v[1:] if k in rows else v for k, v in arguments.items()}
    _, one = gradients(lcore.selective_scan, alone, [d[1:] for d in douts])
    for name in rows:
        assert_same_bits(one[name], want[name][1:], name)
    cuts = (slice(CHUNK), slice(CHUNK, None))
    parts = [{k: v[..., cut] if k in names else v for k, v in arguments.items()} for cut in cuts]
    _, state = lcore.selective_scan(**parts[0])
    _, second = gradients(lcore.selective_scan, {**parts[1], "initial_state": state}, [douts[0][..., CHUNK:], douts[1]])
    _, first = gradients(lcore.selective_scan, parts[0], [douts[0][..., :CHUNK], second["initial_state"]])
    for name in names:
        assert_same_bits(torch.cat([first[name], second[name]], -1), want[name], name)
    assert_same_bits(first["initial_state"], want["initial_state"])
