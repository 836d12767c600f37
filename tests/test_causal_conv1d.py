"""lcore.causal_conv1d and its update against the formula."""

import itertools
import math

import pytest
import torch
from recurrent_cases import FLOATS, check, gradients, offsets_of
from tolerance import assert_same_bits

import lcore

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = 256  # steps of a chunk where channels are neighbours in memory; four of them where steps are


def random_conv(steps, *, batch=2, dim=19, width=4, dtype=torch.float32, lengths=None, channel_last=False):
    """Every argument; with lengths, sequences packed in one row."""
    sequences = batch
    if lengths is not None:
        batch, sequences, steps = 1, len(lengths), sum(lengths)
    x = torch.randn(batch, dim, steps).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "x": x.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else x,
        "weight": torch.randn(dim, width, dtype=kind),
        "bias": torch.randn(dim, dtype=kind),
        "activation": "silu",
        "initial_state": torch.randn(sequences, dim, width - 1).to(dtype),
    }
    return arguments if lengths is None else {**arguments, "cu_seqlens": offsets_of(lengths)}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK + 1])
def test_lengths(steps, channel_last, dtype):
    out, _ = check("causal_conv1d", random_conv(steps, dtype=dtype, channel_last=channel_last))
    assert out.is_contiguous() != channel_last or steps == 1


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("width", range(1, 9))
def test_widths(width, channel_last):
    check("causal_conv1d", random_conv(BLOCK + 5, width=width, channel_last=channel_last))
    check("causal_conv1d", random_conv(3, width=width, channel_last=channel_last))


@pytest.mark.parametrize("dim", [1, 8, 16, 17, 65, 530])
def test_channels(dim):
    check("causal_conv1d", random_conv(21, dim=dim))
    check("causal_conv1d", random_conv(21, dim=dim, channel_last=True))


@pytest.mark.parametrize("missing", [("bias",), ("initial_state",), ("activation",), ("bias", "activation")])
@pytest.mark.parametrize("channel_last", [False, True])
def test_without_what_is_optional(missing, channel_last):
    arguments = random_conv(70, channel_last=channel_last)
    check("causal_conv1d", {**arguments, **dict.fromkeys(missing)})


@pytest.mark.parametrize("use", [(True, False), (False, True)])
def test_only_one_of_the_results_is_used(use):
    check("causal_conv1d", random_conv(70), use=use)
    check("causal_conv1d", random_conv(2, channel_last=True), use=use)


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed(dtype, channel_last):
    lengths = [3, 0, BLOCK, 1, 4 * BLOCK + 2, 2, 0, 40]
    check("causal_conv1d", random_conv(0, lengths=lengths, dtype=dtype, channel_last=channel_last))


def test_any_strides_give_the_same_bits():
    arguments = random_conv(BLOCK + 30, dim=16)
    want = lcore.causal_conv1d(**arguments, return_final_state=True)
    x = arguments["x"]
    for view in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([x, x], dim=-1)[..., 0],
        torch.cat([x, x], dim=1).chunk(2, dim=1)[1],
    ):
        got = lcore.causal_conv1d(**{**arguments, "x": view}, return_final_state=True)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)
        check("causal_conv1d", {**arguments, "x": view})


@pytest.mark.parametrize("channel_last", [False, True])
def test_nan_in_one_packed_sequence_reaches_no_other(channel_last):
    lengths = [5, 0, 70, 1, 30]
    arguments = {**random_conv(0, lengths=lengths, channel_last=channel_last), "return_final_state": True}
    spoiled = {**arguments, "x": arguments["x"].clone(), "initial_state": arguments["initial_state"].clone()}
    spoiled["x"][..., 5:75], spoiled["initial_state"][2] = math.nan, math.nan
    douts = [torch.randn(1, 19, sum(lengths)), torch.randn(5, 19, 3)]
    want, want_grads = gradients(lcore.causal_conv1d, arguments, douts)
    got, got_grads = gradients(lcore.causal_conv1d, spoiled, douts)
    steps = [*range(5), *range(75, 106)]
    for x, y in ((got[0], want[0]), (got_grads["x"], want_grads["x"])):
        assert x[..., 5:75].isnan().any()
        assert_same_bits(x[..., steps], y[..., steps])
    for x, y in ((got[1], want[1]), (got_grads["initial_state"], want_grads["initial_state"])):
        assert_same_bits(x[[0, 1, 3, 4]], y[[0, 1, 3, 4]])


