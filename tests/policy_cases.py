"""A cache with a policy beside its oracles, fed the same tokens."""

from __future__ import annotations

import policy_oracles as oracle
import torch
from cache_cases import inside, pool_of
from torch import Tensor

import lcore
from lcore import policies

FULL = torch.tensor([[True, False, False], [False, True, False]])
SNAP = {"window": 8, "kernel": 5, "pooling": "avg"}

# name: the policy for a budget and a unit, its oracle and what the oracle is told besides.
CASES = {
    "streaming": (policies.StreamingLLM, oracle.Streaming, {"sinks": 4}),
    "h2o": (policies.H2O, oracle.H2O, {"halves": True}),
    "h2o-window": (lambda b, **o: policies.H2O(b, sinks=3, window=9, **o), oracle.H2O, {"sinks": 3, "window": 9}),
    "tova": (policies.TOVA, oracle.TOVA, {}),
    "vatp": (policies.VATP, oracle.VATP, {"halves": True, "sinks": 4}),
    "snapkv": (lambda b, **o: policies.SnapKV(b, window=8, **o), oracle.SnapKV, SNAP),
    "snapkv-max": (lambda b, **o: policies.SnapKV(b, window=8, kernel=7, pooling="max", **o), oracle.SnapKV,
                   {"window": 8, "kernel": 7, "pooling": "max"}),
    "pyramidkv": (lambda b, **o: policies.PyramidKV(b, window=8, beta=5, **o), oracle.Pyramid, {**SNAP, "beta": 5}),
    "adakv": (lambda b, **o: policies.AdaKV(policies.SnapKV(b, window=8, **o), alpha=0.3), oracle.Ada,
              {**SNAP, "alpha": 0.3}),
    "keynorm": (lambda b, **o: policies.KeyNorm(b, sinks=2, window=5, **o), oracle.KeyNorm, {"sinks": 2, "window": 5}),
    "keydiff": (lambda b, **o: policies.KeyDiff(b, sinks=2, window=5, **o), oracle.KeyDiff, {"sinks": 2, "window": 5}),
    "duo": (lambda b, **o: policies.DuoAttention(FULL, sinks=4, recent=b - 4, **o), oracle.Duo,
            {"sinks": 4, "full": FULL.tolist()}),
    "cam": (lambda b, **o: policies.CaM(b, merge=6, **o), oracle.CaM, {"halves": True, "merge": 6}),
}  # fmt: skip


class Pair:
    """Two layers of three kv heads, two query heads each; rows of a batch have oracles of their own."""

    layers, kv_heads, group, dim, dim_v = 2, 3, 2, 16, 8

    def __init__(
        self, name: str, budget: float, *, batch: int = 1, tokens: int = 400, unit: int = 1,
        slack: int | None = None, page_size: int = 16
    ) -> None:  # fmt: skip
        make, kind, settings = CASES[name]
        shape = (self.layers, batch, tokens)
        self.q = torch.randn(*shape, self.kv_heads * self.group, self.dim)
        self.k = torch.randn(*shape, self.kv_heads, self.dim)
        self.v = torch.randn(*shape, self.kv_heads, self.dim_v)
        self.page_size, self.fed = page_size, torch.zeros(batch, dtype=torch.int64)
        self.cache = lcore.PagedCache(
            self.layers, self.kv_heads, self.dim, head_dim_v=self.dim_v, batch_size=batch, page_size=page_size,
            dtype=torch.float32, kv_format="fp32", policy=make(budget, unit=unit, slack=slack),
        )  # fmt: skip
        self.oracles = [
            [
                kind(self.q[i, b], self.k[i, b], self.v[i, b], budget, page=unit, layer=i, layers=self.layers,
                     slack=page_size if slack is None else slack, **settings)
                for b in range(batch)
            ]
            for i in range(self.layers)
        ]  # fmt: skip

    def feed(self, new: int, lengths: list[int] | None = None) -> None:
        """The next tokens of every row, `lengths[b]` of row b."""
        counts = torch.tensor(lengths if lengths is not None else [new] * len(self.fed))
        rows = self.fed[:, None] + torch.arange(new)
        batch = torch.arange(len(self.fed))[:, None]
        rows = rows.clamp(max=self.q.shape[2] - 1)
        given = counts if lengths is not None else None
        for i in range(self.layers):
            q, k, v = (x[i][batch, rows] for x in (self.q, self.k, self.v))
            for x in (q, k, v):
                x[torch.arange(new) >= counts[:, None]] = torch.nan
            self.cache.append(i, k, v, lengths=given)
            self.cache.attend(i, q, lengths=given)
            for b, row in enumerate(self.oracles[i]):
                row.step(int(counts[b]))
        self.fed += counts

    def check(self) -> None:
        """Each slot holds the oracle's positions, with the keys and values that they have there."""
        for i in range(self.layers):
            assert torch.equal(self.cache.seen(i), self.fed)
            for b, row in enumerate(self.oracles[i]):
                for h, held in enumerate(row.held):
                    k, v = held_by(self.cache, i, b, h)
                    assert positions(k, self.k[i, b, :, h]) == held, f"layer {i}, row {b}, head {h}"
                    torch.testing.assert_close(v.double(), row.v[held, h], rtol=1e-5, atol=1e-5)


def held_by(cache: lcore.PagedCache, layer: int, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a slot of a float32 cache."""
    table, lengths, *tails = (x[row, head] for x in inside(cache, layer))
    full, rest = divmod(int(lengths), cache.page_size)
    pages = pool_of(cache)[table[:full].long()]
    begin, sides = 0, []
    for tail in tails:
        size = cache.page_size * tail.shape[-1] * 4
        codes = pages[:, begin : begin + size].contiguous().view(torch.float32).view(-1, tail.shape[-1])
        sides.append(torch.cat([codes, tail[:rest]]))
        begin += -(-size // 64) * 64
    return sides[0], sides[1]


def positions(k: Tensor, text: Tensor) -> list[int]:
    """Where each key stands in the text, by its bits."""
    same = (k[:, None] == text).all(-1)
    assert same.sum(1).eq(1).all()
    return same.int().argmax(1).tolist()
