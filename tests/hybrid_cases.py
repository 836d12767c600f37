"""Small random hybrid checkpoints written by transformers, whose logits are the oracle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "initializer_range": 0.2, "attn_implementation": "eager",
}  # fmt: skip
JAMBA: dict[str, Any] = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0,
    "mamba_d_state": 8,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40,
}  # fmt: skip

# name: (family, what differs from SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "jamba": ("Jamba", JAMBA),
    "jamba-biases": ("Jamba", JAMBA | {
        "attn_layer_period": 3, "expert_layer_offset": 1, "mamba_d_state": 5, "mamba_dt_rank": 7, "mamba_d_conv": 3,
        "mamba_expand": 3, "mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True,
    }),
    "jamba-dense": ("Jamba", JAMBA | {"num_experts": 1, "num_experts_per_tok": 1}),
    "qwen3_next": ("Qwen3Next", QWEN),
    "qwen3_next-sparse": ("Qwen3Next", QWEN | {
        "attention_bias": True, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        "linear_conv_kernel_dim": 2, "tie_word_embeddings": True,
    }),
}  # fmt: skip
_FUSED = re.compile(r"(.*\.experts\.)(gate_up_proj|down_proj)")


def build_reference(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A transformers model in eval mode, all of whose parameters matter: norms, biases and D random, states that are
    kept over the whole text and changed by every token."""
    family, differs = CASES[name]
    config = getattr(transformers, f"{family}Config")(**(SIZES | differs))
    config._experts_implementation = "eager"  # the other ones have no float64
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 or (key.endswith("A_log") and family == "Jamba"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            if key.endswith("dt_proj.bias"):
                parameter.add_(2)
            if key.endswith("A_log") and family == "Qwen3Next":
                parameter.sub_(4)  # states that last longer than a chunk
            if key.endswith("embed_tokens.weight"):
                parameter.normal_()
    return model


def write_reference(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Builds a reference and writes its Hugging Face folder."""
    model = build_reference(name)
    model.save_pretrained(folder)
    return model


def unfused(name: str, fused: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter of transformers, or its gradient, as the tensors that a checkpoint has for it."""
    found = _FUSED.fullmatch(name)
    if found is None:
        return {name: fused}
    begin, kind = found.groups()
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return {
        f"{begin}{expert}.{part}.weight": tensor
        for expert, whole in enumerate(fused)
        for part, tensor in zip(parts, whole.chunk(len(parts)), strict=True)
    }
