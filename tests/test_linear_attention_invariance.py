"""What must not change the bits of linear attention, and what must not reach other tokens."""

import itertools
import math

import pytest
import torch
from linear_attention_cases import DECAYS, OPS, gradients, offsets, random_inputs, random_state, run
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

both = pytest.mark.parametrize("op", OPS)
each_decay = pytest.mark.parametrize("decay", DECAYS)


def rows(inputs, which):
    return {name: x if x.dim() == 1 else x[which] for name, x in inputs.items()}


@both
@each_decay
@pytest.mark.parametrize("heads_v", [2, 4])
def test_threads_and_repetition(op, decay, heads_v, threads):
    """With 7 threads for 2 heads, columns of v are shared out."""
    inputs = random_inputs(op, (1, 150), 40, 100, heads_v=heads_v, decay=decay)
    tensors = {**inputs, "initial_state": random_state(inputs, 1)}
    grads = (torch.randn_like(inputs["v"]), torch.randn_like(tensors["initial_state"]))
    results = []
    for n in (1, 2, 3, 7, 7):
        torch.set_num_threads(n)
        results.append([*run(lcore, op, tensors), *gradients(lcore, op, tensors, grads).values()])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


@both
@each_decay
def test_batch_neighbours_and_packing(op, decay, one_thread):
    inputs = random_inputs(op, (3, 100), decay=decay)
    state = random_state(inputs, 3)
    whole = run(lcore, op, inputs, initial_state=state)
    flat = {name: x if x.dim() == 1 else x.flatten(0, 1) for name, x in inputs.items()}
    packed = run(lcore, op, flat, initial_state=state, cu_seqlens=offsets([100] * 3))
    assert_same_bits(packed[0], whole[0].flatten(0, 1))
    assert_same_bits(packed[1], whole[1])
    alone = run(lcore, op, rows(inputs, slice(1, 2)), initial_state=state[1:2])
    for x, y in zip(alone, whole, strict=True):
        assert_same_bits(x, y[1:2])


@both
@each_decay
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_at_chunks_keep_all_bits_and_others_the_precision(op, decay, dtype, one_thread):
    inputs = random_inputs(op, (1, 300), decay=decay, dtype=dtype)
    want, last = run(lcore, op, inputs)
    exact = run(reference, op, {name: x.double() for name, x in inputs.items()})
    for cuts in ([0, 64, 256, 300], [0, 128, 300], [0, 50, 51, 179, 300]):
        state, outs = torch.zeros_like(last), []
        for begin, end in itertools.pairwise(cuts):
            piece = rows(inputs, (slice(None), slice(begin, end)))
            out, state = run(lcore, op, piece, initial_state=state)
            outs.append(out)
        if all(cut % 64 == 0 for cut in cuts[:-1]):
            assert_same_bits(torch.cat(outs, 1), want)
            assert_same_bits(state, last)
        else:
            assert_close(torch.cat(outs, 1), exact[0], want, "out", slack_ulp=16 if dtype == torch.float32 else None)
            assert_close(state, exact[1], last, "state", slack_ulp=16)


@both
@each_decay
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_nan_in_one_packed_sequence_reaches_no_other(op, decay, name, one_thread):
    lengths = [70, 5, 66]
    inputs = random_inputs(op, (sum(lengths),), decay=decay)
    tensors = {**inputs, "initial_state": random_state(inputs, 3)}
    if name not in tensors or tensors[name].dim() == 1:
        pytest.skip("not an input of its own")
    poisoned = {key: x.clone() for key, x in tensors.items()}
    spot = poisoned[name][1] if name == "initial_state" else poisoned[name][72]
    spot.fill_(math.nan)
    cu_seqlens = offsets(lengths)
    want, got = (run(lcore, op, x, cu_seqlens=cu_seqlens) for x in (tensors, poisoned))
    others = [*range(70), *range(75, sum(lengths))]
    assert got[0][70:75].isnan().any()
    assert_same_bits(got[0][others], want[0][others])
    assert_same_bits(got[1][[0, 2]], want[1][[0, 2]])
    grads = (torch.randn_like(inputs["v"]), torch.randn_like(tensors["initial_state"]))
    want, got = (gradients(lcore, op, x, grads, cu_seqlens=cu_seqlens) for x in (tensors, poisoned))
    for key, x in got.items():
        if tensors[key].dim() == 1:  # the sum over all sequences
            continue
        keep = [0, 2] if key == "initial_state" else others
        assert_same_bits(x[keep], want[key][keep], f"gradient of {key}")


@both
@each_decay
@pytest.mark.parametrize("at", [0, 3, 15, 16, 63, 64, 99])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_never_reaches_those_before_it(op, decay, at, name, value, one_thread):
    inputs = random_inputs(op, (1, 100), 9, 17, decay=decay)
    if name not in inputs or inputs[name].dim() == 1 or (name == "g" and value > 0):
        pytest.skip("not an input of its own, or a decay that is none")
    want, _ = run(lcore, op, inputs)
    poisoned = {key: x.clone() for key, x in inputs.items()}
    poisoned[name][:, at, 0].view(-1)[0] = value
    got, _ = run(lcore, op, poisoned)
    assert_same_bits(got[:, :at], want[:, :at])
    assert_same_bits(got[:, :, 1], want[:, :, 1], "the other head")
    exact = {key: x.double() for key, x in poisoned.items()}
    if name in {"q", "v"} and math.isnan(value):  # where NaN goes in the recurrence
        assert torch.equal(got.isnan(), run(reference, op, exact)[0].isnan())


@both
@each_decay
def test_what_lies_behind_the_last_sequence_is_not_read(op, decay, one_thread):
    inputs = random_inputs(op, (90,), decay=decay)
    state = random_state(inputs, 2)
    tensors = {**inputs, "initial_state": state}
    poisoned = {key: x.clone() for key, x in tensors.items()}
    for key, x in poisoned.items():
        if x.dim() > 1 and key != "initial_state":
            x[80:] = math.nan
    cu_seqlens = offsets([30, 50])
    grads = (torch.randn_like(inputs["v"]), torch.randn_like(state))
    want, got = (run(lcore, op, x, cu_seqlens=cu_seqlens) for x in (tensors, poisoned))
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)
    want, got = (gradients(lcore, op, x, grads, cu_seqlens=cu_seqlens) for x in (tensors, poisoned))
    for key, x in got.items():
        assert_same_bits(x, want[key], f"gradient of {key}")
        assert key == "initial_state" or x.dim() == 1 or not x[80:].any()
