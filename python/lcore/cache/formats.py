"""What a page looks like in bytes: the formats of its codes and where K and V stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcore.cache.checks import check_int
from lcore.cache.codes import decode_codes
from lcore.cache.plain_pages import PlainPages, plain_counts
from lcore.errors import require, require_type

# The numbers of csrc/core/page_format.h.
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector
VALUE_GROUP = 64  # channels of V that share a scale
_WORD_LANES = 16  # words of V's channels come in whole vectors of this many
_MAX_HEAD_DIM = 512
_MAX_PAGE_SIZE = 4096  # a tail of so many tokens stands beside every head
_CODED_PAGE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Format:
    """How K or V is stored in a full page: as values of a dtype, or as codes with scales.

    "int8", "int4", "int2": code = round((x - zero) / scale), 0 .. 2^bits - 1; x comes back as zero + scale * code. K
    has one scale and zero a channel over the page's tokens, V one a token over 64 channels (KIVI, arXiv:2402.02750).
    "fp8": e4m3 codes of x / scale, with the same groups. Scales and zeros are float16.
    """

    name: str
    bits: int
    dtype: torch.dtype | None = None  # of stored values; None for codes

    @property
    def stores_values(self) -> bool:
        """Whether a token can leave its page bit for bit: codes mean something only under their page's scales."""
        return self.dtype is not None

    @property
    def is_integer(self) -> bool:
        return self.dtype is None and self.name != "fp8"

    @property
    def step(self) -> int:
        """Integer codes in a word of 32 bits, neighbours along the summed dimension."""
        return 32 // self.bits

    def code_bytes(self, value: bool, page_size: int, dim: int) -> int:
        """Bytes that the values or codes of K, or with `value` of V, take, padded to the alignment of what follows."""
        if not self.is_integer:
            return _aligned(page_size * dim * self.bits // 8)
        summed, other = (page_size, -(-dim // _WORD_LANES) * _WORD_LANES) if value else (dim, page_size)
        return _aligned(4 * -(-summed // self.step) * other)

    def scale_bytes(self, value: bool, page_size: int, dim: int) -> int:
        """Bytes of the scales, and again of the zeros."""
        if self.stores_values:
            return 0
        return _aligned(2 * (-(-dim // VALUE_GROUP) * page_size if value else dim))

    def bytes(self, value: bool, page_size: int, dim: int) -> int:
        """Bytes of K, or with `value` of V, in a page: codes, scales, zeros."""
        return self.code_bytes(value, page_size, dim) + (1 + self.is_integer) * self.scale_bytes(value, page_size, dim)


FORMATS = {
    format.name: format
    for format in (
        Format("fp32", 32, torch.float32),
        Format("fp16", 16, torch.float16),
        Format("bf16", 16, torch.bfloat16),
        Format("fp8", 8),
        Format("int8", 8),
        Format("int4", 4),
        Format("int2", 2),
    )
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
        require(name in FORMATS, function, "kv_format", f"be one of {known}", repr(name))
    return FORMATS[names[0]], FORMATS[names[1]]


def is_coded(kv_format: str | tuple[str, str] | None) -> bool:
    """Whether K or V is stored as codes; None is a model's dtype."""
    names = (kv_format,) if isinstance(kv_format, str) else kv_format or ()
    return any(name in FORMATS and not FORMATS[name].stores_values for name in names)


@dataclass(frozen=True)
class PageLayout:
    """`page_size` tokens of one kv head: K, then V, each as its format stores it."""

    page_size: int
    head_dim: int
    head_dim_v: int
    k: Format
    v: Format
    plain: PlainPages

    @property
    def v_begin(self) -> int:
        """Bytes from the start of a page to V."""
        return self.k.bytes(False, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        return self.v_begin + self.v.bytes(True, self.page_size, self.head_dim_v)

    @property
    def bits_per_value(self) -> float:
        return 8 * self.page_bytes / (self.page_size * (self.head_dim + self.head_dim_v))

    @property
    def stores_values(self) -> bool:
        return self.k.stores_values and self.v.stores_values

    def decode(self, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K (n, page_size, head_dim) and V (n, page_size, head_dim_v) in dtype from uint8 pages (n, page_bytes)."""
        k, v = pages[:, : self.v_begin], pages[:, self.v_begin :]
        return self._decode(self.k, k, False, self.head_dim, dtype), self._decode(
            self.v, v, True, self.head_dim_v, dtype
        )

    def decode_parts(self, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `decode`, of parts of plain pages: page_size / parts tokens each."""
        tokens, sides, begin = self.page_size // self.plain.parts, [], 0
        for dim in (self.head_dim, self.head_dim_v):
            end = begin + tokens * dim * self.plain.dtype.itemsize
            values = pages[:, begin:end].contiguous().view(self.plain.dtype).unflatten(-1, (tokens, dim))
            sides.append(_cast(values, dtype))
            begin = _aligned(end)
        return sides[0], sides[1]

    def _decode(self, format: Format, side: Tensor, value: bool, dim: int, dtype: torch.dtype) -> Tensor:
        if format.dtype is None:
            return decode_codes(format, side, value, self.page_size, dim).to(dtype)
        values = side[:, : self.page_size * dim * format.bits // 8].contiguous().view(format.dtype)
        return _cast(values.unflatten(-1, (self.page_size, dim)), dtype)


def page_layout(
    function: str,
    head_dim: int,
    head_dim_v: int | None,
    kv_format: str | tuple[str, str],
    page_size: int,
    *,
    num_layers: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    skip_layers: Sequence[int] = (),
    fp_prefix: int = 0,
) -> PageLayout:
    """The layout from a caller's arguments, checked."""
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    check_int(function, "head_dim", head_dim, 1, _MAX_HEAD_DIM)
    check_int(function, "head_dim_v", head_dim_v, 1, _MAX_HEAD_DIM)
    check_int(function, "page_size", page_size, 1, _MAX_PAGE_SIZE)
    k, v = parse_formats(function, kv_format)
    stores_values = k.stores_values and v.stores_values
    counts = plain_counts(function, num_layers, skip_layers, fp_prefix, page_size, stores_values)
    layout = PageLayout(page_size, head_dim, head_dim_v, k, v, PlainPages(counts, 1, dtype))
    rule = f"be one of {_CODED_PAGE_SIZES} with kv_format {layout.k.name!r}, {layout.v.name!r}"
    require(layout.stores_values or page_size in _CODED_PAGE_SIZES, function, "page_size", rule, page_size)
    return replace(layout, plain=replace(layout.plain, parts=_parts(layout, dtype))) if any(counts) else layout


def _parts(layout: PageLayout, dtype: torch.dtype) -> int:
    """The fewest equal parts of a page of values that pages of the pool can hold."""

    def needed(parts: int) -> int:
        tokens = layout.page_size // parts
        return sum(_aligned(tokens * dim * dtype.itemsize) for dim in (layout.head_dim, layout.head_dim_v))

    return next(parts for parts in (1 << i for i in range(10)) if needed(parts) <= layout.page_bytes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, where a finite value stays finite.

    A float16 of 65504 is 65536 in a bfloat16 page, which no float16 holds: it comes back as 65504, and is 65536 again
    when it is encoded once more.
    """
    y = x.to(dtype)
    limit = torch.finfo(dtype).max
    return torch.where(y.isinf() & x.isfinite(), y.sign() * limit, y)
