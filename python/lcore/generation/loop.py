"""One run of the generation loop over one cache: prompts in chunks, then a token and its drafts a row and step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from lcore.cache import states_of
from lcore.generation.events import Done, Event, Prefill, Reason, Stats, Token
from lcore.generation.memory import peak_bytes
from lcore.generation.progress import Clock, causal_pairs
from lcore.generation.row import Row
from lcore.generation.rows import JudgedApart, active_rows
from lcore.generation.sampling import Sampling, sample

if TYPE_CHECKING:
    from lcore.cache import PagedCache
    from lcore.generation.speculation import Speculation
    from lcore.models import Decoder


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
        speculation: Speculation | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._states = states_of(cache)
        self._rows = rows
        self._chunk = prefill_chunk
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._eos_ids = eos_ids
        self._stop_ids = stop_ids
        self._keep = keep or (lambda row: None)  # called when a row has read its prompt, and when it has ended
        self._speculation = speculation
        self._prefill_seconds = 0.0  # without the time that the caller spends between events
        self._decode_seconds = 0.0

    def run(self) -> Iterator[Event]:
        yield from self._prefill()
        try:
            yield from self._decode()
        except BaseException:
            # Interrupted or closed: what the caller cannot know of leaves the cache.
            if any(row.drafts or row.known < row.position for row in self._rows):
                self._cache.crop(torch.tensor([min(row.position, row.known) for row in self._rows]))
            raise

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
                row.known = row.position
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

        Chunks end at absolute multiples of prefill_chunk, and where recurrent states are kept: a prompt read in two
        calls is cut as if it were read in one.
        Longest chunks first, so that rows which share a step have similar lengths and little padding.
        """
        every = self._chunk if self._states is None else self._states.checkpoint_every or self._chunk
        ends = (self._chunk, every)
        takes = [(row, min(row.left, *(n - row.position % n for n in ends))) for row in self._rows if row.left]
        takes.sort(key=lambda step: -step[1])
        step = takes[: max(1, self._chunk // takes[0][1])] if takes else []
        return sorted(step, key=lambda step: step[0].index)

    def _decode(self) -> Iterator[Event]:
        alive = self._rows
        if self._max_new_tokens == 0:
            yield from (self._done(row, "length") for row in alive)
            return
        if self._speculation is not None:
            for row in alive:
                self._speculation.extend(row.index, row.prompt.tolist())
        while alive:
            begin = time.perf_counter()
            tokens = [token for row in alive for token in self._judge(row)]
            self._cut_drafts(alive)
            self._decode_seconds += time.perf_counter() - begin
            for token in tokens:
                self._rows[token.row].known += 1
                yield token
            begin = time.perf_counter()
            # The last token of a row is fed too, so that its cache ends where its text ends.
            step = [row for row in alive if row.next is not None]
            if step:
                self._draft([row for row in step if row.reason is None])
                fed = {row.index: torch.tensor([row.next, *row.drafts]) for row in step}
                logits = self._forward(fed, judges=any(row.drafts for row in step))
                for row in step:
                    row.position += 1
                    row.logits = logits[row.index]
            seconds = time.perf_counter() - begin
            self._decode_seconds += seconds
            if self._speculation is not None and step:
                self._speculation.took(seconds)
            for row in alive:
                if row.reason is not None:
                    self._keep(row)
                    yield self._done(row, row.reason)
            alive = [row for row in alive if row.reason is None]

    def _judge(self, row: Row) -> list[Token]:
        """The tokens from `row.position` on: those that equal the row's drafts, and the first that does not."""
        assert row.logits is not None
        tokens: list[Token] = []
        accepted = 0
        row.next = None
        while row.next is None and row.reason is None:
            token = self._next_token(row, row.logits[accepted])
            tokens.append(token)
            if row.drafts[accepted : accepted + 1] == [token.id]:
                accepted += 1
                row.position += 1
            else:
                row.next = token.id
        if self._speculation is not None:
            self._speculation.extend(row.index, [token.id for token in tokens])
            if row.drafts:
                self._speculation.judge(row.index, len(row.drafts), accepted)
        row.drafted += len(row.drafts)
        row.accepted += accepted
        row.drafts = row.drafts[accepted:]
        return tokens

    def _cut_drafts(self, rows: list[Row]) -> None:
        """Takes the drafts that were not accepted out of the cache."""
        if any(row.drafts for row in rows):
            self._cache.crop(torch.tensor([row.position for row in self._rows]))
        for row in rows:
            row.drafts = []

    def _draft(self, rows: list[Row]) -> None:
        """Sets the drafts behind `row.next`, as far as the text may still go."""
        if self._speculation is None:
            return
        wanted = {row.index: (row.position, self._max_new_tokens - len(row.written)) for row in rows}
        for index, draft in self._speculation.draft(wanted).items():
            self._rows[index].drafts = draft

    def _next_token(self, row: Row, logits: torch.Tensor) -> Token:
        """Chooses the token at `row.position`; sets `row.reason` when it is the last one."""
        token = sample(logits, self._sampling, self._sampling.seed + row.index, row.position)
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
        stats = Stats(
            prompt_tokens=len(row.prompt),
            prefill_seconds=self._prefill_seconds,
            new_tokens=len(row.written),
            decode_seconds=self._decode_seconds,
            cache_bytes=int(self._cache.stats()["bytes"]),
            peak_bytes=peak_bytes(),
            reused_tokens=row.reused,
            drafted=row.drafted,
            accepted=row.accepted,
            dropped_mass=self._cache.stats().get("dropped_mass", 0.0),
        )
        return Done(reason, stats, row.index)

    def _forward(self, tokens: dict[int, torch.Tensor], *, judges: bool = False) -> dict[int, torch.Tensor]:
        """Feeds rows their tokens, right-padded; returns each row's float32 logits, (1, vocab) after its last token or,
        where it judges drafts, (tokens, vocab) after every one."""
        if self._states is not None:
            self._states.every_token = judges  # drafts among them may be taken back
        index, parts = list(tokens), list(tokens.values())
        lengths = torch.tensor([len(part) for part in parts])
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        cache = self._cache if len(index) == len(self._rows) else active_rows(self._cache, index)
        if judges and self._cache.select is not None:
            cache = JudgedApart(cache)
        ragged = int(lengths.min()) < padded.shape[1]
        try:
            with torch.no_grad():
                logits = self._model(
                    padded.to(self._model.device), cache, last_only=not judges, lengths=lengths if ragged else None
                )
        except BaseException:
            # Some layers may hold tokens of this step and some not: back to where the step began.
            try:
                self._cache.crop(torch.tensor([row.position for row in self._rows]))
            except ValueError:  # a layer has evicted tokens of this step: the layers cannot be brought together again
                self._cache.close()
            raise
        finally:
            if self._states is not None:
                self._states.every_token = False
        return {row: x[: len(part)] if judges else x for row, x, part in zip(index, logits, parts, strict=True)}
