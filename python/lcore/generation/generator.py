"""`lcore.Generator`: text from a model over a paged cache, as a stream of typed events."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lcore.cache import PagedCache, PrefixCache
from lcore.cache.overflow import Folder
from lcore.cache.policies import Policy
from lcore.cache.selection import Selection
from lcore.errors import require
from lcore.generation.caches import Caches
from lcore.generation.events import Completion, Done, Event, Token
from lcore.generation.loop import Loop
from lcore.generation.progress import show_prefill
from lcore.generation.prompts import Prompt, check_stops, encode_prompts, is_batch
from lcore.generation.resume import Session
from lcore.generation.row import Row
from lcore.generation.sampling import Sampling, check_int
from lcore.generation.speculation import NO_PAGES, Speculate, Speculation, speculation_of
from lcore.generation.states import StateCaches
from lcore.generation.text import CONTEXT, TextStream

if TYPE_CHECKING:
    from lcore.models import Decoder, HybridDecoder, MambaDecoder


class Generator:
    """Generates text with a model over a paged cache.

    model:          a decoder as `lcore.load_model` returns it. A MambaDecoder has a StateCache, and of the settings
                    below those alone that are not about pages: prefill_chunk, prefix_reuse and speculate.
    kv_format:      format of its caches ("fp32", "fp16", "bf16", or a (k, v) pair); None is the model's dtype.
    prefill_chunk:  prompt tokens read at a time; chunks end at absolute multiples of it, also in a continued cache.
    policy:         which tokens its caches keep, one of `lcore.policies` or one's own; None keeps all. After the prompt
                    the pool shrinks to what is left. A cache that is continued keeps the policy that it was made with.
                    With reindex=True caches hold keys before RoPE, and positions are places in them.
    select:         which pages its caches read, one of `lcore.selection` or one's own; None reads all. With speculate
                    each draft is judged over the pages that it would read as a token, and the text is the same; not
                    for a selection that observes attention, of which refused drafts would leave their part.
    skip_layers, fp_prefix: layers, and first tokens of every layer, that are not coded; as PagedCache.
    context:        tokens a row for which a new cache makes room at once; "auto" is as many as fit into free memory,
                    at most config.max_position_embeddings; None is as many as a call needs.
    prefix_reuse:   whether a prompt that begins as one before is read from where they differ, a page's length exactly;
                    a PrefixCache to share with other generators, or to bound. The text is what it is without, bit by
                    bit. Pages are kept in memory that the caches before took, the last used ones: `prefixes` tells.
                    Not with a policy, which takes pages away, nor with a selection that
                    chooses or observes while a prompt is read, nor with a session file.
    max_bytes, overflow: of its caches, as `lcore.PagedCache`, so that a context larger than memory has its pages in a
                    file. With overflow alone max_bytes is what is free beside the weights and a step's workspace.
    speculate:      drafts several tokens for one step of the model: "ngram" from the text itself, "self" from the model
                    over the last tokens of its cache, or their settings, `lcore.generation.Ngram(...)` and
                    `SelfSpeculation(...)`. Texts are what they are without, greedy and sampled; None drafts nothing.
                    Not with a policy, which may drop what a refused draft must give back.

    After a call `cache` is the PagedCache that it filled: `stream(..., cache=generator.cache.fork())` continues it.

    Raises: TypeError or ValueError for a bad argument; MemoryError for a context that does not fit, with the formats
    that would; `stream` also for a policy that does not fit the cache.
    """

    def __init__(
        self,
        model: Decoder | HybridDecoder | MambaDecoder,
        kv_format: str | tuple[str, str] | None = None,
        prefill_chunk: int = 2048,
        policy: Policy | None = None,
        context: int | Literal["auto"] | None = None,
        prefix_reuse: bool | PrefixCache = True,
        speculate: str | Speculate | None = None,
        select: Selection | None = None,
        skip_layers: Sequence[int] = (),
        fp_prefix: int = 0,
        max_bytes: int | None = None,
        overflow: Folder = None,
    ) -> None:
        check_int("prefill_chunk", prefill_chunk, at_least=1)
        self.model: Any = model
        self.prefill_chunk = prefill_chunk
        self.cache: PagedCache | None = None
        self.speculate = speculation_of(speculate)
        rule = "be None with a policy, which may drop what a refused draft must give back"
        require(self.speculate is None or policy is None, "Generator", "speculate", rule, repr(speculate))
        rule = "be None with a selection that observes attention, of which refused drafts would leave their part"
        observes = getattr(select, "observes", False)
        require(self.speculate is None or not observes, "Generator", "speculate", rule, repr(speculate))
        caches: Any = StateCaches if getattr(model, "cache_kind", None) == "StateCache" else Caches
        self._caches: Caches = caches(
            model,
            kv_format,
            prefill_chunk,
            policy=policy,
            select=select,
            context=context,
            prefix_reuse=prefix_reuse,
            skip_layers=skip_layers,
            fp_prefix=fp_prefix,
            max_bytes=max_bytes,
            overflow=overflow,
            logits=1 if self.speculate is None else 1 + self.speculate.most,
        )
        self._warned = False

    @property
    def prefixes(self) -> PrefixCache | None:
        """What is known of earlier prompts; None without prefix_reuse."""
        return self._caches.prefixes

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_ids: int | Sequence[int] = (),
        cache: PagedCache | None = None,
        session: str | os.PathLike[str] | None = None,
    ) -> Iterator[Event]:
        """Reads `prompt`, then writes, and yields `Prefill`, `Token` and `Done` events on the way.

        prompt:          text, token ids, chat messages ({"role", "content"}, put through the chat template), or a list
                         of these: a batch, whose rows may differ in length and are told apart by `event.row`.
        max_new_tokens:  0 only reads the prompt.
        temperature, top_k, top_p, min_p, seed:  see `lcore.generation.Sampling`. Row r of a batch draws from seed + r,
                         one number for each position: the text depends neither on prefill_chunk nor on other rows.
        stop:            strings that end the text; they are not part of it.
        stop_ids:        token ids that end the text, besides the model's own end-of-text ids.
        cache:           a cache to continue: the prompt follows what it holds, without a begin-of-text token.
        session:         a file that keeps what was read and written. Tokens that the prompt shares with it are not read
                         again; after the last event, Ctrl-C, or when the stream is closed, it holds the prompt and all
                         its tokens. It is made when it is not there. No other stream can use it meanwhile.

        Everything is checked in this call, before any work. After a row's `Done` the cache holds its prompt and all its
        tokens; a stream that is closed earlier may not have fed its last token (`cache.seen()` tells). A stream that
        speculates must have ended or been closed before its cache is used. When the work is interrupted, by Ctrl-C or
        an error, the cache is cut back to the tokens that went through the whole model, so that it can be continued,
        and the exception goes on. Where a policy has already dropped tokens of the chunk that was being read, there is
        no way back: the cache is closed.

        Raises: ValueError (empty prompt, id outside the vocabulary, value out of range); TypeError; MemoryError with
        the bytes needed, the bytes free and the context that would fit. Warns once when the context is longer than the
        model was made for.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        check_int("max_new_tokens", max_new_tokens)
        stop_ids = (stop_ids,) if isinstance(stop_ids, int) else stop_ids
        for token in stop_ids:
            check_int("stop_ids", token)
        stops = check_stops(stop)
        config, tokenizer = self.model.config, self.model.tokenizer
        textless = stops != () and tokenizer is None
        require(not textless, "Generator", "stop", "be empty because the model has no tokenizer", stops)

        require(cache is None or session is None, "Generator", "session", "be None when cache is given", session)
        held = [] if cache is None else [int(n) for n in cache.seen()]
        prompts = encode_prompts(prompt, tokenizer, config.vocab_size, continues=any(held))
        held = held if cache is not None else [0] * len(prompts)
        require(len(held) == len(prompts), "Generator", "prompt", f"have the cache's {len(held)} rows", len(prompts))
        known, reuse = [0] * len(prompts), None
        with ExitStack() as undo:  # a session file that is in our hands when something is refused is let go
            saved: Session | None = None
            if session is not None:
                cache = self._caches.alone(len(prompts))
                saved = Session(session, self.model, cache, prompts)
                undo.callback(saved.close)
                known = saved.kept
            if cache is None:
                cache, reuse = self._caches.for_prompts(prompts, max_new_tokens)
                known = known if reuse is None else reuse.tokens
            else:
                held_at_once = [0] * len(prompts) if saved is None else saved.held
                room = zip(prompts, held_at_once, strict=True)
                self._caches.make_room(cache, [max(len(p) + max_new_tokens, n) for p, n in room])
            length = max(n + len(p) for n, p in zip(held, prompts, strict=True)) + max_new_tokens
            if cache.policy is not None and cache.policy.reindex:
                length = cache.policy.held_after(length, self.prefill_chunk, cache.page_size)
            self._warn_beyond_training(length)
            if saved is not None:
                saved.load()
            self.cache = cache
            undo.pop_all()

        decode = None if tokenizer is None else partial(tokenizer.decode, skip_special_tokens=True)
        ends = config.eos_token_ids if tokenizer is None else (*config.eos_token_ids, *tokenizer.eos_token_ids)
        rows = [
            Row(index, ids, start + n, TextStream(decode, ids[-CONTEXT:].tolist(), stops), read=n, reused=n)
            for index, (ids, start, n) in enumerate(zip(prompts, held, known, strict=True))
        ]
        events = Loop(
            self.model,
            cache,
            rows,
            prefill_chunk=self.prefill_chunk,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=frozenset(ends),
            stop_ids=frozenset(stop_ids),
            keep=None if reuse is None else reuse.keep,
            speculation=self._speculation(cache, sampling),
        ).run()
        return events if saved is None else saved.record(events)

    def generate(
        self, prompt: Prompt | Sequence[Prompt], max_new_tokens: int = 64, **options: Any
    ) -> Completion | list[Completion]:
        """`stream` to its end: a Completion, or a list of them for a batch. Options and errors are those of `stream`.

        On a terminal the reading of the prompt is shown on stderr.
        """
        events = self.stream(prompt, max_new_tokens, **options)
        texts: dict[int, list[str]] = {}
        tokens: dict[int, list[int]] = {}
        ends: dict[int, Done] = {}
        for event in show_prefill(events):
            if isinstance(event, Token):
                texts.setdefault(event.row, []).append(event.text)
                tokens.setdefault(event.row, []).append(event.id)
            elif isinstance(event, Done):
                ends[event.row] = event
        rows = [
            Completion("".join(texts.get(row, [])), tokens.get(row, []), ends[row].reason, ends[row].stats)
            for row in sorted(ends)
        ]
        return rows if is_batch(prompt) else rows[0]

    def _speculation(self, cache: PagedCache, sampling: Sampling) -> Speculation | None:
        if self.speculate is None:
            return None
        drafter = self.speculate.begin(self.model, cache, sampling)
        return Speculation(drafter, self.speculate.most, cache.batch_size, getattr(cache, "page_size", NO_PAGES))

    def _warn_beyond_training(self, length: int) -> None:
        limit = self.model.config.max_position_embeddings
        if limit and length > limit and not self._warned:
            self._warned = True
            warnings.warn(
                f"lcore.Generator: prompt + max_new_tokens is {length:,} tokens, the model was made for {limit:,}: "
                "its text may lose sense beyond that",
                stacklevel=3,
            )
