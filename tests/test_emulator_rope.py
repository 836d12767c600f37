"""The CUDA kernel of rope, emulated: the CPU's tests, and the shapes that its packs and tiles divide."""

import pytest
import torch
from emulated import cuda_kernels
from test_rope import *  # noqa: F403
from test_rope import FLOATS, frequencies
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_kernels("rope"):
        yield


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(128, 64), (64, 16), (80, 24), (16, 8), (256, 128)])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
def test_packs_have_the_bits_of_single_pairs(tokens, head_dim, half, interleaved, dtype):
    x = torch.randn(2, tokens, 3, head_dim).to(dtype)
    positions = torch.randint(0, 1 << 20, (2, tokens))
    arguments = {"interleaved": interleaved, "attention_scaling": 0.8}
    got = lcore.rope(x, positions, frequencies(half), **arguments)
    want = reference.rope(x.double(), positions, frequencies(half), **arguments)
    slack_ulp = 1 << 22 if dtype == torch.float64 else None
    assert_close(got, want, reference.rope(x, positions, frequencies(half), **arguments), slack_ulp=slack_ulp)
    strided = torch.stack([x, x], dim=-1)[..., 0]  # no packs
    assert_same_bits(lcore.rope(strided, positions, frequencies(half), **arguments), got)
