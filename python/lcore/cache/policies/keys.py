"""Policies that look at keys alone, and so need no queries: KeyNorm, KeyDiff."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lcore.cache.policies.base import Policy
from lcore.cache.policies.view import LayerView


class KeyNorm(Policy):
    """Keys of small norm get much attention (Devoto et al. 2024, A Simple and Effective L2 Norm-Based Strategy for KV
    Cache Compression).

    Formula: -||k_t||_2

    Args: as `Policy`.
    """

    def scores(self, layer: LayerView) -> Tensor:
        return layer.per_key(lambda k, v: -k.norm(dim=-1))


class KeyDiff(Policy):
    """Keys unlike the others (Park et al. 2025, KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
    Inference in Resource-Constrained Environments).

    Formula: -cos(k_t, mean_s k_s / ||k_s||)

    Args: as `Policy`.
    """

    def scores(self, layer: LayerView) -> Tensor:
        total: Tensor | float = 0.0
        for k, _ in layer.plain_chunks():
            total = total + normalize(k.double(), dim=-1).sum(2, keepdim=True)
        direction = normalize(torch.as_tensor(total), dim=-1)
        return layer.per_key(lambda k, v: -(normalize(k.double(), dim=-1) * direction).sum(-1).float())
