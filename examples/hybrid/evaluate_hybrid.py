"""What the models of train_hybrid.py find, how fast they read and write, and what they keep, by length.

    python examples/hybrid/evaluate_hybrid.py --folder build/hybrid --json FILE --plot docs/hybrid.png
    python examples/hybrid/evaluate_hybrid.py --folder build/hybrid --lengths 512,4096

A document hides needles at even depths and is read once; each question continues a fork, as in
lcore.evaluation.needle. Models take turns, so what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from hybrid_model import MODELS, HybridCache, HybridDecoder, generate, read

from bench import plot
from bench.machine import Row, peaks, result, write_json
from bench.tables import show
from bench.timer import median_seconds
from lcore.evaluation.haystack import (
    Needle,
    answer,
    build_haystack,
    even_depths,
    is_correct,
    make_needles,
    question,
    stdlib_text,
)
from lcore.evaluation.needle import BUNDLED_MODEL
from lcore.models import Tokenizer

QUESTION_TOKENS = 32  # of the length that stays free for a question and its answer


class Documents:
    """Texts of an exact length that hide needles; the seed fixes the needles and where the text starts."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def draw(self, length: int, needles: int, seed: int) -> tuple[torch.Tensor, list[Needle]]:
        """(1, length - QUESTION_TOKENS) tokens and what hides in them."""
        hidden = make_needles(needles, seed)
        tokens = build_haystack(
            self.encode, self.text, length - QUESTION_TOKENS, hidden, even_depths(needles), seed=seed, bos_id=0
        )
        return torch.tensor([tokens]), hidden

    def found(self, model: HybridDecoder, cache: HybridCache, needle: Needle) -> bool:
        """Whether the model writes the needle's value behind its question, over a fork of what it has read."""
        fork, asked = cache.fork(), torch.tensor([self.encode(question(needle))])
        tokens = [int(token) for token in generate(model, fork, asked, len(self.encode(answer(needle))))]
        fork.close()
        return is_correct(needle, self.tokenizer.decode(tokens))


def reader(model: HybridDecoder, tokens: torch.Tensor) -> HybridCache:
    cache = model.new_cache()
    read(model, cache, tokens)
    return cache


@torch.no_grad()
def recall_row(models: dict[str, HybridDecoder], documents: Documents, length: int, needles: int, samples: int) -> Row:
    """The share of `needles` needles that each model finds, over `samples` documents."""
    found = dict.fromkeys(models, 0)
    for seed in range(samples):
        tokens, hidden = documents.draw(length, needles, seed)
        for name, model in models.items():
            cache = reader(model, tokens)
            found[name] += sum(documents.found(model, cache, needle) for needle in hidden)
            cache.close()
    asked = samples * needles
    recall = {name: right / asked for name, right in found.items()}
    return {"kind": "hybrid_recall", "tokens": length, "needles": needles, "asked": asked, "recall": recall}


@torch.no_grad()
def speed_row(models: dict[str, HybridDecoder], tokens: torch.Tensor, seconds: float) -> Row:
    """Tokens/s of each model that reads `tokens` and that writes behind them, and the bytes it keeps in between."""
    caches: dict[str, HybridCache] = {}

    def reread(name: str) -> None:
        if name in caches:
            caches[name].close()
        caches[name] = reader(models[name], tokens)

    count = tokens.shape[1]
    prefill = median_seconds({name: partial(reread, name) for name in models}, seconds)
    pages, states = ({name: cache.bytes()[part] for name, cache in caches.items()} for part in (0, 1))
    decode = median_seconds({name: partial(models[name], tokens[:, -1:], caches[name]) for name in models}, seconds)
    for cache in caches.values():
        cache.close()
    return {
        "kind": "hybrid_speed", "tokens": count, "page_bytes": pages, "state_bytes": states,
        "kbytes": {name: (pages[name] + states[name]) / 1e3 for name in models},
        "read_tokens_per_s": {name: count / time for name, time in prefill.items()},
        "written_tokens_per_s": {name: 1 / time for name, time in decode.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/hybrid"), help="where train_hybrid.py wrote")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,32768", help="tokens, questions included")
    parser.add_argument("--needles", type=int, default=16, help="needles, and questions, in each document")
    parser.add_argument("--loads", default="4,8,32,64", help="other numbers of needles, at the length of --load-length")
    parser.add_argument("--load-length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4, help="documents of each length and number of needles")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each timing")
    parser.add_argument("--json", metavar="FILE", help='write the result as JSON ("-": print it)')
    parser.add_argument("--plot", metavar="FILE", help="draw the result")
    args = parser.parse_args()
    if args.plot:
        plot.require()
    files = {name: args.folder / f"{name}.safetensors" for name in MODELS}
    models = {name: HybridDecoder.load(file) for name, file in files.items() if file.exists()}
    if not models:
        raise SystemExit(f"{args.folder} holds no model: run examples/hybrid/train_hybrid.py first")
    documents = Documents(Tokenizer.from_folder(BUNDLED_MODEL), stdlib_text(split="eval"))
    ceilings, rows = peaks(), list[Row]()
    todo = [(int(length), args.needles) for length in args.lengths.split(",")]
    loads = [(args.load_length, int(load)) for load in args.loads.split(",") if load]
    for length, needles in todo + loads:
        begin = time.perf_counter()
        rows.append(recall_row(models, documents, length, needles, args.samples))
        if (length, needles) in todo:
            rows.append(speed_row(models, documents.draw(length, needles, 0)[0], args.seconds))
        print(f"{length:,} tokens, {needles} needles: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        content = result("hybrid", ceilings, rows)
        if args.json and args.json != "-":
            write_json(args.json, content)  # what is measured so far
    show(content)
    if args.json == "-":
        write_json("-", content)
    if args.plot:
        plot.draw_hybrid(content, args.plot)


if __name__ == "__main__":
    main()
