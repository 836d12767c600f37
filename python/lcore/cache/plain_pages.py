"""Pages of a coded cache that hold values instead of codes: all of some layers, and the first of every slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lcore.cache.checks import check_int
from lcore.errors import message, require, require_type

ALL_PAGES = 2**31 - 1  # kAllPages of csrc/core/kv_pages.h


@dataclass(frozen=True)
class PlainPages:
    """The first counts[layer] pages of every slot hold values of `dtype`, each in `parts` pages of the pool.

    All pages of a pool have the bytes of coded ones, so that a page which is given back serves any layer.
    """

    counts: tuple[int, ...]
    parts: int
    dtype: torch.dtype

    def columns(self, pages: Any, layer: int | None = None) -> Any:
        """Entries of the table that stand before those of page `pages`: integers, (layers, ...) without a layer."""
        if self.parts == 1:
            return pages
        counts: Any = self.counts if layer is None else self.counts[layer]
        if layer is None:
            counts = np.array(counts, dtype=np.int32).reshape(-1, *[1] * (np.ndim(pages) - 1))
        return pages + np.minimum(pages, counts) * (self.parts - 1)

    @property
    def prefix(self) -> int:
        """The first pages of every slot that are plain in layers that are not plain throughout."""
        return min((count for count in self.counts if count < ALL_PAGES), default=0)


def plain_counts(
    function: str, num_layers: int, skip_layers: Any, fp_prefix: Any, page_size: int, stores_values: bool
) -> tuple[int, ...]:
    """Plain pages of each layer from a caller's arguments, checked."""
    rule = f"hold different layers, 0 to {num_layers - 1}"
    is_list = isinstance(skip_layers, Sequence) and not isinstance(skip_layers, str)
    require_type(is_list, function, "skip_layers", rule, repr(skip_layers))
    for layer in skip_layers:
        check_int(function, "skip_layers", layer, 0, num_layers - 1)
    require(len(set(skip_layers)) == len(skip_layers), function, "skip_layers", rule, skip_layers)
    check_int(function, "fp_prefix", fp_prefix, 0)
    if stores_values:
        for argument, given in (("skip_layers", skip_layers), ("fp_prefix", fp_prefix)):
            if given:
                raise ValueError(message(function, argument, "not be given where kv_format stores values", given))
    prefix = -(-fp_prefix // page_size)
    return tuple(ALL_PAGES if layer in skip_layers else prefix for layer in range(num_layers))
