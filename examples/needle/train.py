"""Trains the bundled model: a small Llama that answers questions about documents far longer than its training windows.

    python examples/needle/train.py                 # writes python/lcore/data/needle, 5 minutes on one core
    python examples/needle/train.py --smoke --out /tmp/needle-smoke

Forward and backward run on lcore's modules, attention and rotary kernels.  The weights are fixed by --seed, the version
of Python (its standard library is the text) and the kernels of the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from data import ANSWER, TEXT, Batch, Stage, Windows, train_tokenizer
from start import start_for_retrieval

from lcore.evaluation.haystack import stdlib_text
from lcore.models import Decoder, ModelConfig, Tokenizer
from lcore.positions import RopeConfig

FOLDER = Path(__file__).resolve().parents[2] / "python" / "lcore" / "data" / "needle"
SPAN = 131072 + 8192  # position ids seen in training
# Windows grow: the long ones teach the softmax to pass over many tokens.
STAGES = (
    Stage(steps=220, batch=12, window=256, needles=6, questions=6),
    Stage(steps=200, batch=6, window=512, needles=12, questions=12),
    Stage(steps=120, batch=2, window=2048, needles=24, questions=24),
    Stage(steps=40, batch=1, window=4096, needles=40, questions=40),
)
SMOKE_STAGES = (Stage(steps=5, batch=2, window=256, needles=6, questions=6),)
WARMUP, DECAYING = 50, 0.4  # steps, and the last part of all steps, in which the learning rate changes
TEXT_WEIGHT, TEXT_SHARE = 0.3, 0.25  # of the text loss, and of the text tokens that it looks at


def config(vocab_size: int) -> ModelConfig:
    """With theta = 1e12 half of each head's pairs stand nearly still over the whole span: they match by content."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        rope=RopeConfig(theta=1e12),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(1,),
    )


def loss_of(model: Decoder, batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean cross entropy of the answers and of a share of the text, and the share of right answer tokens."""
    answers = batch.kinds == ANSWER
    text = (batch.kinds == TEXT) & (torch.rand(batch.kinds.shape) < TEXT_SHARE)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        features = model.features(batch.tokens, positions=batch.positions)
        logits = model.lm_head(torch.cat([features[answers], features[text]])).float()
    count = int(answers.sum())
    right = (logits[:count].argmax(-1) == batch.targets[answers]).float().mean().item()
    text_loss = F.cross_entropy(logits[count:], batch.targets[text], reduction="sum") / max(1, len(logits) - count)
    return F.cross_entropy(logits[:count], batch.targets[answers]), text_loss, right


@torch.no_grad()
def sharpen(model: Decoder, factor: float) -> None:
    """Multiplies all attention logits by `factor`: trained among few tokens, they must stand out among many."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(factor)


def rate_at(step: int, total: int, peak: float) -> float:
    """Linear warm-up, a plateau, a linear way down."""
    return peak * min(1.0, (step + 1) / WARMUP, (total - step) / (DECAYING * total))


def with_steps(stages: tuple[Stage, ...], steps: int) -> tuple[Stage, ...]:
    """The same stages with `steps` steps in all, each in its old share."""
    total = sum(stage.steps for stage in stages)
    return tuple(replace(stage, steps=max(1, round(stage.steps * steps / total))) for stage in stages)


def train(
    model: Decoder, windows: Windows, stages: tuple[Stage, ...], peak: float, dtype: torch.dtype
) -> Iterator[str]:
    """Runs the stages; yields a line of progress every 50 steps."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    total, step, begin = sum(stage.steps for stage in stages), 0, time.perf_counter()
    for stage in stages:
        for _ in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, total, peak)
            answer_loss, text_loss, right = loss_of(model, windows.batch(stage), dtype)
            optimizer.zero_grad()
            (answer_loss + TEXT_WEIGHT * text_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0 or step == total:
                yield (
                    f"{step:5}/{total} window {stage.window:5} answers {answer_loss.item():7.4f} right {right:6.1%} "
                    f"text {text_loss.item():6.3f} {time.perf_counter() - begin:6.0f} s"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: the package's data)")
    parser.add_argument("--steps", type=int, help="optimizer steps in all (default: the full recipe)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the matrix products")
    parser.add_argument("--sharpen", type=float, default=1.5, help="factor on the attention logits after training")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that everything runs")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    stages = SMOKE_STAGES if args.smoke else STAGES
    if args.steps:
        stages = with_steps(stages, args.steps)
    text = stdlib_text(200_000 if args.smoke else None, split="train")
    backend = train_tokenizer(text, vocab_size=2048)
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "model_max_length": 131072}
    tokenizer = Tokenizer(backend, settings)
    windows = Windows(backend, text, seed=args.seed, span=SPAN)
    model = Decoder(config(backend.get_vocab_size()), tokenizer=tokenizer)
    start_for_retrieval(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(map(len, windows.lines)):,} tokens of text")
    for line in train(model, windows, stages, args.rate, getattr(torch, args.dtype)):
        print(line, flush=True)
    sharpen(model, args.sharpen)
    model.to(torch.bfloat16).save(args.out, overwrite=True)
    print(f"wrote {args.out}, {sum(file.stat().st_size for file in args.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
