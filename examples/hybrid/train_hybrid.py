"""Trains small decoders of attention, of recurrent layers and of both on the bundled model's task.

    python examples/hybrid/train_hybrid.py --models attention,delta,hybrid --out build/hybrid   # minutes each
    python examples/hybrid/train_hybrid.py --smoke --out /tmp/hybrid-smoke

The windows, the loss and the optimiser are those of examples/needle. The weights are fixed by --seed, the version of
Python (its standard library is the text) and the kernels of the machine.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "needle"))

from data import Stage, Windows
from hybrid_model import MODELS, HybridDecoder
from hybrid_start import start_for_retrieval
from train import train

from lcore.evaluation.haystack import stdlib_text
from lcore.evaluation.needle import BUNDLED_MODEL
from lcore.models import Tokenizer

TEXT_CHARS = 4_000_000
# Windows grow, and with them what a state has to hold. Each round warms up and cools down, and goes on from the file of
# the one before.
ROUNDS = (
    (
        Stage(steps=60, batch=12, window=96, needles=2, questions=2),
        Stage(steps=100, batch=12, window=128, needles=3, questions=3),
        Stage(steps=150, batch=8, window=256, needles=6, questions=6),
        Stage(steps=50, batch=4, window=512, needles=12, questions=12),
        Stage(steps=40, batch=3, window=1024, needles=24, questions=24),
    ),
    (
        Stage(steps=60, batch=8, window=256, needles=6, questions=6),
        Stage(steps=40, batch=4, window=512, needles=12, questions=12),
        Stage(steps=60, batch=2, window=1024, needles=24, questions=24),
        Stage(steps=30, batch=1, window=2048, needles=32, questions=32),
    ),
)
SMOKE_ROUNDS = ((Stage(steps=2, batch=2, window=256, needles=6, questions=6),),) * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="attention,delta,hybrid", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=Path("build/hybrid"), help="folder for NAME.safetensors")
    parser.add_argument("--round", type=int, default=0, help="the first round; those before it have written to --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that everything runs")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds = SMOKE_ROUNDS if args.smoke else ROUNDS
    text = stdlib_text(200_000 if args.smoke else TEXT_CHARS, split="train")
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    for name, number in product(args.models.split(","), range(args.round, len(rounds))):
        file, seed = args.out / f"{name}.safetensors", args.seed + number
        torch.manual_seed(seed)
        windows = Windows(tokenizer.backend, text, seed=seed, span=1 << 17)
        model = HybridDecoder.load(file) if number else HybridDecoder(MODELS[name])
        if not number:
            start_for_retrieval(model)
        print(f"{name}, round {number}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        for line in train(model, windows, rounds[number], args.rate, torch.float32):
            print(f"{name} {line}", flush=True)
        model.save(file)


if __name__ == "__main__":
    main()