def test_steps_behind_the_last_sequence_are_nothing():
    arguments = {**random_conv(0, lengths=[30, 40]), "cu_seqlens": torch.tensor([0, 30, 60], dtype=torch.int32)}
    arguments["x"][..., 60:] = math.nan
    out, _ = check("causal_conv1d", arguments)
    assert not out[..., 60:].any()


@pytest.mark.parametrize("channel_last", [False, True])
def test_cuts_and_threads_do_not_change_bits(threads, channel_last):
    arguments = random_conv(5 * BLOCK, dim=30, channel_last=channel_last)
    want = lcore.causal_conv1d(**arguments, return_final_state=True)
    state, outs = arguments["initial_state"], []
    for begin, end in itertools.pairwise((0, 1, 3, 300, 5 * BLOCK)):
        x = arguments["x"][..., begin:end]
        out, state = lcore.causal_conv1d(**{**arguments, "x": x, "initial_state": state}, return_final_state=True)
        outs.append(out)
    assert_same_bits(torch.cat(outs, -1), want[0])
    assert_same_bits(state, want[1])
    douts = [torch.randn_like(x) for x in want]
    runs = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results, grads = gradients(lcore.causal_conv1d, {**arguments, "return_final_state": True}, douts)
        runs.append([*results, *grads.values()])
    for other in runs[1:]:
        for x, y in zip(other, runs[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("channel_last", [False, True])
def test_gradcheck(channel_last):
    arguments = random_conv(0, dim=2, width=3, lengths=[4, 1], dtype=torch.float64, channel_last=channel_last)
    x, weight, bias, state = (arguments[k].requires_grad_() for k in ("x", "weight", "bias", "initial_state"))
    inputs = (x, weight, bias, True, state, arguments["cu_seqlens"])
    assert torch.autograd.gradcheck(torch.ops.lcore.causal_conv1d, inputs)


@pytest.mark.parametrize("shape", [{"batch": 0}, {"dim": 0}, {"steps": 0}])
def test_empty(shape):
    arguments = random_conv(**{"steps": 5, **shape})
    out, state = check("causal_conv1d", arguments)
    assert out.shape == arguments["x"].shape and state.shape == arguments["initial_state"].shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 4])
def test_update_has_the_bits_of_the_whole(width, dtype):
    arguments = random_conv(5 * BLOCK + 60, dtype=dtype, width=width)
    want, final_state = lcore.causal_conv1d(**arguments, return_final_state=True)
    state = arguments.pop("initial_state")
    x, outs = arguments.pop("x"), []
    for begin, end in itertools.pairwise((0, 1, 2, 5, 5 * BLOCK + 59)):
        outs.append(lcore.causal_conv1d_update(x[..., begin:end], state, **arguments))
    outs.append(lcore.causal_conv1d_update(x[..., -1], state, **arguments)[..., None])
    assert_same_bits(torch.cat(outs, -1), want)
    assert_same_bits(state, final_state)


def test_update_of_slots():
    arguments = random_conv(1, batch=3)
    del arguments["initial_state"]
    pool = torch.randn(5, 19, 3)
    before, slots = pool.clone(), torch.tensor([4, -1, 1])
    out = lcore.causal_conv1d_update(state=pool, state_indices=slots, **arguments)
    state = before[[4, 0, 1]]
    want = lcore.causal_conv1d_update(state=state, **arguments)
    assert not out[1].any() and not out.requires_grad
    assert_same_bits(out[[0, 2]], want[[0, 2]])
    assert_same_bits(pool[[4, 1]], state[[0, 2]])
    assert_same_bits(pool[[0, 2, 3]], before[[0, 2, 3]])
