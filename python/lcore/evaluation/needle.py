"""How often a model finds a needle, by length and depth: ``python -m lcore.evaluation.needle --lengths 4096,32768``.

A document of each length holds many needles at even depths.  It is read once into a paged cache, and each question
continues a fork of that cache, so one reading serves them all.  An answer is right if its number is the needle's value.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import lcore
from lcore.evaluation.haystack import build_haystack, even_depths, is_correct, make_needles, question, stdlib_text
from lcore.generation import Completion, Generator
from lcore.machine import describe
from lcore.models import Decoder

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "data" / "needle"
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """One question: which document it belongs to, how deep its needle lay, what was asked for and what came back."""

    length: int
    sample: int
    depth: float
    key: str
    value: str
    text: str
    right: bool


def ask(model: Decoder, text: str, length: int, needles: int, sample: int, **generator: Any) -> Iterator[Answer]:
    """Answers about one document of `length` tokens, questions included, drawn from the seed `sample`."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("lcore.evaluation.needle: the model folder must hold a tokenizer.json, got none")
    encode = tokenizer.backend.encode
    hidden, depths = make_needles(needles, seed=sample), even_depths(needles)
    longest = max(len(encode(question(needle), add_special_tokens=False).ids) for needle in hidden) + ANSWER_TOKENS
    begin = tokenizer.encode("", add_special_tokens=True)
    document = build_haystack(
        lambda line: encode(line, add_special_tokens=False).ids,
        text,
        length - longest,
        hidden,
        depths,
        seed=sample,
        bos_id=begin[0] if begin else None,
    )
    reader = Generator(model, **generator)
    reader.generate(document, max_new_tokens=0)
    cache = reader.cache
    assert cache is not None
    for needle, depth in zip(hidden, depths, strict=True):
        reply = reader.generate(question(needle), max_new_tokens=ANSWER_TOKENS, stop="\n", cache=cache.fork())
        assert isinstance(reply, Completion)
        yield Answer(length, sample, depth, needle.key, needle.value, reply.text, is_correct(needle, reply.text))


def accuracy_by_depth(answers: Sequence[Answer], bins: int) -> list[float]:
    """Share of right answers in `bins` equal ranges of depth, from the document's start to its end."""
    counts, rights = [0] * bins, [0] * bins
    for answer in answers:
        place = min(bins - 1, int(answer.depth * bins))
        counts[place] += 1
        rights[place] += answer.right
    return [right / count if count else float("nan") for right, count in zip(rights, counts, strict=True)]


def right_share(answers: Sequence[Answer]) -> float:
    return sum(answer.right for answer in answers) / len(answers)


def show(answers: Sequence[Answer], bins: int) -> Table:
    """Rows are lengths, columns ranges of depth, cells shares of right answers."""
    starts = [f"{100 * i / bins:.0f}%" for i in range(bins)]
    columns = ("tokens", "all", *starts, "asked")
    table = Table(*columns, box=SIMPLE, padding=0, title="needles found, by depth (columns: start of the range)")
    for length in sorted({answer.length for answer in answers}):
        rows = [answer for answer in answers if answer.length == length]
        cells = [f"{value:.0%}" for value in accuracy_by_depth(rows, bins)]
        table.add_row(f"{length:,}", f"{right_share(rows):.1%}", *cells, str(len(rows)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=BUNDLED_MODEL, help="checkpoint folder (default: the bundled model)"
    )
    parser.add_argument("--lengths", default="4096,32768", help="tokens of the documents, separated by commas")
    parser.add_argument("--samples", type=int, default=2, help="documents of each length")
    parser.add_argument("--needles", type=int, default=32, help="needles, and questions, in each document")
    parser.add_argument("--bins", type=int, default=8, help="ranges of depth in the table")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first document")
    parser.add_argument("--kv-format", default=None, help="format of the cache (default: the model's dtype)")
    parser.add_argument("--split", choices=("train", "eval"), default="eval", help="which files the text comes from")
    parser.add_argument("--out", type=Path, help="write all answers and the table as JSON")
    args = parser.parse_args()

    console = Console()
    model = lcore.load_model(args.model)
    text = stdlib_text(split=args.split)
    answers: list[Answer] = []
    for length in map(int, args.lengths.split(",")):
        for sample in range(args.first_seed, args.first_seed + args.samples):
            begin = time.perf_counter()
            new = list(ask(model, text, length, args.needles, sample, kv_format=args.kv_format))
            answers += new
            seconds = time.perf_counter() - begin
            console.print(f"{length:,} tokens, document {sample}: {right_share(new):.1%} right, {seconds:.0f} s")
    console.print(show(answers, args.bins))
    if args.out:
        by_length = {n: [a for a in answers if a.length == n] for n in sorted({a.length for a in answers})}
        result = {
            **describe(),
            "command": " ".join(["python -m lcore.evaluation.needle", *sys.argv[1:]]),
            "accuracy": {n: right_share(rows) for n, rows in by_length.items()},
            "accuracy_by_depth": {n: accuracy_by_depth(rows, args.bins) for n, rows in by_length.items()},
            "answers": [asdict(answer) for answer in answers],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
