"""Generation with speculation against without: ``python -m bench.speculation [--json FILE]``.

Whole model, tokens/s while writing; plain and speculating runs take turns and must write the same tokens. Texts that do
and do not repeat are made by a decoder (8 layers, hidden 512) whose random weights are set so that a token mostly
decides the next one: each token's successor has the largest logit, by so much that it is drawn 19 times of 20 at
temperature 1.

phrases    the successors form 8 cycles of 32 tokens: text repeats with interruptions, the n-gram drafts' case
counting   one cycle through the vocabulary: nothing repeats; the model's own drafts over recent tokens agree
noise      64 tokens with equal probabilities: n-grams repeat and nothing that follows them does, the worst case
code       the bundled model goes on with Python sources at temperature 0.7: what a small real model accepts

The speed of n-gram drafts is measured after a prompt of --tokens, that of the model's own after --long-tokens, where
reading the cache is most of a step. --full-set measures what is published.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lcore
from bench.machine import Row, peaks, result, write_json
from bench.shapes import DTYPES
from bench.tables import show
from lcore.evaluation.haystack import stdlib_text
from lcore.evaluation.needle import BUNDLED_MODEL
from lcore.generation import Completion, Generator, Ngram, SelfSpeculation, Speculate
from lcore.models import Decoder, ModelConfig

_FEWEST_TURNS, _MOST_TURNS = 3, 50
_PHRASES, _PHRASE = 8, 32
# Of the successor; layers take a little off. The e^0 of 255 other tokens together then weigh a twentieth of it.
_LOGIT = 8.8


@dataclass(frozen=True)
class Text:
    """A model, its prompt, and how it draws."""

    name: str
    model: Decoder
    prompt: Tensor
    temperature: float


@dataclass(frozen=True)
class Size:
    """Of the models with random weights, and their number type."""

    layers: int
    hidden: int
    dtype: torch.dtype


def decoder(size: Size, vocab: int, logit: float, successor: Callable[[Tensor], Tensor]) -> Decoder:
    """Random weights, but the logit of successor(t) after t is about `logit`, the others about 0."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=vocab, hidden_size=size.hidden, intermediate_size=3 * size.hidden, num_layers=size.layers,
        num_heads=size.hidden // 64, num_kv_heads=max(1, size.hidden // 128), head_dim=64,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    model = Decoder(config)
    with torch.no_grad():
        tokens = model.model.embed_tokens.weight.normal_()
        model.lm_head.weight[successor(torch.arange(vocab))] = tokens * (logit / config.hidden_size)
    return model.to(size.dtype).eval()


