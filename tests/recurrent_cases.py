"""Inputs of recurrent ops, and the comparison of an op with its formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from tolerance import assert_close
from torch import Tensor

import lcore
from lcore import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK = 64
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_scan(
    steps: int,
    *,
    batch: int = 2,
    dim: int = 19,
    states: int = 5,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    lengths: list[int] | None = None,
    channel_last: bool = False,
) -> dict[str, Any]:
    """Every argument of a selective scan; with lengths, sequences packed in one row."""
    sequences = batch
    if lengths is not None:
        batch, sequences, steps = 1, len(lengths), sum(lengths)

    def activation(*shape: int) -> Tensor:
        x = torch.randn(*shape, steps).to(dtype)
        return x.transpose(1, -1).contiguous().transpose(1, -1) if channel_last else x

    kind = wide(dtype)
    arguments: dict[str, Any] = {
        "u": activation(batch, dim),
        "delta": activation(batch, dim),
        "A": -torch.rand(dim, states, dtype=kind) * 2,
        "B": activation(batch, groups, states),
        "C": activation(batch, groups, states),
        "D": torch.randn(dim, dtype=kind),
        "z": activation(batch, dim),
        "delta_bias": torch.randn(dim, dtype=kind) - 1,
        "delta_softplus": True,
        "initial_state": torch.randn(sequences, dim, states, dtype=kind),
    }
    if lengths is not None:
        arguments["cu_seqlens"] = offsets_of(lengths)
    return arguments


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    floating = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {**arguments, **{k: v.double() for k, v in floating.items()}}


def gradients(
    op: Callable[..., Any], arguments: dict[str, Any], douts: list[Tensor | None]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The op's results, and the gradient of every floating-point argument; None stands for an unused result."""
    leaves = {
        k: v.detach().requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    results = op(**{**arguments, **leaves})
    used = [(result, dout.to(result.dtype)) for result, dout in zip(results, douts, strict=True) if dout is not None]
    grads = torch.autograd.grad([r for r, _ in used], list(leaves.values()), [d for _, d in used], allow_unused=True)
    shaped = {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), grads, strict=True)}
    return [result.detach() for result in results], shaped


def check(
    name: str, arguments: dict[str, Any], *, backward: bool = True, use: tuple[bool, bool] = (True, True), **slack: Any
) -> list[Tensor]:
    """lcore.<name> against the formula in float64: out, final state, and all gradients of those results in use."""
    arguments = {**arguments, "return_final_state": True}
    op, formula = getattr(lcore, name), getattr(reference, name)
    if not backward:
        got = op(**arguments)
        for what, x, y, w in zip(
            ("out", "final state"), got, formula(**widened(arguments)), formula(**arguments), strict=True
        ):
            assert_close(x, y, w, what, **slack)
        return list(got)
    douts = [torch.randn_like(x) if used else None for x, used in zip(op(**arguments), use, strict=True)]
    got, grads = gradients(op, arguments, douts)
    want, want_grads = gradients(formula, widened(arguments), douts)
    working, working_grads = gradients(formula, arguments, douts)
    for what, x, y, w in zip(("out", "final state"), got, want, working, strict=True):
        assert_close(x, y, w, what, **slack)
    for key, grad in grads.items():
        assert grad.dtype == arguments[key].dtype
        assert_close(grad, want_grads[key], working_grads[key], f"gradient of {key}", **slack)
    return got
