"""Training windows: real text, needles and questions, and position ids that make short windows train long distances."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lcore.evaluation.haystack import (
    ADJECTIVES,
    NOUNS,
    Needle,
    answer,
    make_needles,
    needle_sentence,
    question,
    split_lines,
)

IGNORED, TEXT, ANSWER = 0, 1, 2  # what the loss does with a token


@dataclass(frozen=True)
class Stage:
    """`steps` batches of `batch` windows of `window` tokens."""

    steps: int
    batch: int
    window: int
    needles: int
    questions: int


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # (batch, window) int64
    positions: torch.Tensor  # (batch, window) int64
    targets: torch.Tensor  # (batch, window) int64, the next tokens
    kinds: torch.Tensor  # (batch, window) of the targets: IGNORED, TEXT or ANSWER


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE that never joins lines and cuts numbers into pairs of digits, with <bos> and <eos>.

    A text encoded line by line has the tokens of the whole text, so a document can be cut at any line.  The words of
    the keys and all pairs of digits are made frequent enough to become one token each.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.Split(Regex(" ?[0-9]{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    needles = make_needles(len(ADJECTIVES) * len(NOUNS), seed=0)
    sentences = [needle_sentence(needle) + question(needle) for needle in needles]
    words = " " + " ".join(ADJECTIVES) + "-" + "-".join(NOUNS)
    digits = " ".join(f"{i:02d}{i:02d}" for i in range(100))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text, *sentences, *[words, digits] * 4000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


class Windows:
    """Draws batches; everything is fixed by the tokenizer, the text and the seed.

    Args:
        text: what the needles hide in.
        span: position ids are drawn from [0, span).
    """

    def __init__(self, tokenizer: Tokenizer, text: str, *, seed: int, span: int) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.span = span
        self.bos, self.eos = (tokenizer.token_to_id(name) for name in ("<bos>", "<eos>"))
        lines = tokenizer.encode_batch_fast(split_lines(text), add_special_tokens=False)
        self.lines = [line.ids for line in lines]

    def batch(self, stage: Stage) -> Batch:
        rows = [self.window(stage) for _ in range(stage.batch)]
        tokens, positions, kinds = (torch.tensor(column) for column in zip(*rows, strict=True))
        return Batch(tokens[:, :-1], positions[:, :-1], tokens[:, 1:], kinds[:, 1:])

    def window(self, stage: Stage) -> tuple[list[int], list[int], list[int]]:
        """<bos>, text with needles between its lines, then questions and answers; positions skip here and there."""
        needles = self.needles(stage.needles)
        hidden = [self.encode(needle_sentence(needle)) for needle in needles]
        asked = [
            (self.encode(question(needle)), [*self.encode(answer(needle)), self.eos])
            for needle in self.random.sample(needles, stage.questions)
        ]
        room = stage.window - sum(map(len, hidden)) - sum(len(q) + len(a) for q, a in asked)
        lines = self.text_lines(room)
        places = sorted(self.random.choices(range(len(lines) + 1), k=len(hidden)))
        tokens, kinds, starts = [self.bos], [IGNORED], []
        for row in range(len(lines) + 1):
            while places and places[0] == row:
                places.pop(0)
                sentence = hidden.pop()
                starts += [len(tokens), len(tokens) + len(sentence)]
                tokens += sentence
                value = len(self.encode(" 1234.\n"))
                kinds += [TEXT] * (len(sentence) - value) + [IGNORED] * value
            if row < len(lines):
                tokens += lines[row]
                kinds += [TEXT] * len(lines[row])
        for words, value in asked:
            starts.append(len(tokens))
            tokens += words + value
            kinds += [IGNORED] * len(words) + [ANSWER] * len(value)
        return tokens, self.positions(len(tokens), starts), kinds

    def needles(self, count: int) -> list[Needle]:
        """Fresh keys and values; half of the time from few words, so that one word of a key does not tell it apart."""
        adjectives, nouns = ADJECTIVES, NOUNS
        if self.random.random() < 0.5:
            words = min(64, max(2, math.isqrt(count - 1) + 1 + self.random.randrange(2)))
            adjectives, nouns = self.random.sample(adjectives, words), self.random.sample(nouns, words)
        pairs = self.random.sample(range(len(adjectives) * len(nouns)), count)
        keys = [f"{adjectives[p // len(nouns)]}-{nouns[p % len(nouns)]}" for p in pairs]
        return [Needle(key, str(self.random.randrange(1000, 10000))) for key in keys]

    def positions(self, size: int, starts: list[int]) -> list[int]:
        """Ids that grow by one but skip ahead at up to eight of `starts` (and after <bos>): PoSE at line boundaries.

        All skips together are nothing in one window of seven, log-uniform in a third, and uniform up to the span in
        half, so near and far distances are both seen.
        """
        skips = [0] * size
        kind, most = self.random.random(), self.span - size
        total = 0.0
        if kind >= 0.15:
            total = _log_uniform(self.random, 1, most) if kind < 0.5 else self.random.uniform(0, most)
        places = self.random.sample([1, *starts], min(len(starts) + 1, self.random.randint(1, 8)))
        cuts = sorted(self.random.random() for _ in places)
        for place, low, high in zip(places, [0.0, *cuts], cuts, strict=False):
            skips[place] = int((high - low) * total)
        ids, at = [], -1
        for skip in skips:
            at += 1 + skip
            ids.append(at)
        return ids

    def text_lines(self, room: int) -> list[list[int]]:
        """Consecutive lines of exactly `room` tokens together; the last one may be cut."""
        row = self.random.randrange(len(self.lines))
        lines = []
        while room > 0:
            lines.append(self.lines[row % len(self.lines)][:room])
            room -= len(lines[-1])
            row += 1
        return lines

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return low * math.exp(rng.random() * math.log(high / low))
