"""Fake kernels and autograd of ``torch.ops.lcore.attention`` and ``attention_paged``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.ops.attention_checks import lse_dtype


def _results(q: Tensor, head_dim_v: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], head_dim_v))
    return out, q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=lse_dtype(q))


@torch.library.register_fake("lcore::attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _results(q, v.shape[-1])


@torch.library.register_fake("lcore::attention_paged")
def _attention_paged_fake(
    q: Tensor,
    pool: Tensor,
    page_table: Tensor,
    kv_lengths: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    return _results(q, tail_v.shape[-1])


@torch.library.register_fake("lcore::attention_backward")
def _attention_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window_size: list[int],
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense = [x.new_empty(x.shape) for x in (q, k, v)]
    return dense[0], dense[1], dense[2], lse.new_empty((0 if sinks is None else q.shape[-2],))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k = inputs[:11]
    ctx.save_for_backward(q, k, v, *output, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    ctx.arguments = (causal, list(window_size), softmax_scale, softcap)
    ctx.set_materialize_grads(False)  # lse is rarely used: no gradient of zeros for it


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    none = (None,) * 13
    if dout is None and dlse is None:
        return none
    dq, dk, dv, dsinks = torch.ops.lcore.attention_backward(
        torch.zeros_like(out) if dout is None else dout,
        None if dlse is None else dlse.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        *ctx.arguments,
        alibi_slopes,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
    )
    return (dq, dk, dv, None, None, None, None, None, None if sinks is None else dsinks, *none[9:])


torch.library.register_autograd("lcore::attention", _backward, setup_context=_save)


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "lcore.attention: no second derivative; use lcore.reference.attention, which is plain torch"
    )


torch.library.register_autograd("lcore::attention_backward", _no_double_backward)
