"""Tiny random models with recurrent states: Mamba, Mamba-2, Jamba, Qwen3-Next, with a byte tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from tiny_model import byte_tokenizer

from lcore.models import HybridDecoder, JambaConfig, MambaConfig, MambaDecoder, Qwen3NextConfig

KINDS = ["mamba", "mamba2", "jamba", "qwen3_next"]
HYBRIDS = ["jamba", "qwen3_next"]
PROMPT = [(17 * i * i + 5 * i + 3) % 256 for i in range(150)]
# Equal bits however a text was cut: their recurrences take the tokens one by one in every kernel.
EXACT = ["mamba", "jamba"]


def tiny_states_model(kind: str, **changes: Any) -> Any:
    """Two to four layers, whose states are kept over the whole text and changed by every token."""
    torch.manual_seed(0)
    if kind in ("mamba", "falcon_mamba", "mamba2"):
        heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if kind == "mamba2" else {}
        config = MambaConfig(257, 32, 2, model_type=kind, state_size=8, initializer_range=0.5, **heads, **changes)
        model: Any = MambaDecoder(config, tokenizer=byte_tokenizer()).eval()
        mixers = [layer.mixer for layer in model.backbone.layers]
    else:
        sizes: dict[str, Any] = {
            "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_layers": 4, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3,
        }  # fmt: skip
        if kind == "jamba":
            sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "state_size": 8}
            config = JambaConfig(**(sizes | changes))
        else:
            sizes |= {
                "layer_types": ("linear_attention", "full_attention") * 2, "key_dim": 16, "value_dim": 16,
                "num_key_heads": 2, "num_value_heads": 4, "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 16,
            }  # fmt: skip
            config = Qwen3NextConfig(**(sizes | changes))
        model = HybridDecoder(config, tokenizer=byte_tokenizer()).eval()
        mixers = [layer.parts.mixer for layer in model.model.layers if not layer.attends]
    with torch.no_grad():
        for mixer in mixers:
            if hasattr(mixer, "dt_proj"):
                mixer.dt_proj.bias.add_(2)
            elif kind == "mamba2":
                mixer.dt_bias.add_(2)
            else:
                mixer.A_log.sub_(4)
    return model


def layer_states(cache: Any) -> list[torch.Tensor]:
    """All state tensors of a cache."""
    states = getattr(cache, "states", cache)
    return [tensor for index in range(states.num_layers) for tensor in states.layer(index)]


def same_states(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(layer_states(a), layer_states(b), strict=True))
