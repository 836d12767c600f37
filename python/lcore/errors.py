"""The one place that words an error: ``lcore.<function>: <argument> must be <rule>, got <value>``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLOAT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Devices that each public op has a kernel for; what is missing raises NotImplementedError before the dispatcher would.
KERNEL_DEVICES: dict[str, tuple[str, ...]] = {
    "attention": ("cpu", "cuda"),
    "attention_paged": ("cpu", "cuda"),
    "cache_append_": ("cpu", "cuda"),
    "causal_conv1d": ("cpu", "cuda"),
    "causal_conv1d_update": ("cpu", "cuda"),
    "gated_delta_rule": ("cpu",),
    "gated_delta_rule_update": ("cpu",),
    "gated_linear_attention": ("cpu",),
    "gated_linear_attention_update": ("cpu",),
    "hadamard": ("cpu", "cuda"),
    "cache_compact_": ("cpu", "cuda"),
    "key_mass": ("cpu",),
    "key_mass_paged": ("cpu",),
    "merge_states": ("cpu", "cuda"),
    "mlstm": ("cpu",),
    "mlstm_update": ("cpu",),
    "page_bounds": ("cpu", "cuda"),
    "page_bounds_paged": ("cpu", "cuda"),
    "page_scores": ("cpu", "cuda"),
    "rope": ("cpu", "cuda"),
    "rwkv4_wkv": ("cpu",),
    "rwkv4_wkv_update": ("cpu",),
    "rwkv6": ("cpu",),
    "rwkv6_update": ("cpu",),
    "rwkv7": ("cpu",),
    "rwkv7_update": ("cpu",),
    "select_pages": ("cpu", "cuda"),
    "selective_scan": ("cpu", "cuda"),
    "selective_state_update": ("cpu", "cuda"),
    "ssd": ("cpu",),
}


def message(function: str, argument: str, rule: str, got: object) -> str:
    return f"lcore.{function}: {argument} must {rule}, got {got}"


def require(condition: bool, function: str, argument: str, rule: str | Callable[[], str], got: object) -> None:
    """ValueError unless condition holds: for shapes and values.

    A rule that prints a tensor's size is a function: printing a symbolic size while torch.compile traces fixes it.
    """
    if not condition:
        raise ValueError(message(function, argument, rule if isinstance(rule, str) else rule(), got))


def require_type(condition: bool, function: str, argument: str, rule: str, got: object) -> None:
    """TypeError unless condition holds: for types and dtypes."""
    if not condition:
        raise TypeError(message(function, argument, rule, got))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(pattern: Sequence[int | str | torch.SymInt], names: str) -> str:
    """'have shape (batch, seq) = (2, *)' for pattern (2, "*") and names "batch, seq"."""
    tail = "," if len(pattern) == 1 else ""
    return f"have shape ({names}{tail}) = ({', '.join(str(n) for n in pattern)}{tail})"


def check_tensor(
    function: str,
    argument: str,
    value: Any,
    *,
    dtypes: Sequence[torch.dtype] = FLOAT_TYPES,
    shape: Sequence[int | str | torch.SymInt] | None = None,
    names: str = "",
    device: torch.device | None = None,
) -> None:
    """Checks type, dtype, device and shape, in this order; "*" in shape stands for any size."""
    require_type(isinstance(value, torch.Tensor), function, argument, "be a torch.Tensor", type(value).__name__)
    wanted = " or ".join(dtype_name(d) for d in dtypes)
    require_type(value.dtype in dtypes, function, argument, f"have dtype {wanted}", dtype_name(value.dtype))
    if device is not None:
        require(value.device == device, function, argument, f"be on device {device}", value.device)
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            isinstance(want, str) or size == want for size, want in zip(value.shape, shape, strict=True)
        )
        if not fits:  # the text is only built here: symbolic sizes cannot be printed while tracing
            raise ValueError(message(function, argument, shape_text(shape, names), tuple(value.shape)))


def check_kernel(function: str, tensor: torch.Tensor) -> None:
    """NotImplementedError when no kernel of this function runs where the tensor is; meta tensors need none."""
    devices = KERNEL_DEVICES[function]
    if tensor.device.type not in (*devices, "meta"):
        raise NotImplementedError(
            f"lcore.{function}: no kernel for device {tensor.device.type}; there is one for {' and '.join(devices)}"
        )


def check_number(function: str, argument: str, value: Any, *, least: float = -sys.float_info.max) -> None:
    """A finite number of at least `least`; by comparisons, which torch.compile can trace on a symbolic float."""
    rule = "be a finite number" if least < 0 else f"be a finite number >= {least:g}"
    require_type(isinstance(value, (int, float, torch.SymFloat, torch.SymInt)), function, argument, rule, value)
    require(least <= value <= sys.float_info.max, function, argument, rule, value)


def has_values(*tensors: torch.Tensor) -> bool:
    """Whether values can be read at no cost: not while tracing, not on a GPU, where reading waits for the stream."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not torch.compiler.is_compiling() and all(
        t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in tensors
    )
