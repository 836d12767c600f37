"""The caches that a generator makes for a model of recurrent states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lcore.cache import PrefixCache
from lcore.cache.states import CHECKPOINT_TOKENS
from lcore.errors import message, require_type
from lcore.generation.caches import Caches
from lcore.generation.reuse import Reuse

_UNSET = (None, (), 0)


class StateCaches(Caches):
    """As `Caches`, where a cache is a StateCache: of one size for any text, without pages that could be coded, dropped
    or chosen.

    Raises: NotImplementedError for a setting that only a KV cache has.
    """

    def __init__(
        self,
        model: Any,
        kv_format: object,
        prefill_chunk: int,
        *,
        prefix_reuse: bool | PrefixCache,
        logits: int,
        **settings: object,
    ) -> None:
        for name, value in {"kv_format": kv_format, **settings}.items():
            if value not in _UNSET:
                rule = "be left out with a model of recurrent states, whose cache has no pages"
                raise NotImplementedError(message("Generator", name, rule, value))
        known = isinstance(prefix_reuse, (bool, PrefixCache))
        require_type(known, "Generator", "prefix_reuse", "be a bool or a PrefixCache", repr(prefix_reuse))
        self.model, self.prefill_chunk = model, prefill_chunk
        self.prefixes = (
            prefix_reuse if isinstance(prefix_reuse, PrefixCache) else PrefixCache() if prefix_reuse else None
        )

    def alone(self, rows: int, **options: Any) -> Any:
        return self.model.new_cache(rows, checkpoint_every=CHECKPOINT_TOKENS)

    def for_prompts(self, prompts: list[Tensor], max_new_tokens: int) -> tuple[Any, Reuse | None]:
        cache = self.alone(len(prompts))
        if self.prefixes is None:
            return cache, None
        return cache, Reuse(self.prefixes, self.model, cache, prompts, self.prefill_chunk)

    def make_room(self, cache: Any, new_tokens: Sequence[int]) -> None:
        """Checks the cache's kind; its states have their size from the start."""
        self._check_kind(cache)
