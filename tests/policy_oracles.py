"""Eviction policies in float64 from the papers' formulas: full attention matrices, lists of positions, sorting."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Oracle:
    """One row of one layer: q (tokens, heads, dim), k (tokens, kv_heads, dim), v (tokens, kv_heads, dim_v).

    held[h] are the positions that kv head h keeps, rising. mass[h][t] is the attention that token t has received.
    """

    def __init__(self, q, k, v, budget, *, sinks=0, window=0, slack=0, page=1, layer=0, layers=1, **settings):
        self.q, self.k, self.v = q.double(), k.double(), v.double().clone()
        self.budget, self.sinks, self.window, self.slack, self.page = budget, sinks, window, slack, page
        self.layer, self.layers, self.settings = layer, layers, settings
        self.heads, self.seen = k.shape[1], 0
        self.held = [[] for _ in range(self.heads)]
        self.mass = torch.zeros(self.heads, len(k), dtype=torch.float64)

    def step(self, new: int) -> None:
        """`new` tokens more, their attention, and what is dropped after it."""
        if new == 0:
            return
        start, self.seen = self.seen, self.seen + new
        self.held = [[*held, *range(start, self.seen)] for held in self.held]
        weights = [self.attention(h, start) for h in range(self.heads)]
        self.observe(weights, new)
        slack = self.slack if new == 1 else 0
        budgets = [self.tokens(h) for h in range(self.heads)]
        over = [len(held) > budget + slack for held, budget in zip(self.held, budgets, strict=True)]
        if self.settings.get("alpha") is not None:
            over = [sum(map(len, self.held)) > sum(budgets) + slack * self.heads] * self.heads
        if any(over):
            self.drop(self.scores(weights), budgets, over)

    def attention(self, h: int, start: int) -> Tensor:
        """(group, new, held): the softmax over the keys that are held, each query seeing those before it."""
        group = self.q.shape[1] // self.heads
        q = self.q[start : self.seen, h * group : (h + 1) * group]
        logits = torch.einsum("qgd,td->gqt", q, self.k[self.held[h], h]) / math.sqrt(self.k.shape[2])
        later = torch.tensor(self.held[h]) > torch.arange(start, self.seen)[:, None]
        return logits.masked_fill(later, -torch.inf).softmax(-1)

    def tokens(self, h: int) -> int:
        """The budget of a head."""
        return math.ceil(self.budget * self.seen) if isinstance(self.budget, float) else self.budget

    def recent(self, budget: int) -> int:
        return self.window

    def observe(self, weights: list[Tensor], new: int) -> None:
        pass

    def scores(self, weights: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def drop(self, scores, budgets, over) -> None:
        for h in range(self.heads):
            if over[h]:
                units, rest = self.units(h, scores[h])
                room = (budgets[h] - len(rest)) // self.page
                forced = [u for u in units if self.is_protected(h, u, budgets[h])]
                free = sorted((u for u in units if u not in forced), key=lambda u: -u[0])
                self.keep(h, [*forced, *free[: max(0, room - len(forced))]], rest)

    def units(self, h: int, scores: Tensor) -> tuple[list[tuple[float, list[int]]], list[int]]:
        """(score, indices) of every token, or of every full page; and the indices of the rest."""
        count = len(self.held[h]) // self.page
        indices = [list(range(i * self.page, (i + 1) * self.page)) for i in range(count)]
        return [(float(scores[i].sum()), i) for i in indices], list(range(count * self.page, len(self.held[h])))

    def is_protected(self, h: int, unit, budget: int) -> bool:
        return unit[1][0] < self.sinks or unit[1][-1] >= len(self.held[h]) - self.recent(budget)

    def keep(self, h: int, units, rest) -> None:
        kept = sorted([i for _, indices in units for i in indices] + rest)
        self.held[h] = [self.held[h][i] for i in kept]


class Streaming(Oracle):
    def scores(self, weights):
        return [torch.arange(len(held)) for held in self.held]


class Duo(Streaming):
    def tokens(self, h):
        return 10**9 if self.settings["full"][self.layer][h] else self.budget


class H2O(Oracle):
    def recent(self, budget):
        return budget // 2 if self.settings.get("halves") else self.window

    def observe(self, weights, new):
        for h, weight in enumerate(weights):
            self.mass[h, self.held[h]] += weight.sum((0, 1))

    def scores(self, weights):
        return [self.mass[h, held] for h, held in enumerate(self.held)]


class VATP(H2O):
    def scores(self, weights):
        return [self.mass[h, held] * self.v[held, h].abs().sum(-1) for h, held in enumerate(self.held)]


class TOVA(Oracle):
    def scores(self, weights):
        last = torch.cat([weight[:, -1] for weight in weights]).mean(0)
        return [last] * self.heads


class SnapKV(Oracle):
    def observe(self, weights, new):
        self.mass *= max(0.0, 1 - new / self.window)
        for h, weight in enumerate(weights):
            self.mass[h, self.held[h]] += weight[:, -self.window :].sum((0, 1))

    def scores(self, weights):
        kernel = self.settings["kernel"]
        found = []
        for h, held in enumerate(self.held):
            past = self.mass[h, held[: len(held) - self.window]]
            around = [past[max(0, i - kernel // 2) : i + kernel // 2 + 1] for i in range(len(past))]
            pooled = [x.max() if self.settings["pooling"] == "max" else x.sum() / kernel for x in around]
            found.append(torch.stack([*pooled, *torch.zeros(len(held) - len(past), dtype=torch.float64)]))
        return found


class Pyramid(SnapKV):
    def tokens(self, h):
        past = super().tokens(h) - self.window
        least = past // self.settings["beta"]
        most = 2 * past - least
        if most > self.seen - self.window:
            most = max(past, self.seen - self.window)
            least = 2 * past - most
        return self.window + math.floor(most - self.layer * (most - least) / (self.layers - 1))


class Ada(SnapKV):
    def drop(self, scores, budgets, over):
        kept, pool, rests = [], [], []
        total = 0
        for h in range(self.heads):
            units, rest = self.units(h, scores[h])
            room = max(0, budgets[h] - len(rest)) // self.page
            total += room
            forced = [u for u in units if self.is_protected(h, u, budgets[h])]
            free = sorted((u for u in units if u not in forced), key=lambda u: -u[0])
            safe = max(0, int(self.settings["alpha"] * room) - len(forced))
            kept.append([*forced, *free[:safe]])
            pool += [(*u, h) for u in free[safe:]]
            rests.append(rest)
        for score, indices, h in sorted(pool, key=lambda u: -u[0])[: max(0, total - sum(map(len, kept)))]:
            kept[h].append((score, indices))
        for h in range(self.heads):
            self.keep(h, kept[h], rests[h])


class KeyNorm(Oracle):
    def scores(self, weights):
        return [-self.k[held, h].norm(dim=-1) for h, held in enumerate(self.held)]


class KeyDiff(Oracle):
    def scores(self, weights):
        found = []
        for h, held in enumerate(self.held):
            unit = self.k[held, h] / self.k[held, h].norm(dim=-1, keepdim=True)
            mean = unit.mean(0)
            found.append(-(unit @ mean) / mean.norm())
        return found


class CaM(H2O):
    """Values of the tokens that go are spread over the next kept ones, in expectation."""

    def keep(self, h, units, rest):
        before = self.held[h]
        super().keep(h, units, rest)
        old = self.v[:, h].clone()
        for token in sorted(set(before) - set(self.held[h])):
            targets = [j for j in self.held[h] if j > token][: self.settings["merge"]]
            if targets:
                chance = min(1.0, float(self.mass[h, token] / self.mass[h, targets].mean()))
                self.v[targets, h] += chance * old[token] / len(targets)
