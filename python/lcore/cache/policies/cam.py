"""CaM: values of tokens that go are merged into values of tokens that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from lcore.cache.checks import check_int
from lcore.cache.formats import PageLayout
from lcore.cache.key_scores import gather_kept
from lcore.cache.policies.base import stores_values
from lcore.cache.policies.mass import H2O
from lcore.cache.policies.view import LayerView
from lcore.cache.slots import Slots


class CaM(H2O):
    """Cache merging (Zhang et al. 2024, CaM: Cache Merging for Memory-efficient LLMs Inference).

    Formula: H2O chooses, by its mass A. Each token i that goes adds v_i / m to the values of the next m kept tokens j,
        with probability p_i = clamp(A_i / mean_j A_j, 0, 1); at the end of a slot m is what is left.

    Args:
        merge: m. seed: of the draws; None adds p_i v_i / m instead, their expectation. Others: as H2O.

    Values are written: only for formats that store them.
    """

    def __init__(self, budget: float, *, merge: int = 32, seed: int | None = None, **options: Any) -> None:
        super().__init__(budget, **options)
        check_int("CaM", "merge", merge, 1)
        if seed is not None:
            check_int("CaM", "seed", seed, 0)
        self.targets, self.seed = merge, seed

    def check(self, function: str, num_layers: int, num_kv_heads: int, layout: PageLayout) -> None:
        super().check(function, num_layers, num_kv_heads, layout)
        if not stores_values(layout) or self.unit_of(layout) != 1:
            raise NotImplementedError(
                f"lcore.{function}: CaM writes values, which coded pages and pages dropped as a whole do not allow; "
                "use H2O, or kv_format 'bf16' and unit=1"
            )

    def merge(self, layer: LayerView, keep: Tensor) -> Tensor | None:
        mass = layer.recall("mass").double()
        counts = keep.sum(-1, keepdim=True)
        most = int(counts.max())
        if most == 0:
            return None
        next_kept = keep.cumsum(-1)  # for a token that goes: how many stay before it, the rank of the next that stays
        targets = (counts - next_kept).clamp(max=self.targets)
        sums = pad(gather_kept(mass, keep).cumsum(-1), (1, 0))
        mean = (sums.gather(-1, next_kept + targets) - sums.gather(-1, next_kept)) / targets
        chance = (mass / mean).nan_to_num(0).clamp(0, 1)
        if self.seed is not None:
            chance = (self._draws(layer) < chance).double()
        weights = torch.where(layer.valid & ~keep & (targets > 0), chance / targets, 0).float()
        rank = next_kept.clamp(max=most - 1)
        starts: Tensor | None = None  # (batch, kv_heads, kept, head_dim_v): what is added from this rank on, m times
        for first, _, v in layer.chunks():
            part = slice(first, first + v.shape[2])
            starts = v.new_zeros(*keep.shape[:2], most, v.shape[3]) if starts is None else starts
            starts.scatter_add_(2, rank[..., part, None].expand_as(v), weights[..., part, None] * v)
        if starts is None:
            return None
        m = self.targets
        added = avg_pool1d(pad(starts.flatten(0, 1).mT, (m - 1, 0)), m, stride=1) * m
        return added.mT.unflatten(0, keep.shape[:2])

    def _draws(self, layer: LayerView) -> Tensor:
        """(batch, kv_heads, keys) uniform numbers; those of a row depend on its own length alone."""
        draws = torch.zeros(layer.valid.shape, dtype=torch.float64)
        for row, (seen, lengths) in enumerate(zip(layer.seen.tolist(), layer.lengths.tolist(), strict=True)):
            generator = torch.Generator().manual_seed(hash((self.seed, layer.index, seen)) % 2**63)
            numbers = torch.rand(len(lengths), max(lengths), generator=generator, dtype=torch.float64)
            draws[row, :, : max(lengths)] = numbers
        return draws


def add_values(slots: Slots, layer: int, added: Tensor) -> None:
    """Adds to the values of a layer's slots, (batch, kv_heads, tokens, head_dim_v), 0 for those that stay as they are.

    The pages of the others must belong to this layer's slots alone.
    """
    view, layout, size = slots.layers[layer], slots.layout, slots.layout.page_size
    assert layout.v.dtype is not None  # CaM.check
    paged = view.lengths[..., None].long() // size * size
    token = torch.arange(added.shape[2])
    changed = (added != 0).any(-1) & (token < view.lengths[..., None])
    end = layout.v_begin + size * layout.head_dim_v * layout.v.dtype.itemsize
    pages = slots.pool.data[:, layout.v_begin : end].view(layout.v.dtype).unflatten(-1, (size, layout.head_dim_v))
    row, head, index = (changed & (token < paged)).nonzero(as_tuple=True)
    where = (view.table[row, head, index // size].long(), index % size)
    with slots.pool.using(view.host_table[row, head, index // size], writes=True):
        pages[where] = (pages[where].float() + added[row, head, index]).to(layout.v.dtype)
    row, head, index = (changed & (token >= paged)).nonzero(as_tuple=True)
    tail = (row, head, index % size)
    view.tail_v[tail] = (view.tail_v[tail].float() + added[row, head, index]).to(view.tail_v.dtype)
