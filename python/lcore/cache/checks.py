"""Argument checks of the paged cache, all before any state changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore.cache.layout import FORMAT_OF_DTYPE, PageLayout
from lcore.errors import check_tensor, require, require_type

_CPU = torch.device("cpu")


def check_geometry(
    sizes: dict[str, int],
    head_dim_v: int | None,
    dtype: torch.dtype,
    device: str | torch.device,
    rotate: bool,
    policy: Any,
    max_bytes: int | None,
) -> None:
    name = "PagedCache"
    for argument, size in (sizes if head_dim_v is None else {**sizes, "head_dim_v": head_dim_v}).items():
        require_type(isinstance(size, int), name, argument, "be an integer >= 1", size)
        require(size >= 1, name, argument, "be an integer >= 1", size)
        if argument.startswith("head_dim"):
            require(size <= 512, name, argument, "be at most 512", size)
    require_type(dtype in FORMAT_OF_DTYPE, name, "dtype", "be float32, float16 or bfloat16", dtype)
    if torch.device(device).type != "cpu":
        raise NotImplementedError(f"lcore.PagedCache: no kernels for device {device} yet; use device='cpu'")
    if rotate:
        raise NotImplementedError("lcore.PagedCache: rotate=True needs the low-bit formats, which are not there yet")
    if policy is not None:
        raise NotImplementedError("lcore.PagedCache: eviction policies are not there yet; use policy=None")
    require(max_bytes is None or max_bytes >= 0, name, "max_bytes", "be None or >= 0", max_bytes)


def check_layer(function: str, layer: int, num_layers: int) -> None:
    rule = f"be an integer in [0, {num_layers})"
    require_type(isinstance(layer, int), f"PagedCache.{function}", "layer", rule, layer)
    require(0 <= layer < num_layers, f"PagedCache.{function}", "layer", rule, layer)


def check_new_tokens(
    k: Tensor, v: Tensor, batch: int, kv_heads: int, layout: PageLayout, dtype: torch.dtype
) -> None:
    name = "PagedCache.append"
    check_tensor(name, "k", k, dtypes=(dtype,), device=_CPU, shape=(batch, "*", kv_heads, layout.head_dim),
                 names="batch, new, kv_heads, head_dim")  # fmt: skip
    check_tensor(name, "v", v, dtypes=(dtype,), device=_CPU, shape=(batch, k.shape[1], kv_heads, layout.head_dim_v),
                 names="batch, new, kv_heads, head_dim_v")  # fmt: skip


def check_query(
    q: Tensor,
    batch: int,
    kv_heads: int,
    layout: PageLayout,
    dtype: torch.dtype,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> None:
    name = "PagedCache.attend"
    check_tensor(name, "q", q, dtypes=(dtype,), device=_CPU, shape=(batch, "*", "*", layout.head_dim),
                 names="batch, new, heads, head_dim")  # fmt: skip
    heads = q.shape[2]
    rule = f"have heads a positive multiple of kv_heads {kv_heads}"
    require(heads > 0 and heads % kv_heads == 0, name, "q", rule, heads)
    if alibi_slopes is not None:
        shape = (heads,) if alibi_slopes.dim() == 1 else (batch, heads)
        check_tensor(name, "alibi_slopes", alibi_slopes, dtypes=(torch.float32,), device=_CPU, shape=shape,
                     names="heads" if alibi_slopes.dim() == 1 else "batch, heads")  # fmt: skip
    if sinks is not None:
        check_tensor(name, "sinks", sinks, device=_CPU, shape=(heads,), names="heads")


def row_lengths(function: str, lengths: Tensor | None, batch: int, new: int) -> Tensor | None:
    """The right-padded rows' lengths as contiguous int64, checked."""
    if lengths is None:
        return None
    name = f"PagedCache.{function}"
    check_tensor(name, "lengths", lengths, dtypes=(torch.int64, torch.int32), device=_CPU, shape=(batch,),
                 names="batch")  # fmt: skip
    values = lengths.tolist()
    require(all(0 <= n <= new for n in values), name, "lengths", f"lie in [0, {new}]", values)
    return lengths.to(torch.int64).contiguous()
