"""The interface of eviction policies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lcore.cache.checks import MAX_TOKENS, check_int
from lcore.cache.formats import PageLayout
from lcore.cache.policies.selection import keep_best, rank
from lcore.cache.policies.view import LayerView
from lcore.errors import message, require, require_type


class Policy:
    """Decides which tokens a cache keeps; `lcore.PagedCache(policy=...)` asks it after the attention of every layer.

    A policy gives every key a score, and a head that holds more than its budget keeps the best. A policy of one's own
    is a subclass with `scores`; the other methods say what else can be changed. An object holds settings only and may
    serve many caches: what it remembers about keys is theirs.

    Args:
        budget: tokens that each kv head keeps: an integer, a fraction in (0, 1] of the tokens seen, or math.inf.
        sinks, window: the first and the last tokens of a slot that are never dropped.
        slack: a head that grows token by token is cut back to its budget once it holds so many more; default
            page_size. After several tokens at once, the chunk of a prompt, it is cut back at once.
        unit: what is dropped as one, 1 or page_size tokens; default 1 where pages store values. Coded pages can only be
            dropped whole, by the sum of their scores; the tokens of the last page, while it is not full, stay then.
        reindex: positions are places in the cache, not in the text: those that stay close up. It needs a cache with
            keys before RoPE (`rope`), which a model's `new_cache` and a generator make for such a policy by themselves.
    """

    shares_budget = False  # whether the kv heads of a layer have one budget together

    def __init__(
        self,
        budget: float,
        *,
        sinks: int = 4,
        window: int = 64,
        slack: int | None = None,
        unit: int | None = None,
        reindex: bool = False,
    ) -> None:
        name = type(self).__name__
        rule = "be an integer >= 1, a fraction in (0, 1] or math.inf"
        require_type(isinstance(budget, (int, float)) and not isinstance(budget, bool), name, "budget", rule, budget)
        is_fraction = isinstance(budget, float)
        fits = (0 < budget <= 1 or budget == math.inf) if is_fraction else budget >= 1
        require(fits, name, "budget", rule, budget)
        for argument, value in (("sinks", sinks), ("window", window)):
            check_int(name, argument, value, 0)
        if slack is not None:
            check_int(name, "slack", slack, 0)
        if unit is not None:
            check_int(name, "unit", unit, 1)
        require_type(isinstance(reindex, bool), name, "reindex", "be a bool", repr(reindex))
        if not is_fraction:
            rule = f"be >= sinks + window = {sinks + window}, which are never dropped"
            require(budget >= sinks + window, name, "budget", rule, budget)
        self.budget, self.sinks, self.window, self.slack, self.unit = budget, sinks, window, slack, unit
        self.reindex = reindex

    def scores(self, layer: LayerView) -> Tensor:
        """(batch, kv_heads, keys): the larger, the longer a key is kept. Behind a slot's last key nothing is read."""
        raise NotImplementedError(f"lcore.{type(self).__name__}: a policy must define scores(layer)")

    def observe(self, layer: LayerView) -> None:
        """Is called after every attention, before it is known whether something must go."""

    def budgets(self, layer: LayerView) -> Tensor:
        """(batch, kv_heads) int64: tokens that each head may hold."""
        return self.tokens_of(layer.seen)[:, None].expand(layer.lengths.shape)

    def windows(self, budgets: Tensor) -> Tensor:
        """(batch, kv_heads) int64: the last tokens that each head never drops."""
        return torch.full_like(budgets, self.window)

    def select(self, scores: Tensor, valid: Tensor, protected: Tensor, room: Tensor) -> Tensor:
        """(batch, kv_heads, n) bool: which of n keys, or pages, stay.

        Args:
            scores, valid, protected: (batch, kv_heads, n); room: (batch, kv_heads), how many fit the budget.
        """
        count = room.maximum(protected.sum(-1)).minimum(valid.sum(-1))
        return keep_best(rank(scores, valid, protected), count)

    def merge(self, layer: LayerView, keep: Tensor) -> Tensor | None:
        """What to add to the values of those that `keep` keeps: (batch, kv_heads, most kept, head_dim_v), or None."""
        return None

    def check(self, function: str, num_layers: int, num_kv_heads: int, layout: PageLayout) -> None:
        """Raises when the policy does not fit a cache of this geometry."""
        size = layout.page_size
        rule = f"be 1 or page_size = {size}"
        require(self.unit in (None, 1, size), function, "policy.unit", rule, self.unit)
        if self.unit == 1 and size != 1 and not stores_values(layout):
            raise NotImplementedError(
                f"lcore.{function}: coded pages cannot lose single tokens without being coded twice; "
                f"use policy.unit=None or {size}, or kv_format 'bf16'"
            )

    def unit_of(self, layout: PageLayout) -> int:
        """Tokens that are dropped as one from a cache of this layout."""
        return self.unit or (1 if stores_values(layout) else layout.page_size)

    def slack_of(self, page_size: int) -> int:
        """`slack` of a cache with such pages."""
        return page_size if self.slack is None else self.slack

    def tokens_of(self, seen: Tensor) -> Tensor:
        """The budget in tokens after so many seen, int64."""
        if self.budget == math.inf:
            return torch.full_like(seen, MAX_TOKENS)
        if isinstance(self.budget, float):
            return (self.budget * seen.double()).ceil().long()
        return torch.full_like(seen, self.budget)

    def mean_budget(self, seen: int) -> int:
        """Tokens that a head may hold after so many, on average over layers and heads."""
        return min(seen, int(self.tokens_of(torch.tensor([seen]))))

    def held_after(self, seen: int, chunk: int, page_size: int) -> int:
        """Tokens that a head holds at most after so many, `chunk` at a time, on average over layers and heads."""
        return min(seen, self.mean_budget(seen) + max(chunk, self.slack_of(page_size)))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


def stores_values(layout: PageLayout) -> bool:
    return layout.k.stores_values and layout.v.stores_values


def check_policy(function: str, policy: Any, num_layers: int, num_kv_heads: int, layout: PageLayout) -> None:
    """None, or a policy that fits the cache."""
    if policy is None:
        return
    if not isinstance(policy, Policy):
        raise TypeError(message(function, "policy", "be an lcore.policies.Policy or None", repr(policy)))
    policy.check(function, num_layers, num_kv_heads, layout)
