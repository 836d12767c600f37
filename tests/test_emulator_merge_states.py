"""The CUDA kernel of merge_states, emulated, against the float64 oracle."""

import math

import pytest
import torch
from attention_cases import FLOATS
from emulated import merge_states
from test_merge_states import INF, one_state, random_states, widened
from tolerance import assert_close, assert_same_bits

from lcore import reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [1, 31, 32, 33, 128])
def test_values(head_dim, dtype):
    states = random_states((2, 13, 3, head_dim), dtype)  # 78 rows: the last block has two idle warps
    got, want = merge_states(*states), reference.merge_states(*widened(states))
    for name, *values in zip(("out", "lse"), got, want, reference.merge_states(*states), strict=True):
        assert_close(*values, name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_neutral_on_both_sides(dtype):
    out, lse, zero, _ = random_states((1, 5, 2, 40), dtype)
    zero, nothing = torch.zeros_like(zero), torch.full_like(lse, -INF)
    for got in (merge_states(out, lse, zero, nothing), merge_states(zero, nothing, out, lse)):
        assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    both = merge_states(zero, nothing, zero, nothing)
    assert not both[0].any() and both[1].isneginf().all()


@pytest.mark.parametrize(
    ("lse_a", "lse_b", "out", "lse"),
    [
        (INF, 1.0, 3.0, INF),
        (1.0, INF, 5.0, INF),
        (INF, -INF, 3.0, INF),
        (INF, INF, 4.0, INF),  # two infinite masses share
        (1e4, -1e4, 3.0, 1e4),
        (3e38, 3e38, 4.0, 3e38),
        (-1e30, -INF, 3.0, -1e30),
    ],
)
def test_extreme_masses(lse_a, lse_b, out, lse):
    got = merge_states(*one_state(3.0, lse_a), *one_state(5.0, lse_b))
    assert torch.equal(got[0], torch.full((1, 1, 1, 2), out))
    assert torch.equal(got[1], torch.full((1, 1, 1), lse))


@pytest.mark.parametrize(("lse_a", "lse_b"), [(math.nan, 0.0), (0.0, math.nan), (-INF, math.nan), (math.nan, -INF)])
def test_nan_is_not_hidden(lse_a, lse_b):
    out, lse = merge_states(*one_state(3.0, lse_a), *one_state(5.0, lse_b))
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4), (2, 5, 2, 0)])
def test_empty(shape):
    out, lse = merge_states(*random_states(shape))
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])


def test_every_architecture_has_the_same_bits():
    states = random_states((1, 9, 2, 40), torch.bfloat16)
    for later in (90, 100):
        for x, y in zip(merge_states(*states, architecture=later), merge_states(*states), strict=True):
            assert_same_bits(x, y)


def test_an_older_gpu_is_refused():
    with pytest.raises(RuntimeError, match=r"lcore\.merge_states: the GPU must be sm_80 or later, got sm_75"):
        merge_states(*random_states((1, 1, 1, 1)), architecture=75)
