"""The CUDA kernel of hadamard, emulated: the CPU's tests, and both ways to read rows."""

import pytest
import torch
from emulated import cuda_kernels
from test_hadamard import *  # noqa: F403
from test_hadamard import FLOATS
from tolerance import assert_same_bits

import lcore


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_kernels("hadamard"):
        yield


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [16, 64, 192, 256, 1024])
def test_packs_have_the_bits_of_single_values(dim, dtype):
    x = torch.randn(1, 9, 3, dim).to(dtype)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert_same_bits(lcore.hadamard(strided), lcore.hadamard(x))


def test_long_blocks_are_refused():
    with pytest.raises(RuntimeError, match=r"lcore\.hadamard: .* up to 1024 channels, got dim 2048"):
        lcore.hadamard(torch.zeros(1, 1, 1, 2048))
