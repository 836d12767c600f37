"""Argument checks of `PagedCache`: each before anything changes, each free of text until it fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcore.errors import check_tensor, message, require, require_type

CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)
MAX_TOKENS = 2**31 - 1  # of one head: lengths are int32


def check_int(function: str, argument: str, value: Any, low: int, high: int | None = None) -> None:
    """An integer in [low, high]."""
    rule = f"be an integer >= {low}" if high is None else f"be an integer in [{low}, {high}]"
    require_type(isinstance(value, int) and not isinstance(value, bool), function, argument, rule, repr(value))
    require(value >= low and (high is None or value <= high), function, argument, rule, value)


def check_options(
    function: str,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: str | torch.device,
    rotate: bool,
    max_bytes: int | None,
) -> None:
    """What a cache is made with; NotImplementedError for what is not there yet."""
    for argument, size in sizes.items():
        check_int(function, argument, size, 1)
    require_type(dtype in _DTYPES, function, "dtype", "be float32, float16 or bfloat16", dtype)
    if max_bytes is not None:
        check_int(function, "max_bytes", max_bytes, 0)
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(message(function, "device", "be a torch device", device)) from None
    if kind != "cpu":
        raise NotImplementedError(f"lcore.{function}: no kernels for device {device} yet; use device='cpu'")
    require_type(isinstance(rotate, bool), function, "rotate", "be a bool", repr(rotate))


def check_states(
    function: str, argument: str, x: Any, dtype: torch.dtype, shape: tuple[int | str, ...], names: str
) -> None:
    """q, k or v: (batch, new, heads, dim) with "*" for a free size."""
    if (
        isinstance(x, Tensor)
        and x.dtype is dtype
        and x.device == CPU
        and len(x.shape) == len(shape)
        and all(want in ("*", size) for want, size in zip(shape, x.shape, strict=True))
    ):
        return
    check_tensor(function, argument, x, dtypes=(dtype,), shape=shape, names=names, device=CPU)


def row_counts(function: str, lengths: Any, batch: int, new: int) -> Tensor | None:
    """lengths as contiguous int64 (batch,), each in [0, new]; None when every row is full."""
    if lengths is None:
        return None
    check_tensor(function, "lengths", lengths, dtypes=_INTEGERS, shape=(batch,), names="batch", device=CPU)
    counts = lengths.to(torch.int64).contiguous()
    host = counts.numpy()
    require(host.min() >= 0 and host.max() <= new, function, "lengths", f"lie in [0, {new}]", host.tolist())
    return counts


def row_limits(function: str, argument: str, n: Any, batch: int, high: int | None = None) -> NDArray[np.int64]:
    """A number of tokens for each row, in [0, high], from one for all or a (batch,) tensor."""
    if not isinstance(n, Tensor):
        check_int(function, argument, n, 0, high)
        return np.full(batch, min(n, MAX_TOKENS), dtype=np.int64)
    check_tensor(function, argument, n, dtypes=_INTEGERS, shape=(batch,), names="batch", device=CPU)
    limits = n.to(torch.int64).numpy()
    rule = "be >= 0" if high is None else f"lie in [0, {high}]"
    require(limits.min() >= 0 and (high is None or limits.max() <= high), function, argument, rule, limits.tolist())
    return limits


def check_heads(
    function: str, alibi_slopes: Tensor | None, sinks: Tensor | None, batch: int, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """alibi_slopes and sinks as the kernel takes them: float32 and contiguous."""
    if alibi_slopes is not None:
        check_tensor(function, "alibi_slopes", alibi_slopes, dtypes=(torch.float32,), device=CPU)
        fits = tuple(alibi_slopes.shape) in ((heads,), (batch, heads))
        rule = f"have shape ({heads},) or ({batch}, {heads})"
        require(fits, function, "alibi_slopes", rule, tuple(alibi_slopes.shape))
        alibi_slopes = alibi_slopes.detach().contiguous()
    if sinks is not None:
        check_tensor(function, "sinks", sinks, shape=(heads,), names="heads", device=CPU)
        sinks = sinks.detach().to(torch.float32).contiguous()
    return alibi_slopes, sinks


def check_places(
    function: str,
    new: int,
    counts: Tensor | None,
    lengths: NDArray[np.int32],
    seen: NDArray[np.int64],
    thinned: NDArray[np.int64],
    window_size: tuple[int, int],
    alibi_slopes: Tensor | None,
) -> None:
    """The queries are the last tokens held; and where tokens have been evicted, nothing depends on distances."""
    queries = new if counts is None else counts.numpy()
    held = lengths.min(axis=1)
    require((held >= queries).all(), function, "q", f"have at most the {held.tolist()} tokens held by each row", new)
    if not thinned.any():
        return
    for argument, given in (("window_size", window_size[0] >= 0), ("alibi_slopes", alibi_slopes is not None)):
        rule = "not be given once the layer has evicted tokens, because distances between those left are not known"
        require(not given, function, argument, rule, window_size if argument == "window_size" else alibi_slopes)
    behind = (seen[:, None] - thinned).min(axis=1)
    rule = f"have at most {behind.tolist()} rows, the tokens seen since the last one that was evicted"
    require((behind >= queries).all(), function, "q", rule, new)
