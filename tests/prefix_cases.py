"""Texts, caches that have read them by way of a PrefixCache, and what such a cache must hold."""

import torch
from cache_cases import assert_same_contents

import lcore

PAGE, LAYERS, HEADS, DIM = 16, 2, 2, 8
PAGES_A_RUN = LAYERS * HEADS
PAGE_BYTES = PAGE * DIM * 2 * 4


def new_cache(rows: int = 1, **options) -> lcore.PagedCache:
    options = {"dtype": torch.float32, "kv_format": "fp32", "page_size": PAGE, **options}
    return lcore.PagedCache(LAYERS, HEADS, DIM, batch_size=rows, **options)


def text(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(seed))


def states(tokens: torch.Tensor) -> torch.Tensor:
    """Keys that tell a token and its place."""
    x = tokens.float() + torch.arange(len(tokens)) / 1024
    return x[None, :, None, None] * torch.arange(1, HEADS * DIM + 1).view(1, 1, HEADS, DIM)


def read(prefixes: lcore.PrefixCache, tokens: torch.Tensor, **options) -> tuple[lcore.PagedCache, int]:
    """A cache that holds `tokens`, and how many of them it did not have to read."""
    cache = new_cache(**options)
    [known] = prefixes.start(cache, [tokens])
    for layer in range(LAYERS):
        cache.append(layer, states(tokens)[:, known:], -states(tokens)[:, known:])
    prefixes.insert(cache, 0, tokens)
    return cache, known


def assert_holds(cache: lcore.PagedCache, tokens: torch.Tensor) -> None:
    plain = new_cache()
    for layer in range(LAYERS):
        plain.append(layer, states(tokens), -states(tokens))
        assert_same_contents(cache, plain, layer)
