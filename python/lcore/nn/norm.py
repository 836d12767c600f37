"""Root-mean-square normalisation."""

from __future__ import annotations

import torch


class RMSNorm(torch.nn.Module):
    """Scales the last dimension to mean square 1, then by a learned weight.

    Formula:  y = x / sqrt(mean(x²) + eps) * weight, in float32, rounded once to the dtype of x
    Args:     x (..., size), any float dtype.
    Returns:  the shape and dtype of x. A row's result does not depend on the other rows.
    Source:   Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm by 1 + weight, whose weight starts at 0."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1 + self.weight.to(wide)
        return torch.nn.functional.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)


class GroupedRMSNorm(RMSNorm):
    """RMSNorm of each of `groups` equal parts of the last dimension on its own, with one weight for all of it."""

    def __init__(self, size: int, groups: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.groups == 1:
            return super().forward(x)
        parts = x.unflatten(-1, (self.groups, -1))
        wide = parts.to(torch.promote_types(x.dtype, torch.float32))
        normed = torch.nn.functional.rms_norm(wide, wide.shape[-1:], None, self.eps).flatten(-2)
        return (normed * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"
