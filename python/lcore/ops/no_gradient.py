"""Ops without derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def not_differentiable(op: str) -> None:
    """No result of ``torch.ops.lcore.<op>`` ever requires grad, whatever its inputs do."""

    def no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*((output,) if isinstance(output, Tensor) else output))

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"lcore.{op}: no gradients; use lcore.reference, which is plain torch")

    torch.library.register_autograd(f"lcore::{op}", backward, setup_context=no_gradient)
