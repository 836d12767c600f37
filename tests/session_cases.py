"""Caches to save, and their files taken apart."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from cache_cases import random_kv

import lcore


def filled_cache(*lengths: int, layers: int = 2, kv_heads: int = 2, **options) -> lcore.PagedCache:
    """A cache of one row for each length."""
    options = {"dtype": torch.float32, "kv_format": "fp32", "page_size": 16, **options}
    head_dim = options.pop("head_dim", 8)
    cache = lcore.PagedCache(layers, kv_heads, head_dim, batch_size=len(lengths), **options)
    for layer in range(layers):
        k, v = random_kv(len(lengths), max(lengths), kv_heads, head_dim, options.get("head_dim_v"), options["dtype"])
        cache.append(layer, k, v, lengths=torch.tensor(lengths))
    return cache


def header_of(path: Path) -> tuple[dict, int]:
    """The JSON header, and where the data begins."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:begin]), begin


def with_header(path: Path, header: dict) -> None:
    """Writes another header of the same length in its place."""
    data = path.read_bytes()
    begin = header_of(path)[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(data[:8] + text.ljust(begin - 8) + data[begin:])
