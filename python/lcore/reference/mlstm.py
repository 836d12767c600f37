"""The matrix memory of xLSTM, token by token as its recurrence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """What lcore.mlstm computes, with its arguments, in float32 (float64 when q is)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    work = torch.promote_types(q.dtype, torch.float32)
    group = v.shape[-2] // q.shape[-2]
    q, k = (x.repeat_interleave(group, -2) for x in (scale * q.to(work), k.to(work)))
    rows = [q, k, v.to(work), i.to(work), F.logsigmoid(f.to(work))]
    ends = [] if cu_seqlens is None else cu_seqlens.tolist()
    count = q.shape[0] if cu_seqlens is None else len(ends) - 1
    heads, key_dim, value_dim = v.shape[-2], q.shape[-1], v.shape[-1]
    shapes = ((count, heads, key_dim, value_dim), (count, heads, key_dim), (count, heads))
    c, n, m = (x.to(work) for x in initial_state or (q.new_zeros(shape) for shape in shapes))
    if cu_seqlens is None:
        out, state = _run(rows, (c, n, m))
    else:
        outs, states = [v.new_zeros((0, *v.shape[1:]), dtype=work)], [(c[:0], n[:0], m[:0])]
        for s in range(count):
            one = [x[ends[s] : ends[s + 1]][None] for x in rows]
            part, last = _run(one, (c[s : s + 1], n[s : s + 1], m[s : s + 1]))
            outs.append(part[0])
            states.append(last)
        loose = v.new_zeros((v.shape[0] - ends[-1], *v.shape[1:]), dtype=work)  # tokens behind the last sequence
        out = torch.cat([*outs, loose])
        c, n, m = (torch.cat(parts) for parts in zip(*states, strict=True))
        state = c, n, m
    return (out.to(v.dtype), state) if return_final_state else out.to(v.dtype)


def _run(rows: list[Tensor], state: State) -> tuple[Tensor, State]:
    """(batch, len, heads, value_dim) and the state behind the last token."""
    q, k, v, i, log_f = rows
    c, n, m = state
    outs = []
    for t in range(q.shape[1]):
        before, m = m, torch.maximum(log_f[:, t] + m, i[:, t])
        keep, add = torch.exp(log_f[:, t] + before - m), torch.exp(i[:, t] - m)
        c = keep[..., None, None] * c + add[..., None, None] * k[:, t, ..., None] * v[:, t, :, None]
        n = keep[..., None] * n + add[..., None] * k[:, t]
        norm = torch.maximum((q[:, t] * n).sum(-1).abs(), torch.exp(-m))
        outs.append((q[:, t, :, None] @ c)[..., 0, :] / norm[..., None])
    return (torch.stack(outs, 1) if outs else v.new_zeros(v.shape)), (c, n, m)
