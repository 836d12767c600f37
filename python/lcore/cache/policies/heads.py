"""Policies that give the heads of a layer different budgets: AdaKV, DuoAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore.cache.checks import MAX_TOKENS
from lcore.cache.formats import PageLayout
from lcore.cache.policies.base import Policy
from lcore.cache.policies.mass import StreamingLLM
from lcore.cache.policies.selection import keep_best, rank
from lcore.cache.policies.view import LayerView
from lcore.errors import check_number, require, require_type


class AdaKV(Policy):
    """The heads of a layer compete (Feng et al. 2024, Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget
    Allocation, algorithm 1).

    Formula: with n tokens a head as budget, every head keeps its best alpha n; the rest of the layer's n * kv_heads
        goes to the best keys of all heads together, by the scores of another policy

    Args:
        policy: gives scores, budget and what is protected. alpha: in [0, 1].
    """

    shares_budget = True

    def __init__(self, policy: Policy, *, alpha: float = 0.2) -> None:
        rule = "be an lcore.policies.Policy that gives each head the same budget"
        require_type(isinstance(policy, Policy), "AdaKV", "policy", rule, repr(policy))
        require(not isinstance(policy, (AdaKV, DuoAttention)), "AdaKV", "policy", rule, repr(policy))
        check_number("AdaKV", "alpha", alpha, least=0)
        require(alpha <= 1, "AdaKV", "alpha", "be <= 1", alpha)
        common = {name: getattr(policy, name) for name in ("sinks", "window", "slack", "unit", "reindex")}
        super().__init__(policy.budget, **common)
        self.policy, self.alpha = policy, alpha

    def observe(self, layer: LayerView) -> None:
        self.policy.observe(layer)

    def scores(self, layer: LayerView) -> Tensor:
        return self.policy.scores(layer)

    def budgets(self, layer: LayerView) -> Tensor:
        return self.policy.budgets(layer)

    def windows(self, budgets: Tensor) -> Tensor:
        return self.policy.windows(budgets)

    def merge(self, layer: LayerView, keep: Tensor) -> Tensor | None:
        return self.policy.merge(layer, keep)

    def check(self, function: str, num_layers: int, num_kv_heads: int, layout: PageLayout) -> None:
        self.policy.check(function, num_layers, num_kv_heads, layout)

    def select(self, scores: Tensor, valid: Tensor, protected: Tensor, room: Tensor) -> Tensor:
        ranked = rank(scores, valid, protected)
        safe = keep_best(ranked, (self.alpha * room).long()) & valid
        ranked = ranked.masked_fill(safe, torch.inf)
        total = room.sum(1).maximum((safe | protected).sum((1, 2))).minimum(valid.sum((1, 2)))
        return keep_best(ranked.flatten(1), total).view(valid.shape)


class DuoAttention(StreamingLLM):
    """Retrieval heads keep all, the others stream (Xiao et al. 2024, DuoAttention: Efficient Long-Context LLM Inference
    with Retrieval and Streaming Heads).

    Args:
        full: (layers, kv_heads) bool, the heads that keep every token.
        sinks, recent: first and last tokens that the other heads keep.
        slack, unit, reindex: as `Policy`.
    """

    def __init__(self, full: Tensor, *, sinks: int = 64, recent: int = 256, **options: Any) -> None:
        super().__init__(sinks + recent, sinks=sinks, **options)
        is_mask = isinstance(full, Tensor) and full.dtype == torch.bool and full.dim() == 2
        require_type(is_mask, "DuoAttention", "full", "be a bool tensor (layers, kv_heads)", repr(full))
        self.full: list[list[bool]] = full.tolist()

    def budgets(self, layer: LayerView) -> Tensor:
        return torch.where(torch.tensor(self.full[layer.index]), MAX_TOKENS, super().budgets(layer))

    def check(self, function: str, num_layers: int, num_kv_heads: int, layout: PageLayout) -> None:
        super().check(function, num_layers, num_kv_heads, layout)
        shape, got = (num_layers, num_kv_heads), tuple(torch.tensor(self.full).shape)
        require(got == shape, function, "policy.full", f"have shape (layers, kv_heads) = {shape}", got)

    def mean_budget(self, seen: int) -> int:
        full = float(torch.tensor(self.full, dtype=torch.float64).mean())
        return round(full * seen + (1 - full) * super().mean_budget(seen))
