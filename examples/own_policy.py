"""An eviction policy of one's own, in ten lines: keep the tokens whose values are long.

    python examples/own_policy.py MODEL_FOLDER TEXT_FILE

reads the text with a budget of 1,024 tokens a head, and prints the continuation and how much of the text was kept.
"""

import sys
from pathlib import Path

import torch

import lcore


class LongValues(lcore.policies.Policy):
    """Keeps the sinks, the recent tokens, and of the rest those with the largest values."""

    def scores(self, layer: lcore.policies.LayerView) -> torch.Tensor:
        return layer.per_key(lambda k, v: v.norm(dim=-1))


def main(folder: str, text_file: str) -> None:
    model = lcore.load_model(folder)
    generator = lcore.Generator(model, prefill_chunk=512, policy=LongValues(budget=1024, sinks=4, window=128))
    print(generator.generate(Path(text_file).read_text(encoding="utf-8"), max_new_tokens=64).text)
    cache = generator.cache
    kept, seen, size = int(cache.lengths(0).max()), int(cache.seen()[0]), cache.stats()["bytes"]
    print(f"{kept:,} of {seen:,} tokens kept, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
