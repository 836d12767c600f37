"""Choosing the next token: greedy, temperature, top-k, top-p and min-p, from one uniform number per position.

The uniform number is a function of (seed, position) alone, so a text does not depend on how its prompt was cut, on the
batch it ran in, or on how many numbers were drawn before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from lcore.errors import require, require_type


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The filters apply in this order; each sees what the one before it left.

    temperature:  logits / temperature before the softmax; 0 takes the largest logit (the first of equals).
    top_k:        keep the k largest logits, and all that equal the k-th; 0 keeps all.
    top_p:        keep the fewest most probable tokens whose probabilities sum to top_p or more; 1 keeps all.
    min_p:        keep tokens at least min_p times as probable as the most probable one; 0 keeps all.
    seed:         row r of a batch draws from seed + r.

    Raises: ValueError or TypeError that names the argument.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require_type(number, "Generator", name, "be a number", repr(value))
        check_int("top_k", self.top_k)
        check_int("seed", self.seed)
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        require(finite, "Generator", "temperature", "be 0 or more", self.temperature)
        require(0 < self.top_p <= 1, "Generator", "top_p", "be in (0, 1]", self.top_p)
        require(0 <= self.min_p <= 1, "Generator", "min_p", "be in [0, 1]", self.min_p)
        require(self.seed < 2**63, "Generator", "seed", "be less than 2**63", self.seed)


def check_int(name: str, value: object, at_least: int = 0) -> None:
    """Raises TypeError or ValueError unless the argument `name` of the generator is an int of at least that much."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    require_type(integer, "Generator", name, "be an int", repr(value))
    require(cast(int, value) >= at_least, "Generator", name, f"be {at_least} or more", value)


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) of a position: Philox 4x64-10 with the seed as key and the position as counter.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    raw = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (raw >> 11) * 2.0**-53


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that is drawn from: (vocab,) logits to (vocab,) float64 that sum to 1. Needs temperature > 0."""
    scaled = (logits.double() - logits.max().double()) / sampling.temperature
    if 0 < sampling.top_k < scaled.numel():
        kth = torch.topk(scaled, sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < kth, -math.inf)
    p = torch.softmax(scaled, dim=0)
    if sampling.top_p < 1:
        p = torch.where(_nucleus(p, sampling.top_p), p, 0.0)
    if sampling.min_p > 0:
        p = torch.where(p >= sampling.min_p * p.max(), p, 0.0)
    return p / p.sum()


def sample(logits: torch.Tensor, sampling: Sampling, seed: int, position: int) -> int:
    """The token for `position` of a row, from its float32 logits (vocab,).

    The inverse of the distribution function in the order of token ids: unlike the order of probabilities it is
    continuous in the logits, so rounding noise changes a choice only when the number falls on a border.
    """
    if not math.isfinite(float(logits.max())):
        raise FloatingPointError(
            f"lcore.Generator: logits must be finite, got {float(logits.max())} at position {position}"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = probabilities(logits, sampling)
    below = p.cumsum(0)
    u = uniform(seed, position) * float(below[-1])
    chosen = int(torch.searchsorted(below, torch.tensor(u, dtype=below.dtype, device=below.device), right=True))
    # u rounded up to the total would lie past the last token that has any probability
    return min(chosen, int(p.nonzero()[-1]))


def _nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the fewest most probable tokens with mass >= top_p; of equals the smaller id is kept first."""
    # All tokens below (1 - top_p) / vocab weigh less than 1 - top_p together, so none of them is in the nucleus:
    # only the others, few in practice, need sorting.
    candidates = (p >= (1 - top_p) / p.numel()).nonzero().squeeze(1)
    ordered, order = torch.sort(p[candidates], descending=True, stable=True)
    mass_before = ordered.cumsum(0) - ordered
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[candidates[order[mass_before < top_p]]] = True
    return keep
