"""Scans, chunked recurrences and the short convolution on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lcore
from bench.gpu import peers
from bench.gpu.device import Call, Device
from bench.gpu.measure import Peer, measured, rate
from bench.machine import Row
from lcore import reference

CHECKED = 128  # steps that are compared with the float64 reference
BOUND = 2**-6  # of the output's norm


def checked(op: Callable[..., Any], oracle: Callable[..., Any], tensors: list[Tensor], along: list[int | None]) -> Call:
    """op on the tensors, its first steps compared. along: each tensor's axis of steps, or None."""
    short = [
        x if axis is None else x.narrow(axis, 0, min(CHECKED, x.shape[axis])).contiguous()
        for x, axis in zip(tensors, along, strict=True)
    ]
    got, want = op(*short), oracle(*(x.double() for x in short))
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < BOUND, f"relative error {error:.2e}"
    return torch.no_grad()(partial(op, *tensors))


def normal(device: Device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device.name)


def calling(make: Callable[[], Callable[..., Tensor]], *tensors: Tensor) -> Peer:
    return lambda: torch.no_grad()(partial(make(), *tensors))


def scan(device: Device, peaks: dict[str, float]) -> list[Row]:
    """Mamba-1, 16 states."""
    batch, dim, steps, states = (1, 8, 64, 4) if device.small else (8, 4096, 4096, 16)
    u, delta = normal(device, batch, dim, steps), normal(device, batch, dim, steps) * 0.1
    A = -torch.arange(1.0, states + 1, device=device.name).repeat(dim, 1)
    B, C = normal(device, batch, states, steps), normal(device, batch, states, steps)
    tensors = [u, delta, A, B, C]
    op = partial(lcore.selective_scan, delta_softplus=True)
    oracle = partial(reference.selective_scan, delta_softplus=True)
    row = {
        "kind": "gpu_selective_scan", "op": "selective_scan", "dtype": "bf16", "batch": batch, "dim": dim,
        "len": steps, "states": states,
    }  # fmt: skip
    row = measured(
        row, device, lambda: checked(op, oracle, tensors, [2, 2, None, 2, 2]),
        {"mamba_ssm": calling(peers.mamba_scan, *tensors)},
    )  # fmt: skip
    return [rate(row, "elements_per_s", batch * dim * steps)]


def ssd(device: Device, peaks: dict[str, float]) -> list[Row]:
    """Mamba-2: 128 heads of 64, 128 states."""
    batch, steps, heads, width, states = (1, 64, 2, 8, 8) if device.small else (8, 4096, 128, 64, 128)
    x, dt = normal(device, batch, steps, heads, width), torch.rand(batch, steps, heads, device=device.name) * 0.1
    A = -torch.rand(heads, device=device.name) - 0.5
    B, C = normal(device, batch, steps, 1, states), normal(device, batch, steps, 1, states)
    tensors = [x, dt, A, B, C]
    row = {
        "kind": "gpu_ssd", "op": "ssd", "dtype": "bf16", "batch": batch, "len": steps, "heads": heads, "dim": width,
        "states": states,
    }  # fmt: skip
    row = measured(
        row, device, lambda: checked(lcore.ssd, reference.ssd, tensors, [1, 1, None, 1, 1]),
        {"mamba_ssm": calling(peers.mamba_ssd, *tensors)},
    )  # fmt: skip
    return [rate(row, "tokens_per_s", batch * steps)]


def conv1d(device: Device, peaks: dict[str, float]) -> list[Row]:
    """Width 4, with SiLU."""
    batch, dim, steps = (1, 8, 64) if device.small else (8, 4096, 4096)
    x, weight, bias = normal(device, batch, dim, steps), normal(device, dim, 4), normal(device, dim)
    op = partial(lcore.causal_conv1d, activation="silu")
    oracle = partial(reference.causal_conv1d, activation="silu")
    row = {
        "kind": "gpu_causal_conv1d",
        "op": "causal_conv1d",
        "dtype": "bf16",
        "batch": batch,
        "dim": dim,
        "len": steps,
    }
    others = {
        "causal_conv1d": calling(peers.conv1d, x, weight, bias),
        "torch": calling(lambda: peers.torch_conv1d, x, weight, bias),
    }
    row = measured(row, device, lambda: checked(op, oracle, [x, weight, bias], [2, None, None]), others, cold=True)
    return [rate(row, "gbytes_per_s", 2 * x.nbytes / 1e9, peaks.get("copy_gbytes"))]


def linear(device: Device, peaks: dict[str, float]) -> list[Row]:
    """Gated linear attention with a decay a channel, and the gated delta rule."""
    batch, steps, heads, width = (1, 64, 2, 16) if device.small else (8, 4096, 16, 128)
    q, k, v = (normal(device, batch, steps, heads, width) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    channels = -torch.rand(batch, steps, heads, width, device=device.name) * 0.1
    decay, beta = channels[..., 0].contiguous(), torch.rand(batch, steps, heads, device=device.name)
    sizes = {"dtype": "bf16", "batch": batch, "len": steps, "heads": heads, "dim": width}
    rows = []
    cases: list[tuple[str, list[Tensor], Callable[[], Callable[..., Tensor]]]] = [
        ("gated_linear_attention", [q, k, v, channels], peers.gla),
        ("gated_delta_rule", [q, k, v, decay, beta], peers.gated_delta_rule),
    ]
    for op, tensors, peer in cases:
        call = partial(checked, getattr(lcore, op), getattr(reference, op), tensors, [1] * len(tensors))
        row = {"kind": f"gpu_{op}", "op": op, **sizes}
        rows.append(rate(measured(row, device, call, {"fla": calling(peer, *tensors)}), "tokens_per_s", batch * steps))
    return rows
