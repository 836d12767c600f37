"""Small random Mamba checkpoints written by transformers, whose logits are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {"vocab_size": 131, "hidden_size": 64, "state_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 32}
PLAIN: dict[str, Any] = {
    "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "residual_in_fp32": False,
    "tie_word_embeddings": False,
}  # fmt: skip

# name: (family, what differs from SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {}),
    "mamba-plain": ("Mamba", PLAIN | {"state_size": 5, "time_step_rank": 7}),
    "mamba-narrow": ("Mamba", {"intermediate_size": 96}),
    "falcon": ("FalconMamba", {"mixer_rms_eps": 1e-2, "tie_word_embeddings": False}),
    "mamba2": ("Mamba2", HEADS),
    "mamba2-plain": ("Mamba2", HEADS | PLAIN | {"n_groups": 1, "tie_word_embeddings": True}),
    "mamba2-limits": ("Mamba2", HEADS | {"n_groups": 8, "time_step_limit": (0.1, 0.6)}),
}


def build_reference(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A transformers model in eval mode, all of whose parameters matter: steps from 0.01 to 1, so that states are kept
    over the whole text and changed by every token; norms, biases and D random."""
    family, differs = CASES[name]
    config = getattr(transformers, f"{family}Config")(**(SIZES | differs))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 or key.endswith("A_log"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            if key.endswith(("dt_bias", "dt_proj.bias")):
                parameter.add_(2)
    return model


def write_reference(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Builds a reference and writes its Hugging Face folder."""
    model = build_reference(name)
    model.save_pretrained(folder)
    return model


def one_by_one(model: transformers.PreTrainedModel, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """transformers' logits of a text read part by part over its own cache."""
    cache, logits = None, []
    with torch.no_grad():
        for part in parts:
            out = model(part, cache=cache, use_cache=True)
            cache = out.cache
            logits.append(out.logits.float())
    return torch.cat(logits, dim=1)
