"""Small models with random weights and a byte tokenizer, as objects and as checkpoint folders."""

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers

from lcore.models import Decoder, ModelConfig, Tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """One token a byte, and "<end>" as the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>"}, chat_template)


def tiny_decoder(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Decoder:
    """Two layers, grouped heads, weights large enough that the text is not one token repeated."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
        "max_position_embeddings": 1 << 20,
    }
    tokenizer = changes.pop("tokenizer", byte_tokenizer())
    return Decoder(ModelConfig(**{**sizes, **changes}), dtype=dtype, tokenizer=tokenizer).eval()


def tiny_folder(path: Path, **changes) -> Path:
    tiny_decoder(**changes).save(path)
    return path


def greedy_by_hand(model, prompt, chunk, new, **options):
    """Greedy ids from the model itself, fed chunk by chunk, over a cache of its own; ids and cache."""
    cache = model.new_cache(**options)
    ids = []
    with torch.no_grad():
        for start in range(0, len(prompt), chunk):
            logits = model(torch.tensor([prompt[start : start + chunk]]), cache, last_only=True)
        for _ in range(new):
            ids.append(int(logits[0, 0].argmax()))
            logits = model(torch.tensor([ids[-1:]]), cache, last_only=True)
    return ids, cache
