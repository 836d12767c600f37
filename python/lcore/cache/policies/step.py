"""One step of a policy: after the attention of a layer, drop what exceeds the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lcore.cache.eviction import evict
from lcore.cache.key_scores import gather_kept
from lcore.cache.policies.base import Policy
from lcore.cache.policies.cam import add_values
from lcore.cache.policies.selection import finite
from lcore.cache.policies.view import LayerView
from lcore.cache.slots import Slots
from lcore.errors import message


def after_attention(function: str, policy: Policy, slots: Slots, layer: LayerView) -> None:
    """Lets the policy look at a layer, and evicts. MemoryError leaves layer and scores as they were."""
    # Tensors made here are kept and written to later, also outside of the caller's inference mode.
    with torch.inference_mode(False), torch.no_grad():
        policy.observe(layer)
        keep = _kept(policy, slots, layer)
        more = slots.scores.added_bytes(layer.index, layer.remembered)
        slots.pool.check_budget(function, max(0, more), "for a policy's scores")
        if keep is None:
            _remember(slots, layer.index, layer.remembered)
            return
        added = policy.merge(layer, keep)
        evict(function, slots, layer.index, keep.numpy(), whole_pages=policy.unit_of(slots.layout) != 1)
        _remember(slots, layer.index, {name: gather_kept(x, keep) for name, x in layer.remembered.items()})
        if added is not None:
            add_values(slots, layer.index, added)


def _kept(policy: Policy, slots: Slots, layer: LayerView) -> Tensor | None:
    """(batch, kv_heads, keys) bool: the tokens that stay; None when all do."""
    budgets = policy.budgets(layer)
    slack = torch.where(layer.new > 1, 0, policy.slack_of(layer.page_size))[:, None]
    if policy.shares_budget:
        excess = (layer.lengths - budgets - slack).sum(1, keepdim=True)
    else:
        excess = layer.lengths - budgets - slack
    over = (excess > 0) & (layer.new > 0)[:, None]
    if not over.any():
        return None
    scores = policy.scores(layer)
    if scores.shape != layer.valid.shape:
        name = f"{type(policy).__name__}.scores"
        raise ValueError(message(name, "scores", f"have shape {tuple(layer.valid.shape)}", tuple(scores.shape)))
    unit = policy.unit_of(slots.layout)
    sizes = layer.lengths // unit  # of whole units
    rest = layer.lengths - sizes * unit
    index = torch.arange(int(sizes.max()))
    valid = index < sizes[..., None]
    first_free = (layer.lengths - policy.windows(budgets)).clamp(min=0)[..., None]
    prefix = slots.layout.plain.prefix * layer.page_size  # values among codes are there to stay
    protected = ((index * unit < max(policy.sinks, prefix)) | ((index + 1) * unit > first_free)) & valid
    sums = finite(scores)[..., : len(index) * unit].unflatten(-1, (len(index), unit)).sum(-1)
    room = (budgets - rest).clamp(min=0) // unit
    units = policy.select(sums, valid, protected, room)
    keep = torch.ones_like(layer.valid)  # the last page, while it is not full, stays
    keep[..., : len(index) * unit] = (units | (index >= sizes[..., None])).repeat_interleave(unit, dim=-1)
    return (keep | ~over[..., None]) & layer.valid


def _remember(slots: Slots, layer: int, values: dict[str, Tensor]) -> None:
    with slots.pool.lock:
        slots.pool.member_bytes += slots.scores.added_bytes(layer, values)
        slots.scores.layers[layer] = values
