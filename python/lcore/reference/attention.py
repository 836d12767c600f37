"""Attention as its formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What lcore.attention computes, with its arguments and its formula, every step in q's dtype.

    Returns:
        out: (batch, seq_q, heads, head_dim_v) or (tokens_q, heads, head_dim_v), q's dtype.
        lse: (batch, heads, seq_q) or (heads, tokens_q), float32, or float64 when q is.
        A row that sees no key: out 0, lse -inf (or the sink), gradients 0.

    Notes:
        Differentiable in q, k, v, alibi_slopes and sinks, any number of times. Allocates seq_q x seq_k.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    window = (window_size[0], 0 if causal else window_size[1])
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _attend(q, k, v, window, scale, softcap, alibi_slopes, sinks)

    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    loose = q.shape[0] - ends_q[-1]  # tokens behind the last sequence belong to none
    outs = [q.new_zeros((loose, q.shape[1], v.shape[-1]))]
    lses = [q.new_full((q.shape[1], loose), -math.inf, dtype=_lse_dtype(q))]
    for i in reversed(range(len(ends_q) - 1)):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = _attend(q[rows][None], k[keys][None], v[keys][None], window, scale, softcap, slopes, sinks)
        outs.insert(0, out[0])
        lses.insert(0, lse[0])
    return torch.cat(outs), torch.cat(lses, dim=-1)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def visible(q: Tensor, k: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(seq_q, seq_k) each: which query sees which key, and by how much a key stands ahead of a query's position."""
    position = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    ahead = torch.arange(k.shape[1], device=q.device) - position
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if window[0] >= 0:
        seen = seen & (ahead >= -window[0])
    if window[1] >= 0:
        seen = seen & (ahead <= window[1])
    return seen, ahead


def masked_scores(
    q: Tensor, k: Tensor, window: tuple[int, int], scale: float, softcap: float, alibi_slopes: Tensor | None
) -> Tensor:
    """(batch, heads, seq_q, seq_k): what goes into the exponential, -inf where the query does not see the key."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    seen, ahead = visible(q, k, window)
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.dtype).reshape(-1, q.shape[2], 1, 1)
        scores = scores - slopes * ahead.abs().to(q.dtype)
    # Chosen, not added: a masked score that is NaN must vanish, and so must its gradient.
    return torch.where(seen, scores, -math.inf)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int],
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scores = masked_scores(q, k, window, scale, softcap, alibi_slopes)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    top = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), -math.inf)], dim=-1).amax(dim=-1).detach()
    top = torch.where(top.isneginf(), 0.0, top)
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(dim=-1)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, top + torch.log(total))
    out = torch.einsum("bhij,bjhd->bihd", weights / total[..., None], v)
    if sinks is not None:
        keep, lse = _add_sinks(lse, sinks.to(q.dtype)[:, None])
        out = out * keep.transpose(1, 2)[..., None]
    return out, lse.to(_lse_dtype(q))


def _add_sinks(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """lse <- ln(e^lse + e^sink), and the share of the mass that the keys keep, e^(old lse - new lse)."""
    nothing = lse.isneginf() & sinks.isneginf()
    known = torch.where(nothing, 0.0, lse)  # keeps -inf - (-inf) out of the graph
    keep = torch.where(nothing, 0.0, torch.sigmoid(known - sinks))
    return keep, torch.where(nothing, -math.inf, torch.logaddexp(known, sinks))
