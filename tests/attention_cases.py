"""Attention inputs, and the comparison of lcore.attention with the formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from tolerance import assert_close
from torch import Tensor

import lcore
from lcore import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 8, 16, 40, 59, 64, 80, 111, 128, 192, 256, 512)
HEAD_DIM_PAIRS = ((192, 128), (64, 512), (40, 59), (8, 1), (16, 80), (129, 17))
GROUPS = ((1, 1), (3, 1), (7, 7), (6, 2), (7, 1), (21, 3))

# (seq_q, seq_k) on both sides of a forward tile (192 rows x 128 keys) and a backward tile (96 x 128).
SIZES = ((1, 1), (1, 129), (95, 96), (97, 127), (128, 128), (129, 257), (191, 130), (192, 192), (193, 300), (391, 129))

WINDOWS = ((-1, -1), (0, 0), (0, -1), (-1, 0), (5, 3), (200, 0), (-1, 130), (17, 1 << 40), (1 << 40, 0), (256, 256))


def random_qkv(
    seq_q: int,
    seq_k: int,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    q = torch.randn(batch, seq_q, heads, head_dim).to(dtype)
    k = torch.randn(batch, seq_k, kv_heads, head_dim).to(dtype)
    v = torch.randn(batch, seq_k, kv_heads, head_dim_v).to(dtype)
    return q, k, v


def random_packed(
    lengths_q: list[int], lengths_k: list[int], tail: int = 0, **sizes: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Packed q, k, v with `tail` tokens behind the last sequence, and the offsets as arguments."""
    q, k, v = random_qkv(sum(lengths_q) + tail, sum(lengths_k) + tail, **sizes)
    offsets = {
        name: torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for name, lengths in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k))
    }
    return q[0], k[0], v[0], offsets


def everything(heads: int, rows: int | None = None) -> dict[str, Any]:
    """Every argument at once; ALiBi slopes (rows, heads) when rows is given."""
    slopes = torch.rand(heads) if rows is None else torch.rand(rows, heads)
    scores = {"softmax_scale": 0.3, "softcap": 5.0, "alibi_slopes": slopes * 0.1, "sinks": torch.randn(heads)}
    return {"causal": True, "window_size": (150, -1), **scores}


def _in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    sinks = arguments.get("sinks")
    return arguments if sinks is None else {**arguments, "sinks": sinks.to(dtype)}


def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether the kernel rounds its weights to this dtype: where the instruction set multiplies pairs of bfloat16."""
    return dtype == torch.bfloat16 and lcore.build_info()["cpu_isa"].endswith("_bf16")


@contextmanager
def working_precision(dtype: torch.dtype) -> Iterator[None]:
    """Where the kernel's weights are rounded, the formula's are as well."""
    if not multiplies_in(dtype):
        yield
        return
    exact = torch.exp
    with mock.patch.object(torch, "exp", lambda x: exact(x).to(dtype).to(x.dtype)):
        yield


def check_forward(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The kernel accumulates in float32 whatever its inputs are: float32 is the working precision of 16 bit inputs, but
    for the weights where 16 bits are multiplied.
    """
    out, lse = lcore.attention(q, k, v, **arguments, return_lse=True)
    want = reference.attention(q.double(), k.double(), v.double(), **_in_dtype(arguments, torch.float64))
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide = [x.to(work) for x in (q, k, v)]
    working = reference.attention(*wide, **_in_dtype(arguments, work))
    with working_precision(q.dtype):
        working_out, _ = reference.attention(*wide, **_in_dtype(arguments, work))
    assert out.dtype == q.dtype and out.is_contiguous()
    # A float32 sum rounds at the size of its terms, which random values of size 1 average far below.
    assert_close(out, want[0], working_out.to(q.dtype), "out", floor=0.0 if q.dtype in HALVES else 1.0)
    assert_close(lse, want[1], working[1], "lse")
    return out, lse


def gradients(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Gradients of <out, dout> + <lse, dlse> where lse is finite, by the inputs' names."""
    leaves = {"q": q, "k": k, "v": v}
    if arguments.get("sinks") is not None:
        leaves["sinks"] = arguments["sinks"]
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out, lse = attention(**{**arguments, **leaves})
    roots, grads = [out], [dout]
    if dlse is not None:
        roots.append(lse)
        grads.append(torch.where(lse.detach().isfinite(), dlse, 0.0))
    found = torch.autograd.grad(roots, list(leaves.values()), grads)
    return dict(zip(leaves, found, strict=True))


def lcore_with_lse(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = lcore.attention(q, k, v, **arguments, return_lse=True)
    return out, lse


def check_backward(
    q: Tensor, k: Tensor, v: Tensor, *, with_lse: bool = True, dout: Tensor | None = None, **arguments: Any
) -> dict[str, Tensor]:
    """All gradients against the formula's; returns the kernel's."""
    out, lse = lcore_with_lse(q, k, v, **arguments)
    dout = torch.randn_like(out) if dout is None else dout
    dlse = torch.randn_like(lse) if with_lse else torch.zeros_like(lse)
    inputs = (q, k, v, dout)
    got = gradients(lcore_with_lse, *inputs, dlse if with_lse else None, arguments)

    exact = _in_dtype(arguments, torch.float64)
    want = gradients(reference.attention, *(x.double() for x in inputs), dlse.double(), exact)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide, same = [x.to(work) for x in inputs], _in_dtype(arguments, work)
    off = _rounding_of_out(*wide, q.dtype, same)
    with working_precision(q.dtype):
        working = gradients(reference.attention, *wide, dlse - off, same)

    for name, x in got.items():
        # dP - delta cancels where a row sees one key: what is left is float32 rounding of terms of size
        # softmax_scale * sqrt(head_dim_v), about sqrt(head_dim_v / head_dim).
        floor = 0.02 if x.dtype in HALVES else max(1.0, (v.shape[-1] / q.shape[-1]) ** 0.5)
        slack_ulp = _gradient_slack(x.dtype, lse)
        assert_close(x, want[name], working[name].to(x.dtype), f"gradient of {name}", slack_ulp=slack_ulp, floor=floor)
    return got


def _rounding_of_out(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype, arguments: dict[str, Any]
) -> Tensor:
    """What delta = dout . out is off by because the forward kept out in dtype, shaped as lse: it acts as -dlse does."""
    out, _ = reference.attention(q, k, v, **arguments)
    return ((out.to(dtype).to(out.dtype) - out) * dout).sum(dim=-1).transpose(-1, -2)


def _gradient_slack(dtype: torch.dtype, lse: Tensor) -> float | None:
    """The backward recomputes e^(score - lse) from a rounded lse: a relative error of |lse| ulp of float32."""
    if dtype != torch.float32:
        return None
    rounded = lse[lse.isfinite()].abs()
    return 16 + (float(rounded.max()) if rounded.numel() else 0.0)
