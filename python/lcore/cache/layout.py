"""How a page lies in memory: its formats, its sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lcore.errors import message, require, require_type

DTYPE_OF_FORMAT = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMAT_OF_DTYPE = {dtype: name for name, dtype in DTYPE_OF_FORMAT.items()}
_PLANNED = ("fp8", "int8", "int4", "int2")
_ALIGNMENT = 64  # bytes; csrc/core/kv_pages.h


def parse_format(function: str, kv_format: str | tuple[str, str]) -> tuple[str, str]:
    """The formats of K and V, from one name for both or a pair of names."""
    pair = (kv_format, kv_format) if isinstance(kv_format, str) else tuple(kv_format)
    known = ", ".join(DTYPE_OF_FORMAT)
    require_type(len(pair) == 2 and all(isinstance(name, str) for name in pair), function, "kv_format",
                 f"be a format or a pair of formats of {known}", kv_format)  # fmt: skip
    for name in pair:
        if name in _PLANNED:
            raise NotImplementedError(f"lcore.{function}: no kernel for kv_format {name} yet; use one of {known}")
        require(name in DTYPE_OF_FORMAT, function, "kv_format", f"be one of {known}", name)
    return pair[0], pair[1]


def _align(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class PageLayout:
    """One kv head's page: K codes [page_size][head_dim], then V codes [page_size][head_dim_v], each 64-byte aligned."""

    page_size: int
    head_dim: int
    head_dim_v: int
    k_format: str
    v_format: str

    @property
    def v_offset(self) -> int:
        return _align(self.page_size * self.head_dim * DTYPE_OF_FORMAT[self.k_format].itemsize)

    @property
    def page_bytes(self) -> int:
        return self.v_offset + _align(self.page_size * self.head_dim_v * DTYPE_OF_FORMAT[self.v_format].itemsize)

    @property
    def bits_per_value(self) -> float:
        return 8 * self.page_bytes / (self.page_size * (self.head_dim + self.head_dim_v))

    def read(self, page: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (tokens, head_dim) and V (tokens, head_dim_v) of a page's first tokens, as views of its bytes."""

        def codes(start: int, dim: int, fmt: str) -> torch.Tensor:
            dtype = DTYPE_OF_FORMAT[fmt]
            return page[start : start + tokens * dim * dtype.itemsize].view(dtype).view(tokens, dim)

        return codes(0, self.head_dim, self.k_format), codes(self.v_offset, self.head_dim_v, self.v_format)


def check_page_size(function: str, page_size: int) -> None:
    rule = "be an integer in [1, 4096]"
    require_type(isinstance(page_size, int), function, "page_size", rule, page_size)
    if not 1 <= page_size <= 4096:
        raise ValueError(message(function, "page_size", rule, page_size))
