"""From token ids to text while they come: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders put where bytes are not (yet) a character

# Prompt tokens decoded together with the first new ones, because decoders treat the start of a text differently.
CONTEXT = 6
# A text that never reaches a whole character (random bytes) is given out after this many tokens, so that the cost of
# a token stays bounded.
LONGEST_WAIT = 64


class Detokenizer:
    """Incremental decoding: `push(id)` returns the characters that became certain.

    Only a short window of ids is decoded for each token: it starts anew wherever the text ends in a whole character.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-CONTEXT:])
        self._given = len(decode(self._window).rstrip(REPLACEMENT)) if self._window else 0
        self._start = len(self._window)  # ids of the window before this one ended in a whole character

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        certain = len(text.rstrip(REPLACEMENT))
        if certain < len(text) and len(self._window) - self._start < LONGEST_WAIT:
            new = text[self._given : certain]
            self._given = max(self._given, certain)
            return new
        new = text[self._given :]
        # The tokens just decided stay as context for the next ones.
        self._window = self._window[self._start :]
        self._start = len(self._window)
        self._given = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """What is left at the end of the text, with replacement characters for incomplete ones."""
        new = self._decode(self._window)[self._given :]
        self._given += len(new)
        return new


class TextStream:
    """The text of one row, cut at the first stop string.

    push(id) returns (text, stopped). Text that may be the beginning of a stop string is held back until the next tokens
    decide. Without a decoder every text is "".
    """

    def __init__(
        self, decode: Callable[[list[int]], str] | None, context: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._detokenizer = None if decode is None else Detokenizer(decode, context)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        if self._detokenizer is None:
            return "", False
        return self._cut(self._detokenizer.push(token))

    def flush(self) -> tuple[str, bool]:
        """What is left when no token follows; a stop string can still be completed by it."""
        if self._detokenizer is None:
            return "", False
        text, stopped = self._cut(self._detokenizer.flush())
        if not stopped:
            text += self._held
            self._held = ""
        return text, stopped

    def _cut(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        # The stop string that is complete first ends the text, of several the longest: as if characters came singly.
        ends = [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        held = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
