"""A linear layer whose rows do not depend on how many rows are computed together."""

from __future__ import annotations

import torch


class Linear(torch.nn.Linear):
    """y = x @ weight.T + bias, as `torch.nn.Linear`, with schedule-invariant rows in inference on the CPU.

    torch multiplies float32 with MKL, which sums in another order below a dozen rows, so a prompt cut into other
    chunks would give other bits. oneDNN keeps one order for any number of rows from two on, with any number of
    threads, and is no slower; one row alone takes its matrix-vector path, so a single row is computed twice.
    bfloat16 and float16 already run in oneDNN. Training keeps torch's kernels: oneDNN's has no gradient.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` with the rows of `Linear`."""
    if weight.dtype != x.dtype or not _runs_in_onednn(x):
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    padded = rows.expand(2, -1) if rows.shape[0] == 1 else rows
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return out[: rows.shape[0]].view(*x.shape[:-1], -1)


def _runs_in_onednn(x: torch.Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )
