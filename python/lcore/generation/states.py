"""The caches that a generator makes for a model of recurrent states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lcore.cache import PagedCache, StateCache
from lcore.errors import message, require_type
from lcore.generation.caches import Caches

_UNSET = (None, (), 0)


class StateCaches(Caches):
    """As `Caches`, where a cache is a StateCache: of one size for any text, without pages that could be coded, dropped,
    chosen, shared or kept in a file, and without a way back from a draft. prefix_reuse=True finds nothing to reuse.

    Raises: NotImplementedError for a setting that only a KV cache has.
    """

    def __init__(
        self,
        model: Any,
        kv_format: object,
        prefill_chunk: int,
        *,
        prefix_reuse: object,
        context: object,
        logits: int,
        **settings: object,
    ) -> None:
        self.model, self.prefill_chunk, self.prefixes = model, prefill_chunk, None
        given = {"kv_format": kv_format, **settings}
        for name, value in given.items():
            if value not in _UNSET:
                raise _refused(name, value)
        if logits > 1:
            raise _refused("speculate", "a drafter")
        if not isinstance(prefix_reuse, bool):
            raise _refused("prefix_reuse", type(prefix_reuse).__name__)

    def alone(self, rows: int, **options: Any) -> PagedCache:
        raise _refused("session", "a file")

    def for_prompts(self, prompts: list[Tensor], max_new_tokens: int) -> tuple[PagedCache, None]:
        return self.model.new_cache(len(prompts)), None

    def make_room(self, cache: PagedCache, new_tokens: Sequence[int]) -> None:
        """Checks the cache's kind; its states have their size from the start."""
        rule = "be a StateCache, as the model's new_cache() makes it"
        require_type(isinstance(cache, StateCache), "Generator", "cache", rule, type(cache).__name__)


def _refused(argument: str, value: object) -> NotImplementedError:
    rule = "be left out with a model of recurrent states, whose cache has no pages"
    return NotImplementedError(message("Generator", argument, rule, value))
