"""A stream that begins where its session file ended, and leaves in the file where it ends itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from lcore.cache import StateCache, StoredSession
from lcore.cache.session_lock import SessionLock
from lcore.cache.sessions import save
from lcore.errors import message
from lcore.generation.events import Event, Token
from lcore.models.fingerprint import fingerprint

if TYPE_CHECKING:
    from lcore.cache import PagedCache
    from lcore.models import Decoder

# Pages in these formats give back what was put in.
_LOSSLESS = {torch.float32: {"fp32"}, torch.float16: {"fp16", "fp32"}, torch.bfloat16: {"bf16", "fp32"}}


class Session:
    """The session file `path` in the hands of one stream: nobody else can use it until `close`.

    Args:
        cache: the stream's own, still empty. prompts: whole, one a row.

    kept: of each row, tokens at the begin of its prompt that the cache holds after `load`. Less than the whole prompt,
        whose last token must be read for what comes next.
    held: of each row, tokens that the cache holds for a moment while the file is loaded.

    Raises: ValueError, naming the field that differs or saying what the file lacks, and as `PagedCache.load`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: Decoder,
        cache: PagedCache | StateCache,
        prompts: Sequence[torch.Tensor],
    ) -> None:
        self._cache, self._prompts = cache, prompts
        self._lock = SessionLock("Generator", path)
        self._stored: StoredSession | None = None
        self.kept = self.held = [0] * len(prompts)
        try:
            self._fingerprint = {f"model.{name}": value for name, value in fingerprint(model).items()}
            self._fingerprint["select"] = repr(getattr(cache, "select", None))
            if os.path.exists(self._lock.path):
                self._stored = StoredSession(path, function="Generator", lock=self._lock)
                self._compare(self._stored)
        except BaseException:
            self.close()
            raise

    def load(self) -> None:
        """Fills the cache with the pages of the file that the prompts share."""
        stored, self._stored = self._stored, None
        if stored is not None:
            with stored:
                stored.fill(self._cache)
        if self.kept != self.held:
            self._cache.crop(torch.tensor(self.kept))
        seen = self._cache.seen().tolist()
        if seen != self.kept:
            raise ValueError(message("Generator", "session", f"hold {self.held} tokens as it says", seen))

    def record(self, events: Iterator[Event]) -> Iterator[Event]:
        """Passes `events` on; after them, or when they are broken off, the cache goes into the file.

        Not after an error: then the file stays as it was. What was read before Ctrl-C is kept.
        """
        written: list[list[int]] = [[] for _ in self._prompts]
        try:
            for event in events:
                if isinstance(event, Token):
                    written[event.row].append(event.id)
                yield event
        except (KeyboardInterrupt, GeneratorExit):
            self._save(written)
            raise
        else:
            self._save(written)
        finally:
            self.close()

    def close(self) -> None:
        """Lets others use the file."""
        if self._stored is not None:
            self._stored.close()
        self._lock.release()

    def _save(self, written: list[list[int]]) -> None:
        texts = [
            torch.cat([prompt, torch.tensor(new).long()]) for prompt, new in zip(self._prompts, written, strict=True)
        ]
        tokens = [text[:seen] for text, seen in zip(texts, self._cache.seen().tolist(), strict=True)]
        save(self._cache, self._lock.path, tokens, self._fingerprint, lock=self._lock)

    def _compare(self, stored: StoredSession) -> None:
        """Sets `held` and `kept`; ValueError where the file does not fit."""
        stored.require_same(stored.metadata, self._fingerprint, "")
        stored.check(self._cache)
        if stored.tokens is None:
            raise ValueError(
                message("Generator", "session", "hold the tokens that were read", f"none in {stored.path}")
            )
        self.held = [len(tokens) for tokens in stored.tokens]
        shared = [_shared(*pair) for pair in zip(stored.tokens, self._prompts, strict=True)]
        intact = [True] * len(shared)
        if not isinstance(self._cache, StateCache):
            intact = (stored.lengths == torch.tensor(self.held)[None, :, None]).all(dim=2).all(dim=0).tolist()
        rows = enumerate(zip(self.held, shared, self._prompts, intact, strict=True))
        self.kept = [stored.place_before(row, self._kept(stored, *values)) for row, values in rows]

    def _kept(self, stored: StoredSession, held: int, shared: int, prompt: torch.Tensor, intact: bool) -> int:
        """How much of a row that holds `held` tokens, the first `shared` of them the prompt's, can be kept exactly."""
        if held and not shared:
            rule = f"begin as the text in the session file {stored.path}, or that file be deleted"
            raise ValueError(message("Generator", "prompt", rule, "another first token"))
        if shared == held < len(prompt):
            return held
        wanted = min(shared, len(prompt) - 1)
        if not intact:
            rule = f"go on after the {held:,} tokens of the session file {stored.path}, of which some were evicted"
            raise ValueError(message("Generator", "prompt", rule, f"{shared:,} tokens in common with them"))
        if isinstance(self._cache, StateCache):
            return wanted
        page_size = self._cache.page_size
        in_tail = wanted >= held // page_size * page_size
        lossless = set(self._cache.kv_format) <= _LOSSLESS[self._cache.dtype]
        return wanted if in_tail or lossless else wanted // page_size * page_size


def _shared(a: torch.Tensor, b: torch.Tensor) -> int:
    """Length of the longest common begin."""
    length = min(len(a), len(b))
    differ = (a[:length] != b[:length]).nonzero()
    return int(differ[0]) if len(differ) else length
