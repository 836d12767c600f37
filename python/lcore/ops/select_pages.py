"""The best pages of each kv head, and what the others can weigh."""

from __future__ import annotations

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_kernel, check_tensor, has_values, require, require_type
from lcore.ops.no_gradient import not_differentiable

_NAME = "select_pages"


def select_pages(
    scores: Tensor, ranked: Tensor, read: Tensor, *, sinks: int = 0, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """The pages with the largest scores for each kv head, and the weight of the others for each head.

    Formula: pages[b, g] are the read[b, g] largest of max over the heads h of g of scores[b, h, p], p < ranked[b, g];
        of equal ones the first; pages below `sinks` come before all others. unread[b, h] = log sum exp(scores[b, h, p])
        over p < ranked[b, g] that are not among them.

    Args:
        scores: (batch, heads, pages) float32, as `page_scores(per_head=True)` gives; heads is a multiple of kv_heads.
            NaN counts as +inf. What stands behind the ranked pages is not read.
        ranked, read: (batch, kv_heads) int32, 0 <= read <= ranked <= pages.
        width: of the result, at least the largest of `read`, the default.

    Returns:
        pages: (batch, kv_heads, width) int32, rising, -1 behind the last. unread: (batch, heads) float32, -inf where
        nothing is left.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: no gradients.

    Source: Tang et al. 2024, Quest, arXiv:2406.10774; the weight bounds the attention mass that is not read.
    """
    check_tensor(_NAME, "scores", scores, dtypes=(torch.float32,), shape=("*", "*", "*"), names="batch, heads, pages")
    check_kernel(_NAME, scores)
    shape = (scores.shape[0], "*")
    check_tensor(_NAME, "ranked", ranked, dtypes=(torch.int32,), device=scores.device, shape=shape,
                 names="batch, kv_heads")  # fmt: skip
    kv_heads = ranked.shape[1]
    rule = f"have heads a multiple of kv_heads {kv_heads}"
    require(kv_heads > 0 and scores.shape[1] % kv_heads == 0, _NAME, "scores", rule, scores.shape[1])
    check_tensor(_NAME, "read", read, dtypes=(torch.int32,), device=scores.device, shape=tuple(ranked.shape),
                 names="batch, kv_heads")  # fmt: skip
    require_type(isinstance(sinks, int), _NAME, "sinks", "be an integer", sinks)
    require(sinks >= 0, _NAME, "sinks", "be >= 0", sinks)
    if has_values(ranked, read):
        pages = scores.shape[2]
        inside = bool(((read >= 0) & (read <= ranked) & (ranked <= pages)).all())
        require(inside, _NAME, "read", f"satisfy 0 <= read <= ranked <= {pages}", read.tolist())
        most = int(read.max()) if read.numel() else 0
        width = most if width is None else width
        require(width >= most, _NAME, "width", f"be >= {most}, the largest of read", width)
    require(width is not None, _NAME, "width", "be given where values are not known", width)
    return torch.ops.lcore.select_pages(scores.contiguous(), ranked.contiguous(), read.contiguous(), sinks, width)


@torch.library.register_fake("lcore::select_pages")
def _fake(scores: Tensor, ranked: Tensor, read: Tensor, sinks: int, width: int) -> tuple[Tensor, Tensor]:
    pages = scores.new_empty((*ranked.shape, width), dtype=torch.int32)
    return pages, scores.new_empty(scores.shape[:2])


not_differentiable("select_pages")
