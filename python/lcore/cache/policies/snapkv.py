"""Policies that let the last queries choose: SnapKV, and PyramidKV, which gives deep layers less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from lcore.cache.checks import check_int
from lcore.cache.policies.base import Policy
from lcore.cache.policies.view import LayerView
from lcore.errors import require


class SnapKV(Policy):
    """Observation window and pooling (Li et al. 2024, SnapKV: LLM Knows What You are Looking for Before Generation).

    Formula: pool_t( sum over the last `window` queries of the attention they give to key t ), the heads of a group
        summed before pooling, zeros around; the window itself stays

    A prompt is cut after every chunk. After m new tokens, fewer than the window, what the queries before them gave
    counts (1 - m / window) as much as it did: the window's far edge is soft.

    Args:
        window: queries that observe, and tokens that are never dropped. kernel: keys that are pooled, odd.
        pooling: "avg" or "max". Others: as `Policy`.
    """

    def __init__(
        self, budget: float, *, window: int = 64, kernel: int = 5, pooling: str = "avg", sinks: int = 0, **options: Any
    ) -> None:
        name = type(self).__name__
        check_int(name, "window", window, 1)
        super().__init__(budget, sinks=sinks, window=window, **options)
        check_int(name, "kernel", kernel, 1)
        require(kernel % 2 == 1, name, "kernel", "be odd", kernel)
        require(pooling in ("avg", "max"), name, "pooling", "be 'avg' or 'max'", repr(pooling))
        self.kernel, self.pooling = kernel, pooling

    def observe(self, layer: LayerView) -> None:
        fading = (1 - layer.new / self.window).clamp(min=0)[:, None, None]
        layer.remember("mass", fading * layer.recall("mass") + layer.mass(self.window))

    def scores(self, layer: LayerView) -> Tensor:
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        before = torch.arange(layer.keys) < layer.lengths[..., None] - self.window
        mass = layer.recall("mass").masked_fill(~before, 0)
        return pool(mass, self.kernel, stride=1, padding=self.kernel // 2)


class PyramidKV(SnapKV):
    """SnapKV with less for deeper layers (Cai et al. 2024, PyramidKV: Dynamic KV Cache Compression based on Pyramidal
    Information Funneling, section 4.2).

    Formula: layer l of L keeps window + most - l (most - least) / (L - 1) tokens, rounded down, with
        P = budget - window, least = P / beta and most = 2 P - least; where most exceeds the T tokens before the window,
        most = T and least = 2 P - T. The mean over the layers is the budget.

    Args:
        beta: how steep. Others: as SnapKV.
    """

    def __init__(self, budget: float, *, beta: int = 20, **options: Any) -> None:
        super().__init__(budget, **options)
        check_int("PyramidKV", "beta", beta, 1)
        self.beta = beta

    def budgets(self, layer: LayerView) -> Tensor:
        before = (self.tokens_of(layer.seen) - self.window).clamp(min=0)
        least = before // self.beta
        most = torch.minimum(2 * before - least, layer.seen - self.window).maximum(before)
        least = 2 * before - most
        drop = -(layer.index * (least - most) // max(1, layer.num_layers - 1))
        tokens = self.window + (most - drop if layer.num_layers > 1 else before)
        return tokens[:, None].expand(layer.lengths.shape)
