"""The gated feed-forward block of the Llama family."""

from __future__ import annotations

import torch

from lcore.nn.linear import Linear


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), elementwise.

    torch's float32 kernel takes another exponential for the last few elements of each thread's share, so the bits
    would move with the number of rows and threads. Without gradients, float32 on the CPU goes through torch.exp,
    which has one path for all elements.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return torch.nn.functional.silu(x)
    denominator = torch.neg(x).exp_().add_(1)
    return torch.div(x, denominator, out=denominator)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x), elementwise, with the bits of one path for all elements, as `silu`."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return torch.sigmoid(x)
    return torch.neg(x).exp_().add_(1).reciprocal_()


class GatedMLP(torch.nn.Module):
    """SwiGLU.

    Formula:  y = down(silu(gate(x)) * up(x))
    Args:     x (..., hidden_size).
    Returns:  the shape and dtype of x.
    Source:   Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
