"""The caches that a generator makes: with its settings, with pages that are known already, with room for a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lcore.cache import PagedCache, PrefixCache
from lcore.cache.overflow import Folder, overflow_folder
from lcore.cache.policies import Policy
from lcore.cache.selection import Selection
from lcore.cache.selection.base import check_selection
from lcore.cache.states import CHECKPOINT_TOKENS
from lcore.errors import require, require_type
from lcore.generation.memory import free_bytes, reserve, workspace_bytes
from lcore.generation.planner import context_room, model_planner
from lcore.generation.reuse import Reuse
from lcore.generation.sampling import check_int
from lcore.models.causal_lm import cache_kind

if TYPE_CHECKING:
    from lcore.models import Decoder


class Caches:
    """Makes caches for one model; settings as `Generator`. logits: rows of them that a step of decoding computes."""

    def __init__(
        self,
        model: Decoder,
        kv_format: str | tuple[str, str] | None,
        prefill_chunk: int,
        *,
        policy: Policy | None,
        select: Selection | None,
        context: int | Literal["auto"] | None,
        prefix_reuse: bool | PrefixCache,
        skip_layers: Sequence[int],
        fp_prefix: int,
        max_bytes: int | None,
        overflow: Folder,
        logits: int,
    ) -> None:
        is_policy = policy is None or isinstance(policy, Policy)
        require_type(is_policy, "Generator", "policy", "be an lcore.policies.Policy or None", repr(policy))
        check_selection("Generator", select)
        known = isinstance(prefix_reuse, (bool, PrefixCache))
        require_type(known, "Generator", "prefix_reuse", "be a bool or a PrefixCache", repr(prefix_reuse))
        self.model, self.kv_format, self.prefill_chunk, self.logits = model, kv_format, prefill_chunk, logits
        self.policy, self.select, self.context = policy, select, context
        plain = {"skip_layers": tuple(skip_layers), "fp_prefix": fp_prefix}
        self._plain: dict[str, Any] = {name: value for name, value in plain.items() if value}
        if overflow and max_bytes is None:
            max_bytes = model_planner(model, 1, prefill_chunk).cache_room
        self.overflow = overflow_folder("Generator", overflow, max_bytes)
        self._limits: dict[str, Any] = {} if max_bytes is None else {"max_bytes": max_bytes, "overflow": self.overflow}
        if isinstance(prefix_reuse, PrefixCache):
            own = max_bytes is None and self.overflow is None
            rule = "be None when a PrefixCache is given, which has its own"
            require(own, "Generator", "max_bytes and overflow", rule, (max_bytes, overflow))
            self.prefixes: PrefixCache | None = prefix_reuse
        else:
            self.prefixes = PrefixCache(max_bytes, self.overflow) if prefix_reuse else None
        if context is not None and context != "auto":
            check_int("context", context, at_least=1)
            planner = model_planner(model, 1, prefill_chunk, overflow=self.overflow, **self._plain)
            planner.require_fits(context, kv_format)

    def alone(self, rows: int, **options: Any) -> PagedCache:
        """An empty cache whose pages are its own."""
        select = {} if self.select is None else {"select": self.select}
        options = {"kv_format": self.kv_format, **self._limits, **options, **select, **self._plain}
        if self._kind == "HybridCache":
            options["checkpoint_every"] = CHECKPOINT_TOKENS
        return self.model.new_cache(rows, **options)

    def for_prompts(self, prompts: list[Tensor], max_new_tokens: int) -> tuple[PagedCache, Reuse | None]:
        """A cache that begins with known pages, with room for the prompts and what follows them."""
        try:
            return self._for_prompts(prompts, max_new_tokens)
        except MemoryError:
            # The pool may be too large to grow, beside what else is in it: a new one has as much room as without reuse.
            if self.prefixes is None or not self.prefixes.renew():
                raise
        return self._for_prompts(prompts, max_new_tokens)

    def make_room(self, cache: PagedCache, new_tokens: list[int]) -> None:
        """Room for `new_tokens[row]` more tokens in each row, and for the context asked for, if memory has it."""
        self._check_kind(cache)
        model, rows = self.model, len(new_tokens)
        if self.context is not None and not cache.seen().any():
            planner = model_planner(model, rows, self.prefill_chunk, overflow=cache.overflow, **self._plain)
            new_tokens = [context_room(planner, self.context, cache.kv_format, max(new_tokens))] * rows
        chunk = min(self.prefill_chunk, max(new_tokens))
        workspace = workspace_bytes(model.config, chunk, rows, model.dtype.itemsize, self.logits)
        make_free = None
        if self.prefixes is not None and isinstance(cache, PagedCache):
            make_free = partial(self.prefixes.make_free, cache)
        reserve(cache, new_tokens, workspace, free_bytes(model.device), chunk, make_free)

    @property
    def _kind(self) -> str:
        return getattr(self.model, "cache_kind", "PagedCache")

    def _check_kind(self, cache: PagedCache) -> None:
        kind, rule = cache_kind(cache), f"be a {self._kind}, as the model's new_cache() makes it"
        require_type(kind == self._kind, "Generator", "cache", rule, kind)

    def _for_prompts(self, prompts: list[Tensor], max_new_tokens: int) -> tuple[PagedCache, Reuse | None]:
        as_read = self.select is None or not (self.select.prefill or self.select.observes)
        shared = self.prefixes is not None and self.policy is None and as_read
        # A cache that begins in the pool of prefixes has the limits of that.
        limits = {"max_bytes": None, "overflow": None} if shared and self._limits else {}
        cache = self.alone(len(prompts), policy=self.policy, **limits)
        reuse, known = None, [0] * len(prompts)
        if self.prefixes is not None and shared and isinstance(cache, PagedCache):
            reuse = Reuse(self.prefixes, self.model, cache, prompts, self.prefill_chunk)
            known = reuse.tokens
        self.make_room(cache, [len(p) - n + max_new_tokens for p, n in zip(prompts, known, strict=True)])
        return cache, reuse
