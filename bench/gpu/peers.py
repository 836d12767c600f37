"""What lcore is measured against on a GPU. Each function makes a call, and raises where its package is missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import Shape

BACKENDS = {"sdpa flash": "FLASH_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: str, causal: bool, grouped: bool) -> Attention:
    """On (batch, heads, seq, head_dim), by this backend alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = getattr(SDPBackend, BACKENDS[backend])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return call


def flex(shape: Shape, device: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = None
    if shape.causal:
        mask = create_block_mask(visible, B=None, H=None, Q_LEN=shape.seq, KV_LEN=shape.seq, device=device)
    torch.compiler.reset()  # after some shapes it would silently no longer compile
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, block_mask=mask, enable_gqa=shape.heads != shape.kv_heads)


def mamba_scan() -> Callable[..., Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return partial(selective_scan_fn, delta_softplus=True)


def mamba_ssd() -> Callable[..., Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return partial(mamba_chunk_scan_combined, chunk_size=256)


def conv1d() -> Callable[..., Tensor]:
    from causal_conv1d import causal_conv1d_fn

    return partial(causal_conv1d_fn, activation="silu")


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = weight.shape[1]
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[2]])


def gla() -> Callable[..., Tensor]:
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g: chunk_gla(q, k, v, g)[0]


def gated_delta_rule() -> Callable[..., Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta)[0]
