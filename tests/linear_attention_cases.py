"""Inputs of linear attention, and the comparison of an op with its recurrence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tolerance import SLACK_ULP, assert_close
from torch import Tensor

import lcore
from lcore import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DECAYS = ("token", "channel", "head")
OPS = ("gated_linear_attention", "gated_delta_rule")
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 131)  # both sides of a sub-chunk of 16 and of a chunk of 64
HEAD_DIMS = ((1, 1), (16, 40), (40, 16), (64, 64), (100, 33), (128, 128), (256, 17), (17, 256))


def random_inputs(
    op: str,
    shape: tuple[int, ...],
    key_dim: int = 16,
    value_dim: int = 24,
    *,
    heads: int = 2,
    heads_v: int = 2,
    decay: str = "token",
    strength: float = 0.2,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The op's tensors for tokens of `shape`: (batch, len), or (tokens,)."""
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    g_shape = {"token": (*shape, heads_v), "channel": (*shape, heads_v, key_dim), "head": (heads_v,)}[decay]
    inputs = {
        "q": torch.randn(*shape, heads, key_dim).to(dtype),
        "k": torch.randn(*shape, heads, key_dim),
        "v": torch.randn(*shape, heads_v, value_dim).to(dtype),
        "g": (-strength * torch.rand(g_shape)).to(gate),
    }
    if op == "gated_delta_rule":
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
        inputs["beta"] = (2 * torch.rand(*shape, heads_v)).to(gate)
    inputs["k"] = inputs["k"].to(dtype)
    return inputs


def random_state(inputs: dict[str, Tensor], sequences: int) -> Tensor:
    q, v = inputs["q"], inputs["v"]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.randn(sequences, v.shape[-2], q.shape[-1], v.shape[-1], dtype=wide)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def run(module: Any, op: str, tensors: dict[str, Tensor], **arguments: Any) -> tuple[Tensor, Tensor]:
    return getattr(module, op)(**tensors, **arguments, return_final_state=True)


def gradients(
    module: Any, op: str, tensors: dict[str, Tensor], grads: tuple[Tensor | None, Tensor | None], **arguments: Any
) -> dict[str, Tensor]:
    """Gradients of <out, grads[0]> + <final state, grads[1]> in all tensors, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    results = run(module, op, leaves, **arguments)
    used = [(x, d.to(x.dtype)) for x, d in zip(results, grads, strict=True) if d is not None]
    found = torch.autograd.grad(
        [x for x, _ in used], list(leaves.values()), [d for _, d in used], materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def widened(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in tensors.items()}


def check(
    op: str,
    tensors: dict[str, Tensor],
    *,
    floor: float = 1.0,
    use: tuple[bool, bool] = (True, True),
    backward: bool = True,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Output, final state and all gradients against the recurrence in float64; `use`: of which results.

    The kernel works in float32 whatever its inputs are. floor: size of the terms of a sum, at which it rounds. In a
    chunk of the delta rule what the state holds under a key and what was written since may cancel.
    """
    few, many = (SLACK_ULP, 16) if op == "gated_linear_attention" else (16, 32)
    dtype = next(iter(tensors.values())).dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact, work = widened(tensors, torch.float64), widened(tensors, wide)
    got = run(lcore, op, tensors, **arguments)
    want, working = run(reference, op, exact, **arguments), run(reference, op, work, **arguments)
    assert got[0].dtype == dtype and got[1].dtype == wide and got[0].is_contiguous()
    for name, x, y, z in zip(("out", "final state"), got, want, working, strict=True):
        rounded = x.dtype != wide
        slack_ulp = None if rounded or wide == torch.float64 else few
        assert_close(x, y, z.to(x.dtype), name, slack_ulp=slack_ulp, floor=0.0 if rounded else floor)
    if not backward:
        return got
    grads = tuple(torch.randn_like(x).to(x.dtype) if used else None for x, used in zip(got, use, strict=True))
    ours = gradients(lcore, op, tensors, grads, **arguments)
    wide_grads = [tuple(None if d is None else d.to(t) for d in grads) for t in (torch.float64, wide)]
    want_grads = gradients(reference, op, exact, wide_grads[0], **arguments)
    working_grads = gradients(reference, op, work, wide_grads[1], **arguments)
    for name, x in ours.items():
        assert x.dtype == tensors[name].dtype and x.shape == tensors[name].shape
        rounded = x.dtype != wide
        slack_ulp = None if rounded or wide == torch.float64 else many
        size = 0.05 * floor if rounded else floor
        working = working_grads[name].to(x.dtype)
        assert_close(x, want_grads[name], working, f"gradient of {name}", slack_ulp=slack_ulp, floor=size)
    return got
