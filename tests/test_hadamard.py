"""lcore.hadamard against its matrix, and what a rotation must keep."""

import pytest
import torch
from tolerance import assert_close

import lcore
from lcore import reference

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 40, 64, 80, 128, 192, 512])
def test_values(dtype, inverse, dim):
    x = torch.randn(2, 70, 3, dim).to(dtype)
    want, working = (reference.hadamard(y, inverse=inverse) for y in (x.double(), x))
    assert_close(lcore.hadamard(x, inverse=inverse), want, working, slack_ulp=1024 if dtype == torch.float64 else 16)


@pytest.mark.parametrize("dim", [64, 96, 7])
def test_there_and_back_and_scalar_products(dim):
    a, b = torch.randn(2, 1, 50, 2, dim, dtype=torch.float64)
    ha, hb = lcore.hadamard(a), lcore.hadamard(b)
    torch.testing.assert_close(lcore.hadamard(ha, inverse=True), a)
    torch.testing.assert_close((ha * hb).sum(-1), (a * b).sum(-1))


def test_any_strides_and_no_tokens():
    x = torch.randn(3, 64, 5, 2).permute(0, 3, 2, 1)
    torch.testing.assert_close(lcore.hadamard(x), lcore.hadamard(x.contiguous()), rtol=0, atol=0)
    torch.testing.assert_close(lcore.hadamard(x[0]), lcore.hadamard(x)[0], rtol=0, atol=0)
    assert lcore.hadamard(torch.empty(2, 0, 3, 8)).shape == (2, 0, 3, 8)


def test_gradient_and_registration():
    x = torch.randn(1, 3, 2, 12, dtype=torch.float64, requires_grad=True)
    for inverse in (False, True):
        assert torch.autograd.gradcheck(torch.ops.lcore.hadamard, (x, inverse))
        torch.library.opcheck(torch.ops.lcore.hadamard.default, (x, inverse))
    compiled = torch.compile(lambda y: lcore.hadamard(y).sum(), fullgraph=True)
    torch.testing.assert_close(compiled(x), lcore.hadamard(x).sum())


def test_errors():
    with pytest.raises(ValueError, match=r"lcore.hadamard: x must have shape \(batch, seq, heads, dim\)"):
        lcore.hadamard(torch.randn(3))
    with pytest.raises(TypeError, match=r"lcore.hadamard: x must"):
        lcore.hadamard(torch.zeros(1, 1, 1, 4, dtype=torch.int64))
