"""Drafts from the model itself, over a cheaper view of the same cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from lcore.cache import StateCache, states_of
from lcore.cache.checks import check_int
from lcore.errors import message, require_type
from lcore.generation.memory import bytes_per_token
from lcore.generation.rows import ActiveRows
from lcore.generation.sampling import sample

if TYPE_CHECKING:
    from lcore.cache import PagedCache
    from lcore.generation.sampling import Sampling
    from lcore.models import Decoder
    from lcore.positions import Rotation

# From a fork of the cache, what the model drafts over: anything with batch_size, layer_rope, seen, append and attend.
View: TypeAlias = "Callable[[PagedCache], Any]"


@dataclass(frozen=True)
class SelfSpeculation:
    """The model drafts while it reads a part of its cache, and judges while it reads all of it.

    Good where the cache, not the weights, is most of what a step reads: long contexts. Drafts draw the same random
    numbers as the text, so that sampled drafts agree wherever the two distributions do.

    window:       a draft attends to so many tokens, the last ones.
    most:         the longest draft, in tokens.
    from_tokens:  rows that hold fewer get no drafts. None: the length from which a draft's step reads at most half the
                  bytes of a full one, weights included; below that there is little to win.
    view:         replaces `window`: makes what drafts are read from, of a fork of the cache (which shares its pages and
                  is closed after the draft). Give from_tokens with it.

    Source: the idea of TriForce (Sun et al. 2024, arXiv:2404.11912) and MagicDec (Chen et al. 2024, arXiv:2408.11049).
    Raises TypeError or ValueError.
    """

    window: int = 1024
    most: int = 6
    from_tokens: int | None = None
    view: View | None = None

    def __post_init__(self) -> None:
        name = "generation.SelfSpeculation"
        check_int(name, "window", self.window, 1)
        check_int(name, "most", self.most, 1)
        if self.from_tokens is not None:
            check_int(name, "from_tokens", self.from_tokens, 0)
        require_type(self.view is None or callable(self.view), name, "view", "be callable or None", self.view)

    def begin(self, model: Decoder, cache: PagedCache, sampling: Sampling) -> SelfDrafter:
        if isinstance(cache, StateCache):
            rule = "be 'ngram' or None with a model of recurrent states, of which no part can be read alone"
            raise NotImplementedError(message("Generator", "speculate", rule, repr(self)))
        # A fork needs tables and tails of its own: whether max_bytes has room for them is known now.
        cache.fork().close()
        return SelfDrafter(self, model, cache, sampling)


class SelfDrafter:
    """Forks the cache for each draft.

    A fork copies tables and tails and shares all pages; carrying one along would save that, but would have it read,
    among the few tokens that it sees, those whose keys and values it guessed itself.
    """

    def __init__(self, settings: SelfSpeculation, model: Decoder, cache: PagedCache, sampling: Sampling) -> None:
        self._model, self._cache, self._sampling = model, cache, sampling
        window = settings.window
        self._view: View = settings.view or (lambda fork: RecentTokens(fork, window))
        self._from_tokens = settings.from_tokens
        if self._from_tokens is None:
            self._from_tokens = 2 * window + -(-_weight_bytes(model) // bytes_per_token(cache))
        self._last: dict[int, int] = {}

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        self._last[row] = tokens[-1]

    def draft(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        held = self._cache.seen().tolist()
        rows = [row for row in most if held[row] >= self._from_tokens and self._page_stays_open(held[row])]
        drafts: dict[int, list[int]] = {row: [] for row in rows}
        newest = dict(self._last)
        if not rows:
            return drafts
        with closing(self._cache.fork()) as fork, torch.no_grad():
            view = self._view(fork)
            for step in range(max(most[row] for row in rows)):
                active = [row for row in rows if most[row] > step]
                tokens = torch.tensor([[newest[row]] for row in active])
                cache = cast("PagedCache", ActiveRows(view, active))
                logits = self._model(tokens.to(self._model.device), cache, last_only=True)[:, 0]
                for row, scores in zip(active, logits, strict=True):
                    place = held[row] + 1 + step
                    newest[row] = sample(scores, self._sampling, self._sampling.seed + row, place)
                    drafts[row].append(newest[row])
        return drafts

    def _page_stays_open(self, held: int) -> bool:
        """Whether the next token leaves its page open. If it fills it, a fork would need a page of its own, which
        nothing has been reserved for."""
        return (held + 1) % self._cache.page_size != 0


class RecentTokens:
    """A cache whose queries see no more than the last `window` tokens."""

    def __init__(self, cache: PagedCache, window: int) -> None:
        self._cache = cache
        self._left = window - 1
        self.batch_size = cache.batch_size
        self.states = states_of(cache)

    def layer_rope(self, layer: int) -> Rotation | None:
        return self._cache.layer_rope(layer)

    def seen(self, layer: int = 0) -> torch.Tensor:
        return self._cache.seen(layer)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, *, lengths: torch.Tensor | None = None) -> None:
        self._cache.append(layer, k, v, lengths=lengths)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        **options: Any,
    ) -> torch.Tensor:
        left = self._left if window_size[0] < 0 else min(self._left, window_size[0])
        return self._cache.attend(layer, q, lengths=lengths, window_size=(left, window_size[1]), **options)


def _weight_bytes(model: Decoder) -> int:
    """Bytes of weights that a step of one token reads: all, but of an embedding only a row."""
    embedding = model.model.embed_tokens.weight
    tied = embedding is model.lm_head.weight
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)
