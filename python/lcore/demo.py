"""`lcore demo`: a long real text with hidden needles is read once, then asked for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lcore
from lcore.evaluation.haystack import Needle, build_haystack, is_correct, make_needles, question, stdlib_text
from lcore.generation import Completion, Generator, Stats
from lcore.models import Decoder

# A code of English or Python rarely has more characters a token; enough text to fill the document without wrapping.
CHARACTERS_PER_TOKEN = 8
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Answer:
    """One needle: where it was hidden, what the model said about it, and whether that is its value."""

    needle: Needle
    depth: float
    text: str
    stats: Stats

    @property
    def right(self) -> bool:
        return is_correct(self.needle, self.text)


def run_demo(
    tokens: int,
    *,
    depths: Sequence[float],
    text_file: Path | None,
    model_folder: Path,
    seed: int,
    say: Callable[[str], None],
) -> list[Answer]:
    """Hides a needle at each depth (0 first line, 1 last) of a text of `tokens` tokens, reads it, asks and reports.

    The text is `text_file`, or the sources of the Python standard library that the bundled model was not trained on.
    It is read once into a paged cache; each question continues a fork of that cache, which shares its pages. `say`
    gets the report line by line.

    Raises: ValueError (a depth outside [0, 1], too few tokens for the needles, no tokenizer), OSError, MemoryError.
    """
    if not model_folder.is_dir():
        raise FileNotFoundError(f"lcore demo: the model folder must exist, got {model_folder}; use --model")
    text = text_file.read_text(encoding="utf-8") if text_file else stdlib_text(tokens * CHARACTERS_PER_TOKEN)
    model = lcore.load_model(model_folder)
    needles = make_needles(len(depths), seed)
    document = hide(model, text, tokens, needles, depths)
    parameters = sum(weight.numel() for weight in model.parameters())
    info = lcore.build_info()
    say(f"lcore {info['version']} on {info['cpu_isa']}, {info['threads']} threads; {parameters / 1e6:.1f} M parameters")
    hidden = f"{len(needles)} hidden needle{'s' if len(needles) > 1 else ''}"
    say(f"reading {len(document):,} tokens of {text_file or 'Python sources'} with {hidden}")

    generator = Generator(model)
    read = one(generator.generate(document, max_new_tokens=0)).stats
    cache = generator.cache
    assert cache is not None
    answers = []
    for needle, depth in zip(needles, depths, strict=True):
        reply = one(generator.generate(question(needle), max_new_tokens=ANSWER_TOKENS, stop="\n", cache=cache.fork()))
        answers.append(Answer(needle, depth, reply.text.strip(), reply.stats))
    for line in report(answers, read):
        say(line)
    return answers


def hide(model: Decoder, text: str, tokens: int, needles: Sequence[Needle], depths: Sequence[float]) -> list[int]:
    """The document's ids, with the begin-of-text token that the tokenizer would put first, if any."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("lcore demo: the model folder must hold a tokenizer.json, got none")
    begin = tokenizer.encode("", add_special_tokens=True)

    def encode(line: str) -> list[int]:
        return tokenizer.encode(line, add_special_tokens=False)

    return build_haystack(encode, text, tokens, needles, depths, bos_id=begin[0] if begin else None)


def report(answers: Sequence[Answer], read: Stats) -> list[str]:
    """The table of answers, then rates and memory."""
    width = max(len(answer.needle.key) for answer in answers)
    lines = [f"{'depth':>6}  {'key':{width}}  {'value':>6}  answer"]
    for a in answers:
        verdict = "right" if a.right else "wrong"
        lines.append(f"{a.depth:6.0%}  {a.needle.key:{width}}  {a.needle.value:>6}  {a.text or '(nothing)'}  {verdict}")
    written = sum(a.stats.new_tokens for a in answers)
    seconds = sum(a.stats.decode_seconds for a in answers)
    peak = max(a.stats.peak_bytes for a in answers)
    return [
        *lines,
        f"{sum(a.right for a in answers)} of {len(answers)} right",
        f"prefill {read.prefill_rate:,.0f} tokens/s ({read.prompt_tokens:,} tokens in {read.prefill_seconds:.1f} s), "
        f"decode {written / seconds:,.0f} tokens/s ({written} tokens in {seconds:.2f} s)",
        f"cache {read.cache_bytes:,} bytes ({read.cache_bytes / read.prompt_tokens:,.0f} a token), "
        f"peak memory {peak / 1e6:,.0f} MB",
    ]


def one(completion: Completion | list[Completion]) -> Completion:
    """The completion of a single prompt."""
    assert isinstance(completion, Completion)
    return completion
