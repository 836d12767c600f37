"""The CUDA kernels of merge_states, emulated: the CPU's tests, with these in the place of the CPU's kernels."""

import pytest
import torch
from emulated import cuda_kernels
from test_merge_states import *  # noqa: F403
from test_merge_states import random_states
from tolerance import assert_same_bits

import lcore

OPS = ("merge_states", "merge_states_backward")


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_kernels(*OPS):
        yield


def test_every_architecture_has_the_same_bits():
    states = random_states((1, 9, 2, 40), torch.bfloat16)
    want = lcore.merge_states(*states)
    for later in (90, 100):
        with cuda_kernels(*OPS, architecture=later):
            for x, y in zip(lcore.merge_states(*states), want, strict=True):
                assert_same_bits(x, y)


def test_an_older_gpu_is_refused():
    with (
        cuda_kernels(*OPS, architecture=75),
        pytest.raises(RuntimeError, match=r"lcore\.merge_states: the GPU must be sm_80 or later, got sm_75"),
    ):
        lcore.merge_states(*random_states((1, 1, 1, 1)))
