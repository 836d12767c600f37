"""What a page looks like in bytes: the formats of its codes and where K and V stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcore.cache.checks import check_int
from lcore.errors import message, require_type

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector; csrc/core/kv_pages.h has the same number
_PLANNED = ("fp8", "int8", "int4", "int2")
_MAX_HEAD_DIM = 512
_MAX_PAGE_SIZE = 4096  # a tail of so many tokens stands beside every head


@dataclass(frozen=True)
class Format:
    """How K or V is coded in a full page."""

    name: str
    dtype: torch.dtype

    @property
    def stores_values(self) -> bool:
        """Whether a page holds the values themselves, so that a token can leave it without being coded again."""
        return self.name in ("fp32", "fp16", "bf16")

    def bytes(self, values: int) -> int:
        """Bytes that `values` values take, padded to the alignment of what follows them in a page."""
        return -(-values * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


FORMATS = {
    "fp32": Format("fp32", torch.float32),
    "fp16": Format("fp16", torch.float16),
    "bf16": Format("bf16", torch.bfloat16),
}


def parse_formats(function: str, kv_format: str | tuple[str, str]) -> tuple[Format, Format]:
    """The formats of K and of V from one name or a pair of names."""
    rule = "be a format name, or a pair of names (k, v)"
    names = (kv_format, kv_format) if isinstance(kv_format, str) else kv_format
    require_type(
        isinstance(names, (tuple, list)) and len(names) == 2 and all(isinstance(name, str) for name in names),
        function,
        "kv_format",
        rule,
        repr(kv_format),
    )
    known = ", ".join(repr(name) for name in FORMATS)
    for name in names:
        if name in _PLANNED:
            raise NotImplementedError(f"lcore.{function}: kv_format {name!r} has no kernels yet; use one of {known}")
        if name not in FORMATS:
            raise ValueError(message(function, "kv_format", f"be one of {known}", repr(name)))
    return FORMATS[names[0]], FORMATS[names[1]]


@dataclass(frozen=True)
class PageLayout:
    """`page_size` tokens of one kv head: K codes [page_size][head_dim], then V codes [page_size][head_dim_v]."""

    page_size: int
    head_dim: int
    head_dim_v: int
    k: Format
    v: Format

    @property
    def v_begin(self) -> int:
        """Bytes from the start of a page to its V codes."""
        return self.k.bytes(self.page_size * self.head_dim)

    @property
    def page_bytes(self) -> int:
        return self.v_begin + self.v.bytes(self.page_size * self.head_dim_v)

    @property
    def bits_per_value(self) -> float:
        return 8 * self.page_bytes / (self.page_size * (self.head_dim + self.head_dim_v))

    def decode(self, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K (n, page_size, head_dim) and V (n, page_size, head_dim_v) in dtype from uint8 pages (n, page_bytes)."""
        k = pages[:, : self.page_size * self.head_dim * self.k.dtype.itemsize]
        v = pages[:, self.v_begin : self.v_begin + self.page_size * self.head_dim_v * self.v.dtype.itemsize]
        return (
            _cast(k.contiguous().view(self.k.dtype).unflatten(-1, (self.page_size, self.head_dim)), dtype),
            _cast(v.contiguous().view(self.v.dtype).unflatten(-1, (self.page_size, self.head_dim_v)), dtype),
        )


def page_layout(
    function: str, head_dim: int, head_dim_v: int | None, kv_format: str | tuple[str, str], page_size: int
) -> PageLayout:
    """The layout from a caller's arguments, checked."""
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    check_int(function, "head_dim", head_dim, 1, _MAX_HEAD_DIM)
    check_int(function, "head_dim_v", head_dim_v, 1, _MAX_HEAD_DIM)
    check_int(function, "page_size", page_size, 1, _MAX_PAGE_SIZE)
    return PageLayout(page_size, head_dim, head_dim_v, *parse_formats(function, kv_format))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, where a finite value stays finite.

    A float16 of 65504 is 65536 in a bfloat16 page, which no float16 holds: it comes back as 65504, and is 65536 again
    when it is encoded once more.
    """
    y = x.to(dtype)
    limit = torch.finfo(dtype).max
    return torch.where(y.isinf() & x.isfinite(), y.sign() * limit, y)
