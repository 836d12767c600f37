"""The CUDA kernels of causal_conv1d, emulated: the CPU's tests, and lengths round their tiles and runs."""

import pytest
import torch
from emulated import cuda_kernels
from recurrent_cases import FLOATS, check, gradients
from test_causal_conv1d import (  # noqa: F401
    random_conv,
    test_channels,
    test_empty,
    test_gradcheck,
    test_nan_in_one_packed_sequence_reaches_no_other,
    test_only_one_of_the_results_is_used,
    test_steps_behind_the_last_sequence_are_nothing,
    test_update_of_slots,
    test_widths,
    test_without_what_is_optional,
)
from tolerance import assert_same_bits

import lcore

TILE, BY_CHANNEL_RUN, ROW_RUN, ROW_GRADIENT_RUN = 8, 64, 256, 2048  # csrc/cuda/generic/causal_conv1d
pytestmark = pytest.mark.usefixtures("one_thread")
layouts = pytest.mark.parametrize("channel_last", [False, True])


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_kernels("causal_conv1d", "causal_conv1d_backward", "causal_conv1d_update"):
        yield


@layouts
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [1, TILE - 1, TILE, TILE + 1, 3 * TILE + 7, BY_CHANNEL_RUN + 1, ROW_RUN + 9])
def test_lengths(steps, channel_last, dtype):
    check("causal_conv1d", random_conv(steps, batch=1, dim=9, dtype=dtype, channel_last=channel_last))


def test_runs_of_gradients():
    check("causal_conv1d", random_conv(ROW_GRADIENT_RUN + 20, batch=1, dim=2))
    check("causal_conv1d", random_conv(ROW_RUN + 20, batch=2, dim=8, channel_last=True))


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed(dtype, channel_last):
    check(
        "causal_conv1d", random_conv(0, dim=5, lengths=[3, 0, 30, 1, 40, 2, 0], dtype=dtype, channel_last=channel_last)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_and_cuts_and_an_update_give_the_same_bits(dtype):
    """Vectors and single elements, tiles and steps at a sequence's edge, and a window in registers."""
    arguments = random_conv(50, dim=16, dtype=dtype)
    want = lcore.causal_conv1d(**arguments, return_final_state=True)
    x, state = arguments["x"], arguments["initial_state"]
    for view in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([x, x], dim=-1)[..., 0],
        torch.nn.functional.pad(x, (1, 0))[..., 1:],
    ):
        for a, b in zip(lcore.causal_conv1d(**{**arguments, "x": view}, return_final_state=True), want, strict=True):
            assert_same_bits(a, b)
    first, middle = lcore.causal_conv1d(**{**arguments, "x": x[..., :13]}, return_final_state=True)
    del arguments["initial_state"]
    second = lcore.causal_conv1d_update(**{**arguments, "x": x[..., 13:]}, state=middle)
    assert_same_bits(torch.cat([first, second], -1), want[0])
    assert_same_bits(middle, want[1])
    assert not torch.equal(state, middle)


def test_gradients_repeat_and_do_not_depend_on_the_batch():
    arguments = {**random_conv(40, dim=5), "return_final_state": True}
    douts = [torch.randn(2, 5, 40), torch.randn(2, 5, 3)]
    _, want = gradients(lcore.causal_conv1d, arguments, douts)
    _, again = gradients(lcore.causal_conv1d, arguments, douts)
    alone = {**arguments, "x": arguments["x"][1:], "initial_state": arguments["initial_state"][1:]}
    _, one = gradients(lcore.causal_conv1d, alone, [d[1:] for d in douts])
    for name in want:
        assert_same_bits(again[name], want[name], name)
    for name in ("x", "initial_state"):
        assert_same_bits(one[name], want[name][1:], name)
