"""The recurrences of linear attention in plain torch, by chunks of matrix products: what lcore is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    u: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """(batch, len, heads, value_dim) of tensors laid out so: batched products over all chunks, a loop over the states.

    g (batch, len, heads), or (batch, len, heads, key_dim): then as (Q e^c)(K e^-c)^T with c the sum of g from the
    chunk's begin, the fastest way in torch, which overflows where a chunk decays by more than e^-88 (lcore's does not).
    With beta by the delta rule: a triangular solve a chunk. With u RWKV-6: queries meet the state before their token.
    With a and b RWKV-7: another solve, for what is found under a and written under b.
    Computes in float32, whatever the inputs are; len is a multiple of 64.
    """
    dtype, length = v.dtype, q.shape[1]
    # (batch, heads, chunks, 64, dim)
    q, k, v = (x.float().transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    channels = g.dim() == 4
    g = g.float().transpose(1, 2).unflatten(2, (-1, CHUNK))
    total = (g if channels else g[..., None]).cumsum(3)
    grown = torch.exp(total)
    if channels:
        entered = grown if u is None else torch.exp(total - g)
        q_in, k_out = q * entered, k * torch.exp(total[..., -1:, :] - total)
        against = k * torch.exp(-total)
        scores = (q_in @ against.transpose(-1, -2)).tril(0 if u is None else -1)
        if u is not None:
            scores = scores + torch.diag_embed((q * k * u[:, None, None]).sum(-1))
    else:
        q_in, k_out = q * grown, k * torch.exp(total[..., -1:, :] - total)
        decay = torch.exp((total - total.transpose(-1, -2)).clamp(max=0))
        scores = ((q @ k.transpose(-1, -2)) * decay).tril()
    k_in = k * grown
    sizes = [v.shape[-1], k.shape[-1]]
    if beta is not None:
        strength = beta.float().transpose(1, 2).unflatten(2, (-1, CHUNK))[..., None]
        overlap = k_in @ against.transpose(-1, -2) if channels else (k @ k.transpose(-1, -2)) * decay
        system = (strength * overlap).tril(-1)  # its diagonal counts as 1
        both = torch.cat([strength * v, strength * k_in], -1)
        v, k_in = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True).split(sizes, -1)
    if a is not None and b is not None:
        a, b = (x.float().transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in (a, b))
        a_in, b_out = a * torch.exp(total - g), b * torch.exp(total[..., -1:, :] - total)
        other = (b * torch.exp(-total)).transpose(-1, -2)
        system, scores_b = -(a_in @ other).tril(-1), (q_in @ other).tril()
        both = torch.cat([(a_in @ against.transpose(-1, -2)).tril(-1) @ v, a_in], -1)
        found, a_in = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True).split(sizes, -1)
    state = q.new_zeros((*q.shape[:2], q.shape[-1], v.shape[-1]))
    outs = []
    for c in range(length // CHUNK):
        new = v[:, :, c] if beta is None else v[:, :, c] - k_in[:, :, c] @ state
        out = q_in[:, :, c] @ state + scores[:, :, c] @ new
        behind = grown[:, :, c, -1][..., None] * state + k_out[:, :, c].transpose(-1, -2) @ new
        if a is not None:
            moved = found[:, :, c] + a_in[:, :, c] @ state
            out, behind = out + scores_b[:, :, c] @ moved, behind + b_out[:, :, c].transpose(-1, -2) @ moved
        outs.append(out)
        state = behind
    return torch.stack(outs, 2).flatten(2, 3).transpose(1, 2).to(dtype)


def looped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    u: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """The same, token by token."""
    dtype, wide = v.dtype, [x.float() for x in (q, k, v)]
    q, k, v = wide
    decay = torch.exp(g.float() if g.dim() == 4 else g.float()[..., None])[..., None]
    state = q.new_zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]))
    outs = []
    for t in range(q.shape[1]):
        before, state = state, state * decay[:, t]
        new = v[:, t, :, None]
        if beta is not None:
            new = beta[:, t, :, None, None] * (new - k[:, t, :, None] @ state)
        state = torch.baddbmm(state.flatten(0, 1), k[:, t].flatten(0, 1)[..., None], new.flatten(0, 1)).view_as(state)
        if a is not None and b is not None:
            state = state + b[:, t, :, :, None].float() * (a[:, t, :, None].float() @ before)
        seen = state if u is None else before + (u * k[:, t])[..., None] * new
        outs.append(q[:, t, :, None] @ seen)
    return torch.stack(outs, 1)[..., 0, :].to(dtype)


def mlstm(by: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """As linear attention by one of the above: decays and weights from the gates, the normaliser in one more column."""
    log_f = F.logsigmoid(f.float())
    total = log_f.cumsum(1)
    m = total + (i.float() - total).cummax(1).values.clamp(min=0)
    g = log_f + F.pad(m[:, :-1], (0, 0, 1, 0)) - m
    weight = torch.exp(i.float() - m)[..., None]
    out = by(q, k, torch.cat([v.float() * weight, weight], -1), g)
    norm = torch.maximum(out[..., -1:].abs(), torch.exp(-m)[..., None])
    return (out[..., :-1] / norm).to(v.dtype)
