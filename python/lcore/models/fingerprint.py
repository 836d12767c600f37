"""What a cache depends on in a model, as strings that can be kept and compared."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from lcore.errors import dtype_name

if TYPE_CHECKING:
    from lcore.models.causal_lm import CausalLM

# Of each parameter: 16 pieces of 256 bytes. A model in any way trained on differs in nearly every one of them, and the
# 300 tensors of an 8 B model cost 5,000 reads of a page from disk.
_PIECES, _PIECE_BYTES = 16, 256
# Fields that change no key and no value.
_IRRELEVANT = ("initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id")


def fingerprint(model: CausalLM) -> dict[str, str]:
    """The fields of the config that fix keys and values, "dtype", and "weights".

    Nested fields have dotted names ("rope.theta"). "weights" is SHA-256 over name, dtype, shape and a sample of the
    bytes of every parameter: 4096 bytes, in pieces spread evenly from its first byte to its last, or all of a smaller
    one. Cheap, and no protection against who changes weights to deceive.
    """
    config = asdict(model.config) | {"model_type": model.config.model_type}
    fields = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    return _flat(fields) | {"dtype": dtype_name(model.dtype), "weights": _weights(model)}


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in fields.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: str(value)}
    return found


def _weights(model: CausalLM) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {dtype_name(parameter.dtype)} {tuple(parameter.shape)}\n".encode())
        digest.update(_sample(parameter.detach()).tobytes())
    return digest.hexdigest()


def _sample(parameter: torch.Tensor) -> Any:
    """uint8 NumPy array."""
    data = parameter.contiguous().flatten().view(torch.uint8)
    if len(data) > _PIECES * _PIECE_BYTES:
        begins = torch.linspace(0, len(data) - _PIECE_BYTES, _PIECES, dtype=torch.float64).long()
        data = torch.cat([data[begin : begin + _PIECE_BYTES] for begin in begins.tolist()])
    return data.cpu().numpy()
