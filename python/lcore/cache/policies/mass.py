"""Policies that keep what attention looks at: H2O, TOVA, VATP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore.cache.policies.base import Policy
from lcore.cache.policies.view import LayerView


class H2O(Policy):
    """Heavy hitters (Zhang et al. 2023, H2O: Heavy-Hitter Oracle for Efficient Generative Inference, algorithm 1).

    Formula: A_t = sum over all queries so far of the attention they gave to key t, and over the heads of the group

    Args:
        window: recent tokens, never dropped; None for half of the budget, the rest being the heavy hitters.
        Others: as `Policy`.
    """

    def __init__(self, budget: float, *, sinks: int = 0, window: int | None = None, **options: Any) -> None:
        super().__init__(budget, sinks=sinks, window=window or 0, **options)
        self.halves = window is None

    def windows(self, budgets: Tensor) -> Tensor:
        return budgets // 2 if self.halves else super().windows(budgets)

    def observe(self, layer: LayerView) -> None:
        layer.remember("mass", layer.recall("mass") + layer.mass())

    def scores(self, layer: LayerView) -> Tensor:
        return layer.recall("mass")


class VATP(H2O):
    """Value-aware token pruning (Guo et al. 2024, Attention Score is not All You Need for Token Importance Indicator in
    KV Cache Reduction: Value Also Matters, section 3).

    Formula: A_t ||v_t||_1, with the A of H2O

    Args:
        sinks: the first tokens have small values and much attention: they are kept whatever the product.
        Others: as H2O.
    """

    def __init__(self, budget: float, *, sinks: int = 4, **options: Any) -> None:
        super().__init__(budget, sinks=sinks, **options)

    def scores(self, layer: LayerView) -> Tensor:
        return super().scores(layer) * layer.per_key(lambda k, v: v.abs().sum(-1))


class TOVA(Policy):
    """Token omission via attention (Oren et al. 2024, Transformers are Multi-State RNNs, section 4).

    Formula: the attention that the last query gives to key t, averaged over all heads of the layer, so that they all
        keep the same tokens

    Args: as `Policy`; nothing is protected.
    """

    def __init__(self, budget: float, *, sinks: int = 0, window: int = 0, **options: Any) -> None:
        super().__init__(budget, sinks=sinks, window=window, **options)

    def scores(self, layer: LayerView) -> Tensor:
        return layer.mass(window=1).sum(1, keepdim=True).expand(layer.valid.shape)


class StreamingLLM(Policy):
    """Sinks and a sliding window (Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks).

    Formula: the first `sinks` tokens and the last budget - sinks

    Args: as `Policy`; reindex=True gives the paper's positions, which never grow beyond what is kept.
    """

    def __init__(self, budget: float, *, sinks: int = 4, **options: Any) -> None:
        super().__init__(budget, sinks=sinks, window=0, **options)

    def scores(self, layer: LayerView) -> Tensor:
        return torch.arange(layer.keys).expand(layer.valid.shape)
