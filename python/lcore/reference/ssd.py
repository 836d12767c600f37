"""The recurrence of Mamba-2, token by token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What lcore.ssd computes, with its arguments, in float32 (float64 when x is)."""
    work = torch.promote_types(x.dtype, torch.float32)
    group = x.shape[-2] // B.shape[-2]
    xs = x.to(work)
    B, C = (t.repeat_interleave(group, -2).to(work) for t in (B, C))
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    if cu_seqlens is None:
        rows = [[t[i] for t in (xs, step, B, C)] for i in range(x.shape[0])]
    else:
        ends = cu_seqlens.tolist()
        rows = [[t[ends[i] : ends[i + 1]] for t in (xs, step, B, C)] for i in range(len(ends) - 1)]
    zero = x.new_zeros((len(rows), x.shape[-2], x.shape[-1], B.shape[-1]), dtype=work)
    states = zero if initial_state is None else initial_state.to(work)
    results = [_run(row, A.to(work), state) for row, state in zip(rows, states, strict=True)]
    outs = [out if D is None else out + row[0] * (D if D.dim() == 2 else D[:, None]).to(work)
            for row, (out, _) in zip(rows, results, strict=True)]  # fmt: skip
    if cu_seqlens is None:
        y = torch.stack(outs) if outs else xs
    else:
        y = torch.cat([*outs, torch.zeros_like(xs[sum(len(out) for out in outs) :])])
    if z is not None:
        y = y * F.silu(z.to(work))
    final = torch.stack([state for _, state in results]) if results else states
    return (y.to(x.dtype), final) if return_final_state else y.to(x.dtype)


def _run(row: list[Tensor], A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(len, heads, head_dim) and the state behind the last token of one sequence."""
    x, step, B, C = row
    outs = []
    for t in range(x.shape[0]):
        new = step[t, :, None, None] * x[t, :, :, None] * B[t, :, None, :]
        state = torch.exp(step[t] * A)[:, None, None] * state + new
        outs.append((state @ C[t, :, :, None])[..., 0])
    return (torch.stack(outs) if outs else x), state
