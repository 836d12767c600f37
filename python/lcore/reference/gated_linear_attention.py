"""Linear attention with decay, token by token as its recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What lcore.gated_linear_attention computes, with its arguments, in float32 (float64 when q is)."""
    out, state = recurrence(q, k, v, g, None, scale, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of every sequence; with beta by the delta rule. Differentiable any number of times.

    Formula: S_t = diag(e^g_t) S_(t-1) + k_t w_t^T, out_t = scale q_t^T S_t; w_t = v_t, or with beta
        w_t = beta_t (v_t - (diag(e^g_t) S_(t-1))^T k_t); with bonus
        out_t = scale q_t^T (S_(t-1) + diag(bonus) k_t w_t^T).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    work = torch.promote_types(q.dtype, torch.float32)
    heads, group = v.shape[-2], v.shape[-2] // q.shape[-2]
    if g.dim() == 1:
        g = g.expand(v.shape[:-1])
    wide = [x.to(work) for x in (q.repeat_interleave(group, -2), k.repeat_interleave(group, -2), v, g)]
    if beta is not None:
        wide.append(beta.to(work))
    shape = (heads, q.shape[-1], v.shape[-1])
    run = partial(_run, scale=scale, bonus=bonus)
    out, state = each_sequence(run, wide, initial_state, shape, cu_seqlens)
    return out.to(v.dtype), state


def each_sequence(
    run: Callable[..., tuple[Tensor, Tensor]],
    rows: list[Tensor],
    initial_state: Tensor | None,
    shape: tuple[int, ...],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Calls run(state, *rows) -> (out, last state) on a batch, or on every packed sequence as a batch of one.

    rows: (batch, len, ...) or packed (tokens, ...), of one dtype; shape: of a state.
    """
    first = rows[0]
    sequences = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zero = first.new_zeros((sequences, *shape))
    state = zero if initial_state is None else initial_state.to(first.dtype)
    if cu_seqlens is None:
        return run(state, *rows)
    ends = cu_seqlens.tolist()
    outs, states = [], []
    for i in range(sequences):
        out, last = run(state[i : i + 1], *(x[ends[i] : ends[i + 1]][None] for x in rows))
        outs.append(out[0])
        states.append(last)
    loose, _ = run(zero[:1], *(x[ends[-1] : ends[-1]][None] for x in rows))  # without tokens, for its shape
    behind = loose.new_zeros((first.shape[0] - ends[-1], *loose.shape[2:]))
    return torch.cat([*outs, behind]), torch.cat([*states, state[:0]])


def _run(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    scale: float,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(batch, len, heads, value_dim) and the state behind the last token."""
    outs = []
    decay = torch.exp(g if g.dim() == 4 else g[..., None])[..., None]
    for t in range(q.shape[1]):
        before = state
        state = decay[:, t] * state
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - (k[:, t, :, None] @ state)[..., 0, :])
        state = state + k[:, t, :, :, None] * new[..., None, :]
        seen = state if bonus is None else before + (bonus.to(k.dtype) * k[:, t])[..., None] * new[..., None, :]
        outs.append(scale * (q[:, t, :, None] @ seen)[..., 0, :])
    return (torch.stack(outs, 1) if outs else v.new_zeros(v.shape)), state
