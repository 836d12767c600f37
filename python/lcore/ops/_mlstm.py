"""Fake kernels and autograd of the op that mlstm runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.ops._linear_attention import no_double_backward, sequences_of
from lcore.ops.recurrent_checks import wide_dtype


@torch.library.register_fake("lcore::_mlstm")
def _fake(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, scale: float, initial_c: Tensor | None = None,
    initial_n: Tensor | None = None, initial_m: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads = (sequences_of(q, cu_seqlens), v.shape[-2])
    shapes = ((*heads, q.shape[-1], v.shape[-1]), (*heads, q.shape[-1]), heads)
    c, n, m = (q.new_empty(shape, dtype=wide_dtype(q)) for shape in shapes)
    return v.new_empty(v.shape), c, n, m


@torch.library.register_fake("lcore::_mlstm_backward")
def _backward_fake(
    dout: Tensor, dc: Tensor | None, dn: Tensor | None, dm: Tensor | None, q: Tensor, k: Tensor, v: Tensor, i: Tensor,
    f: Tensor, scale: float, initial_c: Tensor | None, initial_n: Tensor | None, initial_m: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    c, n, m = _fake(q, k, v, i, f, scale, cu_seqlens=cu_seqlens)[1:]
    if initial_c is None:
        c, n, m = q.new_empty((0,), dtype=c.dtype), n[:0], m[:0]
    return (*(x.new_empty(x.shape) for x in (q, k, v, i, f)), c, n.new_empty(n.shape), m.new_empty(m.shape))


@torch.library.register_fake("lcore::_mlstm_update")
def _update_fake(
    c: Tensor, n: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, scale: float,
    state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, c, n, m, cu_seqlens = inputs
    _, final_c, final_n, _ = output
    ctx.save_for_backward(*tensors, c, n, m, cu_seqlens, final_c, final_n)
    ctx.scale = scale
    ctx.set_materialize_grads(False)  # the final state is rarely used


def _backward(
    ctx: Any, dout: Tensor | None, dc: Tensor | None, dn: Tensor | None, dm: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, i, f, initial_c, initial_n, initial_m, cu_seqlens, final_c, final_n = ctx.saved_tensors
    if dout is None and dc is None and dn is None and dm is None:
        return (None,) * 10
    if dout is None:
        dout = torch.zeros_like(v, memory_format=torch.contiguous_format)
    if dc is not None or dn is not None or dm is not None:
        dc = torch.zeros_like(final_c) if dc is None else dc.contiguous()
        dn = torch.zeros_like(final_n) if dn is None else dn.contiguous()
        # C and n hold e^-m: what m does to them goes with what it does itself.
        held = _held(dc, final_c, dn, final_n)
        dm = -held if dm is None else dm - held
    *grads, dc, dn, dm = torch.ops.lcore._mlstm_backward(
        dout, dc, dn, dm, q, k, v, i, f, ctx.scale, initial_c, initial_n, initial_m, cu_seqlens
    )
    if initial_c is None:
        return (*grads, None, None, None, None, None)
    return (*grads, None, dc, dn, dm + _held(dc, initial_c, dn, initial_n), None)


def _held(dc: Tensor, c: Tensor, dn: Tensor, n: Tensor) -> Tensor:
    return (dc * c).sum((-1, -2)) + (dn * n).sum(-1)


torch.library.register_autograd("lcore::_mlstm", _backward, setup_context=_save)
torch.library.register_autograd("lcore::_mlstm_backward", no_double_backward)
