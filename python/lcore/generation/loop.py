"""One run of the generation loop over one cache: prompts in chunks, then one token a row and step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from lcore.generation.events import Done, Event, Prefill, Reason, Stats, Token
from lcore.generation.memory import peak_bytes
from lcore.generation.progress import Clock, causal_pairs
from lcore.generation.rows import ActiveRows
from lcore.generation.sampling import Sampling, sample
from lcore.generation.text import TextStream

if TYPE_CHECKING:
    from lcore.cache import PagedCache
    from lcore.models import Decoder


@dataclass
class Row:
    """One sequence of the batch."""

    index: int
    prompt: torch.Tensor  # (tokens,) int64
    position: int  # of the next token that the cache will hold
    text: TextStream
    read: int = 0  # tokens of the prompt that the cache holds
    reused: int = 0  # those of them that it held from the start
    written: list[int] = field(default_factory=list)  # tokens generated
    logits: torch.Tensor | None = None  # (vocab,) float32, of the token at `position`
    reason: Reason | None = None

    @property
    def left(self) -> int:
        return len(self.prompt) - self.read


class Loop:
    """Runs `rows` to their ends. A step feeds some rows their next tokens; rows that are done take no part in it."""

    def __init__(
        self,
        model: Decoder,
        cache: PagedCache,
        rows: list[Row],
        *,
        prefill_chunk: int,
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: frozenset[int],
        stop_ids: frozenset[int],
        keep: Callable[[Row], None] | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._rows = rows
        self._chunk = prefill_chunk
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._eos_ids = eos_ids
        self._stop_ids = stop_ids
        self._keep = keep or (lambda row: None)  # called when a row has read its prompt, and when it has ended
        self._prefill_seconds = 0.0  # without the time that the caller spends between events
        self._decode_seconds = 0.0

    def run(self) -> Iterator[Event]:
        yield from self._prefill()
        yield from self._decode()

    def _prefill(self) -> Iterator[Event]:
        total = sum(row.left for row in self._rows)
        clock = Clock()
        yield Prefill(0, total, None)
        while step := self._next_step():
            begin = time.perf_counter()
            pairs = sum(causal_pairs(row.position, row.position + take) for row, take in step)
            logits = self._forward({row.index: row.prompt[row.read : row.read + take] for row, take in step})
            for row, take in step:
                row.read += take
                row.position += take
                row.logits = logits[row.index]
                if row.left == 0:
                    self._keep(row)
            seconds = time.perf_counter() - begin
            self._prefill_seconds += seconds
            clock.add(sum(take for _, take in step), pairs, seconds)
            left = sum(row.left for row in self._rows)
            pairs_left = sum(causal_pairs(row.position, row.position + row.left) for row in self._rows)
            if left == 0 and self._cache.policy is not None:
                # One page more a head than the tokens fill, and one for each page of slack: decoding needs no growth.
                policy, size = self._cache.policy, self._cache.page_size
                heads = self._cache.num_layers * self._cache.num_kv_heads * len(self._rows)
                self._cache.trim(heads * (1 + policy.slack_of(size) // size) if self._max_new_tokens else 0)
            yield Prefill(total - left, total, clock.eta(left, pairs_left))

    def _next_step(self) -> list[tuple[Row, int]]:
        """The rows to read next and how many tokens of each, with padding at most prefill_chunk tokens together.

        Chunks end at absolute multiples of prefill_chunk: a prompt read in two calls is cut as if it were read in one.
        Longest chunks first, so that rows which share a step have similar lengths and little padding.
        """
        takes = [(row, min(row.left, self._chunk - row.position % self._chunk)) for row in self._rows if row.left]
        takes.sort(key=lambda step: -step[1])
        step = takes[: max(1, self._chunk // takes[0][1])] if takes else []
        return sorted(step, key=lambda step: step[0].index)

    def _decode(self) -> Iterator[Event]:
        alive = self._rows
        if self._max_new_tokens == 0:
            yield from (self._done(row, "length") for row in alive)
            return
        while alive:
            begin = time.perf_counter()
            tokens = [self._next_token(row) for row in alive]
            self._decode_seconds += time.perf_counter() - begin
            yield from tokens
            begin = time.perf_counter()
            # The last token of a row is fed too, so that its cache ends where its text ends.
            logits = self._forward({token.row: torch.tensor([token.id]) for token in tokens})
            self._decode_seconds += time.perf_counter() - begin
            for row in alive:
                row.position += 1
                row.logits = logits[row.index]
                if row.reason is not None:
                    self._keep(row)
                    yield self._done(row, row.reason)
            alive = [row for row in alive if row.reason is None]

    def _next_token(self, row: Row) -> Token:
        """Chooses the token at `row.position`; sets `row.reason` when it is the last one."""
        assert row.logits is not None
        token = sample(row.logits, self._sampling, self._sampling.seed + row.index, row.position)
        row.written.append(token)
        text, stopped = "", False
        if token in self._eos_ids:
            row.reason = "eos"
        elif token in self._stop_ids:
            row.reason = "stop"
        else:
            text, stopped = row.text.push(token)
            if len(row.written) == self._max_new_tokens:
                row.reason = "length"
        if row.reason is not None and not stopped:
            rest, stopped = row.text.flush()
            text += rest
        if stopped:
            row.reason = "stop"
        return Token(token, text, row.index)

    def _done(self, row: Row, reason: Reason) -> Done:
        cache_bytes = int(self._cache.stats()["bytes"])
        stats = Stats(
            len(row.prompt),
            self._prefill_seconds,
            len(row.written),
            self._decode_seconds,
            cache_bytes,
            peak_bytes(),
            row.reused,
        )
        return Done(reason, stats, row.index)

    def _forward(self, tokens: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Feeds rows their tokens, right-padded; returns each row's float32 logits (vocab,) after its last token."""
        index, parts = list(tokens), list(tokens.values())
        lengths = torch.tensor([len(part) for part in parts])
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        cache = self._cache if len(index) == len(self._rows) else cast("PagedCache", ActiveRows(self._cache, index))
        ragged = int(lengths.min()) < padded.shape[1]
        try:
            with torch.no_grad():
                logits = self._model(
                    padded.to(self._model.device), cache, last_only=True, lengths=lengths if ragged else None
                )
        except BaseException:
            # Some layers may hold tokens of this step and some not: back to where the step began.
            try:
                self._cache.crop(torch.tensor([row.position for row in self._rows]))
            except ValueError:  # a layer has evicted tokens of this step: the layers cannot be brought together again
                self._cache.close()
            raise
        return dict(zip(index, logits[:, 0], strict=True))
