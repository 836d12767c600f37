"""Argument checks that recurrent ops share; `name` is the op's."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import torch
from torch import Tensor

from lcore.errors import FLOAT_TYPES, check_kernel, check_tensor, has_values, require, require_type


def wide_dtype(x: Tensor) -> torch.dtype:
    """What states and parameters are kept in: float32, or float64 for float64 activations."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dtypes_beside(x: Tensor) -> tuple[torch.dtype, ...]:
    """What may stand beside activations x: any but float64, or float64 alone."""
    return (torch.float64,) if x.dtype == torch.float64 else tuple(d for d in FLOAT_TYPES if d != torch.float64)


def check_activation(name: str, argument: str, x: Any) -> None:
    """(batch, dim, len), on a device that has a kernel."""
    check_tensor(name, argument, x, shape=("*", "*", "*"), names="batch, dim, len")
    check_kernel(name, x)


def check_flag(name: str, argument: str, value: Any) -> None:
    require_type(isinstance(value, bool), name, argument, "be a bool", value)


def check_parameter(name: str, argument: str, value: Any, x: Tensor, shape: tuple[Any, ...], names: str) -> Tensor:
    """A parameter of the given shape, contiguous in the dtype that states have."""
    check_tensor(name, argument, value, dtypes=dtypes_beside(x), device=x.device, shape=shape, names=names)
    return value.to(wide_dtype(x)).contiguous()


def check_packing(name: str, x: Tensor, cu_seqlens: Tensor | None) -> int | torch.SymInt:
    """The number of sequences: the batch, or those that cu_seqlens packs into its one row."""
    if cu_seqlens is None:
        return x.shape[0]
    check_tensor(name, "cu_seqlens", cu_seqlens, dtypes=(torch.int32,), device=x.device, shape=("*",),
                 names="sequences + 1")  # fmt: skip
    require(cu_seqlens.shape[0] >= 1, name, "cu_seqlens", "have at least one entry", 0)
    require(cu_seqlens.is_contiguous(), name, "cu_seqlens", "be contiguous", f"strides {cu_seqlens.stride()}")
    require(x.shape[0] == 1, name, "batch", "be 1 with cu_seqlens", x.shape[0])
    if has_values(cu_seqlens):
        offsets, steps = cu_seqlens.tolist(), x.shape[-1]
        require(offsets[0] == 0, name, "cu_seqlens", "begin with 0", offsets[0])
        fall = next((i for i, (a, b) in enumerate(itertools.pairwise(offsets)) if a > b), None)
        require(fall is None, name, "cu_seqlens", "never fall", f"{offsets[fall or 0 : (fall or 0) + 2]} at {fall}")
        require(offsets[-1] <= steps, name, "cu_seqlens", f"end within {steps} steps", offsets[-1])
    return cu_seqlens.shape[0] - 1


def check_state(name: str, argument: str, state: Any, x: Tensor, shape: tuple[Any, ...], names: str) -> Tensor:
    check_tensor(name, argument, state, dtypes=(wide_dtype(x),), device=x.device, shape=shape, names=names)
    return state.contiguous()


def check_slots(name: str, state_indices: Any, x: Tensor, slots: int | torch.SymInt) -> None:
    """(batch,) int64, each a slot that no other row has, or negative."""
    check_tensor(name, "state_indices", state_indices, dtypes=(torch.int64,), device=x.device, shape=(x.shape[0],),
                 names="batch")  # fmt: skip
    require(state_indices.is_contiguous(), name, "state_indices", "be contiguous", f"strides {state_indices.stride()}")
    if has_values(state_indices):
        used = [i for i in state_indices.tolist() if i >= 0]
        require(max(used, default=-1) < slots, name, "state_indices", f"be below {slots} slots", max(used, default=-1))
        twice = next((i for i, n in collections.Counter(used).items() if n > 1), None)
        require(twice is None, name, "state_indices", "name no slot twice", twice)


def keeps_for_backward(*tensors: Tensor | None) -> bool:
    """Whether a backward may come: then the forward keeps the states that it starts from."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
