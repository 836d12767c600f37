"""Attention on a GPU: forward, backward, decode over pages, merging of states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lcore
from bench.check import Checker
from bench.gpu import peers
from bench.gpu.device import Call, Device
from bench.gpu.measure import Peer, measured, rate
from bench.machine import Row
from bench.shapes import Shape
from lcore import reference

TOKENS, WIDTH = 16384, 2048  # batch * seq and heads * head_dim, as others publish
FLEX_SEQ = 8192  # compiling it takes longer than everything else of a row


def shapes(which: str, small: bool) -> list[Shape]:
    """Of DESIGN's table, and shorter sequences beside them."""
    if small:
        return [Shape(which, "bf16", 96, 32, batch=2, heads=2, kv_heads=2, causal=c) for c in (False, True)]
    cases = [(head_dim, seq) for head_dim in (64, 128, 256) for seq in (1024, 4096, 8192, 16384)]
    if which == "backward":
        cases = [(head_dim, seq) for head_dim in (64, 128) for seq in (2048, 8192, 16384)]
    return [
        Shape(which, "bf16", seq, head_dim, batch=TOKENS // seq, heads=WIDTH // head_dim,
              kv_heads=WIDTH // head_dim, causal=causal)
        for head_dim, seq in cases
        for causal in (False, True)
    ]  # fmt: skip


def inputs(shape: Shape, device: Device) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    sizes = [(shape.batch, shape.seq, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads)]
    order = (sizes[0], sizes[1], sizes[1], sizes[0])
    return [torch.randn(size, dtype=torch.bfloat16, device=device.name) for size in order]


def timed(shape: Shape, call: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor) -> Call:
    """A forward, or a backward alone on a graph that is kept."""
    if shape.which == "forward":
        return torch.no_grad()(partial(call, *tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def ours(shape: Shape, tensors: list[Tensor], dout: Tensor) -> Call:
    """lcore's call, checked."""
    leaves = [x.detach().requires_grad_(shape.which == "backward") for x in tensors]
    out, lse = shape.attention_and_lse(*leaves)
    q, k, v = (x.cpu() for x in tensors)
    checker = Checker(q, k, v, shape.bounds)
    checker.forward(out.detach().cpu())
    if shape.which == "backward":
        grads = torch.autograd.grad(out, leaves, dout)
        host = (out.detach().cpu(), lse.detach().cpu(), dout.cpu())
        checker.backward(*host, tuple(grad.cpu() for grad in grads))
    return timed(shape, shape.attention, tensors, dout)


def attention_row(shape: Shape, device: Device, peak: float | None, deterministic: bool = False) -> Row:
    *tensors, dout = inputs(shape, device)
    by_head = [x.transpose(1, 2).contiguous() for x in tensors]
    dout_by_head = dout.transpose(1, 2).contiguous()
    grouped = shape.heads != shape.kv_heads

    def peer(make: Callable[[], peers.Attention]) -> Peer:
        return lambda: timed(shape, make(), by_head, dout_by_head)

    others = {name: peer(partial(peers.sdpa, name, shape.causal, grouped)) for name in peers.BACKENDS}
    if not device.small and shape.seq == FLEX_SEQ:
        others["flex"] = peer(partial(peers.flex, shape, device.name))
    row = {"kind": "gpu_attention", "op": "attention", **shape.fields(), "deterministic": deterministic}
    torch.use_deterministic_algorithms(deterministic)
    try:
        row = measured(row, device, partial(ours, shape, tensors, dout), others)
    finally:
        torch.use_deterministic_algorithms(False)
    return rate(row, "tflops", shape.flops() / 1e12, peak)


def forward(device: Device, peaks: dict[str, float]) -> list[Row]:
    return [attention_row(shape, device, peaks.get("bf16_tflops")) for shape in shapes("forward", device.small)]


def backward(device: Device, peaks: dict[str, float]) -> list[Row]:
    rows = []
    for shape in shapes("backward", device.small):
        ways = (False, True) if shape.causal else (False,)  # deterministic
        rows += [attention_row(shape, device, peaks.get("bf16_tflops"), way) for way in ways]
    return rows


def decode_row(device: Device, peak: float | None, kv_format: str, batch: int, tokens: int) -> Row:
    """One new token a sequence over a paged cache, 32 query heads on 8 kv heads of 128.

    Small caches are read many times in one graph, large ones once with a cold L2.
    """
    heads, kv_heads, head_dim = (4, 2, 32) if device.small else (32, 8, 128)
    repeats = 20 if tokens * batch <= 16384 and not device.small else 1
    q, k, v = (
        torch.randn(batch, n, h, head_dim, dtype=torch.bfloat16, device=device.name)
        for n, h in ((1, heads), (tokens, kv_heads), (tokens, kv_heads))
    )
    facts: dict[str, Any] = {"bytes": 2 * k.nbytes, "graphs": []}

    def many(name: str, call: Call) -> Call:
        if repeats == 1:
            return call
        several, in_graph = device.repeated(call, repeats)
        facts["graphs"] += [name] if in_graph else []
        return several

    def call() -> Call:
        cache = lcore.PagedCache(
            1, kv_heads, head_dim, batch_size=batch, dtype=torch.bfloat16, device=device.name, kv_format=kv_format
        )
        cache.append(0, k, v)
        facts["bytes"] = int(cache.stats()["bytes"])
        if kv_format == "bf16":
            Checker(q.cpu(), k.cpu(), v.cpu(), (tokens, 0)).forward(cache.attend(0, q).cpu())
        return many("lcore", partial(cache.attend, 0, q))

    def peer(name: str) -> Peer:
        by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        return lambda: many(name, partial(peers.sdpa(name, False, True), *by_head))

    row: dict[str, Any] = {
        "kind": "gpu_decode", "op": "attention_paged", "kv_format": kv_format, "batch": batch, "tokens": tokens,
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "repeats": repeats,
    }  # fmt: skip
    row = measured(row, device, call, {name: peer(name) for name in peers.BACKENDS}, cold=repeats == 1)
    row["seconds"] = row["seconds"] and row["seconds"] / repeats
    row["peers"] = {name: seconds / repeats for name, seconds in row["peers"].items()}
    return rate({**row, **facts}, "gbytes_per_s", facts["bytes"] / 1e9, peak)


def decode(device: Device, peaks: dict[str, float]) -> list[Row]:
    cases = [(1, 48)] if device.small else [(1, 1024), (1, 8192), (1, 65536), (32, 4096), (16, 32768)]
    formats = ("bf16", "int8", "int4")
    return [decode_row(device, peaks.get("copy_gbytes"), f, *case) for case in cases for f in formats]


def merge(device: Device, peaks: dict[str, float]) -> list[Row]:
    shape = (2, 64, 2, 32) if device.small else (4, 8192, 16, 128)
    batch, seq, heads, _ = shape
    outs = [torch.randn(shape, dtype=torch.bfloat16, device=device.name) for _ in range(2)]
    lses = [torch.randn(batch, heads, seq, device=device.name) for _ in range(2)]
    states = (outs[0], lses[0], outs[1], lses[1])
    moved = 3 * (outs[0].nbytes + lses[0].nbytes)

    def call() -> Call:
        got, _ = lcore.merge_states(*states)
        want, _ = reference.merge_states(*(x.double() for x in states))
        assert (got - want).norm() / want.norm() < 2**-8, "merge_states is wrong"
        return partial(lcore.merge_states, *states)

    row = {"kind": "gpu_merge_states", "op": "merge_states", "dtype": "bf16", "shape": list(shape)}
    row = measured(row, device, call, {"torch": lambda: partial(reference.merge_states, *states)}, cold=True)
    return [rate(row, "gbytes_per_s", moved / 1e9, peaks.get("copy_gbytes"))]
