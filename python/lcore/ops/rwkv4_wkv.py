"""The WKV of RWKV-4."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_kernel, check_tensor, require
from lcore.ops._linear_attention import composite
from lcore.ops.attention_checks import check_offsets
from lcore.ops.linear_attention_checks import check_state
from lcore.ops.recurrent_checks import check_slots, dtypes_beside, wide_dtype

_NAME = "rwkv4_wkv"
_UPDATE = "rwkv4_wkv_update"


@overload
def rwkv4_wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def rwkv4_wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def rwkv4_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """For each channel a mean of the values so far, with weights e^k that decay; the token's own counts e^u more.

    Formula: out_t = (A_(t-1) + e^(u + k_t) v_t) / (B_(t-1) + e^(u + k_t));
        A_t = e^w A_(t-1) + e^(k_t) v_t; B_t = e^w B_(t-1) + e^(k_t).
        RWKV-4 has w = -e^(time_decay) and u = time_first.

    Args:
        w: log-decay of each channel, (dim,), 0 or below; u: (dim,); any dtype (float64 with float64 alone).
        k, v: (batch, len, dim), or packed (tokens, dim) with cu_seqlens; float32, float64, float16 or bfloat16, any
            strides.
        initial_state: (sequences, 3, dim), float32 (float64 for float64 inputs): aa, bb and pp, which stand for
            A = aa e^pp and B = bb e^pp; default: nothing yet, aa = bb = 0 and pp = -1e38.
        cu_seqlens: int32 (sequences + 1,) token offsets of packed sequences, from 0, never falling.
        return_final_state: also return the state behind the last token.

    Returns:
        out: v's shape and dtype; and with return_final_state
        final_state: shaped as initial_state. That of a sequence without tokens is its initial state. Tokens behind the
        last packed sequence get out 0 and gradients 0.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for w, u, k, v and initial_state, through out and through final_state; no double backward. No
        exponential exceeds 1, whatever the size of k. Accumulates in float32. The output's bits depend neither on the
        batch nor on the number of threads, nor on where a text is cut, if the state is handed over.

    Source: Peng et al. 2023, RWKV, arXiv:2305.13048, section 3.1.2 and appendix D.
    """
    names = "batch, len, dim" if cu_seqlens is None else "tokens, dim"
    _check(_NAME, w, u, k, v, names)
    sequences = k.shape[0]
    if cu_seqlens is not None:
        check_offsets(_NAME, "cu_seqlens", cu_seqlens, k, None, "")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = (sequences, 3, k.shape[-1])
        check_state(_NAME, "initial_state", initial_state, k, shape, "sequences, 3, dim")
    out, state = torch.ops.lcore.rwkv4_wkv(w, u, k, v, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def _check(name: str, w: Any, u: Any, k: Any, v: Any, names: str) -> None:
    check_tensor(name, "k", k, shape=("*",) * len(names.split()), names=names)
    check_kernel(name, k)
    check_tensor(name, "v", v, dtypes=(k.dtype,), device=k.device, shape=k.shape, names=names)
    check = partial(check_tensor, name, dtypes=dtypes_beside(k), device=k.device, shape=k.shape[-1:], names="dim")
    check("w", w)
    check("u", u)


@composite(
    _NAME,
    "(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial_state=None, Tensor? cu_seqlens=None)"
    " -> (Tensor out, Tensor final_state)",
)
def _rwkv4_wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    w, u = (x.to(wide_dtype(k)).contiguous() for x in (w, u))
    state = None if initial_state is None else initial_state.contiguous()
    return torch.ops.lcore._rwkv4_wkv(w, u, k, v, state, cu_seqlens)


def rwkv4_wkv_update(
    state: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, state_indices: Tensor | None = None
) -> Tensor:
    """One token of `rwkv4_wkv` for each row of a batch; its state is updated in place.

    Formula: that of `rwkv4_wkv` for one token.

    Args:
        state: (slots, 3, dim), contiguous float32 (float64 for float64 inputs), written: aa, bb and pp.
        w, u: (dim,); k, v: (batch, dim), as `rwkv4_wkv`, any strides.
        state_indices: as `lcore.gated_linear_attention_update`.

    Returns:
        out: v's shape and dtype.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: no gradients. The bits are those of `rwkv4_wkv`.

    Source: as `rwkv4_wkv`.
    """
    _check(_UPDATE, w, u, k, v, "batch, dim")
    slots = "*" if state_indices is not None else k.shape[0]
    check_state(_UPDATE, "state", state, k, (slots, 3, k.shape[-1]), "slots, 3, dim")
    require(state.is_contiguous(), _UPDATE, "state", "be contiguous", f"strides {state.stride()}")
    if state_indices is not None:
        check_slots(_UPDATE, state_indices, k, state.shape[0])
    return torch.ops.lcore.rwkv4_wkv_update(state, w, u, k, v, state_indices)


@composite(
    _UPDATE,
    "(Tensor(a!) state, Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state_indices=None) -> Tensor",
)
def _update(state: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state_indices: Tensor | None = None) -> Tensor:
    w, u = (x.to(wide_dtype(k)).contiguous() for x in (w, u))
    return torch.ops.lcore._rwkv4_wkv_update(state, w, u, k, v, state_indices)


@torch.library.register_fake("lcore::_rwkv4_wkv")
def _fake(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), w.new_empty((sequences, 3, k.shape[-1]))


@torch.library.register_fake("lcore::_rwkv4_wkv_backward")
def _backward_fake(
    dout: Tensor, dstate: Tensor | None, w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    sequences = 0 if initial_state is None else initial_state.shape[0]
    return (*(x.new_empty(x.shape) for x in (w, u, k, v)), w.new_empty((sequences, 3, k.shape[-1])))


@torch.library.register_fake("lcore::_rwkv4_wkv_update")
def _update_fake(
    state: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state_indices: Tensor | None = None
) -> Tensor:
    return v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)  # the final state is rarely used


def _backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    w, u, k, v, initial_state, cu_seqlens = ctx.saved_tensors
    if dout is None and dstate is None:
        return (None,) * 6
    dout = torch.zeros_like(v) if dout is None else dout
    dstate = None if dstate is None else dstate.contiguous()
    *grads, dinitial = torch.ops.lcore._rwkv4_wkv_backward(dout, dstate, w, u, k, v, initial_state, cu_seqlens)
    return (*grads, None if initial_state is None else dinitial, None)


torch.library.register_autograd("lcore::_rwkv4_wkv", _backward, setup_context=_save)


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "lcore.rwkv4_wkv: no second derivative; use lcore.reference.rwkv4_wkv, which is plain torch"
    )


torch.library.register_autograd("lcore::_rwkv4_wkv_backward", _no_double_backward)