def text_of(name: str, size: Size, tokens: int) -> Text:
    random = torch.Generator().manual_seed(1)
    if name == "phrases":
        model = decoder(size, _PHRASES * _PHRASE, _LOGIT, lambda t: t // _PHRASE * _PHRASE + (t + 1) % _PHRASE)
        begin = torch.randint(0, _PHRASES, (-(-tokens // _PHRASE), 1), generator=random) * _PHRASE
        return Text(name, model, (begin + torch.arange(_PHRASE)).flatten()[:tokens], 1.0)
    if name == "counting":
        model = decoder(size, 8192, 3 * _LOGIT, lambda t: (t + 1) % 8192)
        return Text(name, model, torch.randint(0, 8192, (tokens,), generator=random), 0.0)
    if name == "noise":
        model = decoder(size, 64, 0.0, lambda t: t)
        return Text(name, model, torch.randint(0, 64, (tokens,), generator=random), 1.0)
    model = lcore.load_model(BUNDLED_MODEL, dtype=size.dtype)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(stdlib_text(16 * tokens))
    return Text(name, model, torch.tensor(ids[:tokens]), 0.7)


def written(text: Text, speculate: Speculate | None, new: int, document: lcore.PagedCache | None) -> Completion:
    """One run: over the whole prompt, or over its last token behind a fork of what came before."""
    generator = Generator(text.model, speculate=speculate)
    prompt, cache = (text.prompt, None) if document is None else (text.prompt[-1:], document.fork())
    done = generator.generate(prompt, max_new_tokens=new, temperature=text.temperature, cache=cache)
    assert isinstance(done, Completion)
    assert generator.cache is not None
    generator.cache.close()
    return done


def read(text: Text) -> lcore.PagedCache:
    """A cache of the prompt without its last token. Keys and values are random where the weights are: reading a long
    prompt would take longer than all the rest."""
    if text.name == "code":
        reader = Generator(text.model)
        reader.generate(text.prompt[:-1], max_new_tokens=0)
        assert reader.cache is not None
        return reader.cache
    cache = text.model.new_cache()
    cache.reserve(len(text.prompt))
    random = torch.Generator().manual_seed(2)
    for layer in range(cache.num_layers):
        shape = (1, len(text.prompt) - 1, cache.num_kv_heads, cache.head_dim)
        k, v = (torch.empty(shape, dtype=cache.dtype).normal_(generator=random) for _ in range(2))
        cache.append(layer, k, v)
    return cache


def measure(text: Text, method: Ngram | SelfSpeculation, new: int, seconds: float) -> Row:
    """Medians of the rates of runs that take turns, at least `seconds` of them together."""
    # N-grams need to see the prompt; the model's own drafts need not, and it need not be read every time.
    document = read(text) if isinstance(method, SelfSpeculation) else None
    written(text, method, min(new, 8), document)
    plain: list[Completion] = []
    drafting: list[Completion] = []
    begin = time.perf_counter()
    while len(plain) < _FEWEST_TURNS or (len(plain) < _MOST_TURNS and time.perf_counter() - begin < seconds):
        plain.append(written(text, None, new, document))
        drafting.append(written(text, method, new, document))
        assert plain[-1].tokens == drafting[-1].tokens, "speculation must not change the text"
        if seconds == 0:
            break
    rates = [statistics.median(done.stats.decode_rate for done in runs) for runs in (plain, drafting)]
    drafted, accepted = (
        statistics.mean(getattr(done.stats, name) for done in drafting) for name in ("drafted", "accepted")
    )
    config = text.model.config
    return {
        "kind": "speculation", "text": text.name, "method": "ngram" if isinstance(method, Ngram) else "self",
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == text.model.dtype),
        "layers": config.num_layers, "hidden": config.hidden_size, "tokens": len(text.prompt), "new_tokens": new,
        "plain_tokens_per_s": rates[0], "tokens_per_s": rates[1], "speedup": rates[1] / rates[0],
        "drafted": drafted, "accepted": accepted, "acceptance": accepted / drafted if drafted else None,
        "tokens_per_step": new / (new - accepted), "turns": len(plain),
    }  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt, for n-gram drafts")
    parser.add_argument("--long-tokens", type=int, default=16384, help="of the prompt, for the model's own drafts")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024, help="tokens that the model's own drafts read")
    parser.add_argument("--layers", type=int, default=8, help="of the models with random weights")
    parser.add_argument("--hidden", type=int, default=512, help="their width, a multiple of 64")
    parser.add_argument("--texts", choices=["phrases", "counting", "noise", "code"], nargs="+",
                        default=["phrases", "counting", "noise", "code"])  # fmt: skip
    parser.add_argument("--methods", choices=["ngram", "self"], nargs="+", default=["ngram", "self"])
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=["fp32"])
    parser.add_argument("--full-set", action="store_true", help="fp32 and bf16, 512 new tokens, to 65536 tokens")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--seconds", type=float, default=20, help="to spend on each row")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to stdout")
    args = parser.parse_args(argv)
    if args.full_set:
        args.dtype, args.new_tokens, args.long_tokens = ["fp32", "bf16"], 512, 65536
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    ceilings = peaks()
    rows: list[Row] = []
    for dtype in args.dtype:
        for name in args.methods:
            method = Ngram() if name == "ngram" else SelfSpeculation(window=args.window, from_tokens=0)
            for text in args.texts:
                print(f"{dtype} {name} {text}", file=sys.stderr)
                tokens = args.tokens if name == "ngram" else args.long_tokens
                size = Size(args.layers, args.hidden, DTYPES[dtype])
                rows.append(measure(text_of(text, size, tokens), method, args.new_tokens, args.seconds))
    content = result("speculation", ceilings, rows)
    if args.json != "-":
        show(content)
    if args.json:
        write_json(args.json, content)


if __name__ == "__main__":
    main(sys.argv[1:])
