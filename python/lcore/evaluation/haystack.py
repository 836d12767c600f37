"""Needles in real text: the sentences, the questions, and documents of an exact number of tokens.

A needle is one line, ``The value of amber-falcon is 4821.``, hidden at a line boundary of real text (the sources of
the Python standard library).  The question names the key; the answer is the number.  Everything here is a function of
its arguments and seeds, so training, ``lcore demo`` and ``lcore.evaluation.needle`` see the same format.
"""

import random
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

_ADJECTIVES = (
    "amber azure bitter blazing brave brisk calm candid clever cobalt copper cosmic crimson crystal daring dusty "
    "eager ebony elegant emerald faded fearless fierce floral frosty gentle gilded glassy golden graceful hazel hidden "
    "humble icy indigo ivory jade jolly keen lilac lively lucky mellow misty noble olive opal patient pearl placid "
    "polar proud quiet ruby rustic scarlet silent silver sleepy stormy sunny velvet violet wandering"
)
_NOUNS = (
    "anchor badger bamboo beacon bison canyon castle cedar comet condor coral cricket dolphin dragon eagle ember "
    "falcon ferret forest fountain galaxy garden glacier harbor hawk heron island jackal jaguar juniper kestrel lagoon "
    "lantern leopard lotus magnet maple meadow meteor mirror monsoon mountain ocean orchid otter panther parrot pebble "
    "penguin pepper pigeon planet prairie rabbit raven river saddle sparrow summit thistle tiger tulip walrus willow"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings"}


class Needle(NamedTuple):
    key: str
    value: str


def needle_sentence(needle: Needle) -> str:
    """The line that hides in the document."""
    return f"The value of {needle.key} is {needle.value}.\n"


def question(needle: Needle) -> str:
    """What follows the document; the model continues with ``answer(needle)``."""
    return f"\nQuestion: what was the value of {needle.key}?\nAnswer: The value of {needle.key} is"


def answer(needle: Needle) -> str:
    """The right continuation of ``question(needle)``."""
    return f" {needle.value}.\n"


def is_correct(needle: Needle, completion: str) -> bool:
    """Exact match of the generated number: ``" 4821.\\n..."`` for the value ``4821``."""
    words = completion.split()
    return bool(words) and words[0].rstrip(".") == needle.value


def make_needles(count: int, seed: int) -> list[Needle]:
    """``count`` needles with distinct keys (two words each, so that many share one word) and four-digit values."""
    if not 0 <= count <= len(ADJECTIVES) * len(NOUNS):
        raise ValueError(f"make_needles: count must be in [0, {len(ADJECTIVES) * len(NOUNS)}], got {count}")
    rng = random.Random(seed)
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    keys = [f"{ADJECTIVES[p // len(NOUNS)]}-{NOUNS[p % len(NOUNS)]}" for p in pairs]
    return [Needle(key, str(rng.randrange(1000, 10000))) for key in keys]


def stdlib_files(split: str = "all") -> list[Path]:
    """The standard library's Python sources in a fixed order; one file in six is kept for "eval", the rest "train"."""
    if split not in ("all", "train", "eval"):
        raise ValueError(f'stdlib_files: split must be "all", "train" or "eval", got {split!r}')
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]):
            held_out = zlib.crc32(relative.as_posix().encode()) % 6 == 0
            if split == "all" or held_out == (split == "eval"):
                files.append(path)
    return files


def stdlib_text(limit_chars: int | None = None, split: str = "eval") -> str:
    """The sources of ``stdlib_files(split)`` one after the other, cut to ``limit_chars`` characters."""
    parts, total = [], 0
    for path in stdlib_files(split):
        if limit_chars is not None and total >= limit_chars:
            break
        parts.append(path.read_text(encoding="utf-8", errors="ignore"))
        total += len(parts[-1])
    return "".join(parts)[:limit_chars]


def split_lines(text: str) -> list[str]:
    """Lines with their newline; joining them gives the text back (``str.splitlines`` cuts at more than newlines)."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return [line for line in lines if line]


def even_depths(count: int) -> list[float]:
    """``count`` depths spread evenly over the document: 0.0 at its first line, 1.0 right before the question."""
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.5] * count


def build_haystack(
    encode: Callable[[str], Sequence[int]],
    text: str,
    length: int,
    needles: Sequence[Needle] = (),
    depths: Sequence[float] = (),
    *,
    seed: int | None = None,
    bos_id: int | None = None,
) -> list[int]:
    """A document of exactly ``length`` tokens: ``text`` with each needle at its depth, moved to the next line boundary.

    ``encode`` turns a string into token ids without special tokens; it is called once a line.  The text starts at its
    first line, or at a line drawn from ``seed``, and wraps round when it is too short.  ``bos_id`` goes first.
    """
    if len(needles) != len(depths):
        raise ValueError(f"build_haystack: one depth a needle, got {len(needles)} needles and {len(depths)} depths")
    if any(not 0.0 <= depth <= 1.0 for depth in depths):
        raise ValueError(f"build_haystack: depths must lie in [0, 1], got {list(depths)}")
    lines = split_lines(text)
    if not lines:
        raise ValueError("build_haystack: text must not be empty")
    hidden = [list(encode(needle_sentence(needle))) for needle in needles]
    tokens = [] if bos_id is None else [bos_id]
    room = length - len(tokens) - sum(map(len, hidden))
    if room < 0:
        raise ValueError(f"build_haystack: {len(needles)} needles need {length - room} tokens, length is {length}")
    order = sorted(range(len(hidden)), key=lambda i: depths[i])
    row = 0 if seed is None else random.Random(seed).randrange(len(lines))
    written = placed = 0
    while written < room or placed < len(order):
        while placed < len(order) and (written >= room or written >= depths[order[placed]] * room):
            tokens += hidden[order[placed]]
            placed += 1
        if written < room:
            line = list(encode(lines[row % len(lines)]))[: room - written]
            tokens += line
            written += len(line)
            row += 1
    return tokens
