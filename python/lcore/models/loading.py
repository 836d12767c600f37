"""From a Hugging Face folder to a model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lcore.errors import message, require_type
from lcore.models.checkpoint import Checkpoint, check_tensors, read_json
from lcore.models.config import ModelConfig
from lcore.models.decoder import Decoder
from lcore.models.families import AnyConfig, parse_config
from lcore.models.hybrid import HybridDecoder
from lcore.models.mamba import MambaDecoder
from lcore.models.mamba_config import MambaConfig
from lcore.models.tokenizer import Tokenizer

# Old checkpoints store the rotation frequencies, which the config fixes; Qwen3-Next's a head that drafts tokens.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|mtp\..*")
AnyModel: TypeAlias = Decoder | MambaDecoder | HybridDecoder
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """Loads a model from a Hugging Face checkpoint folder.

    Llama 2/3, Mistral, Qwen2/2.5 and Qwen3 load as a Decoder; Mamba, Falcon Mamba and Mamba-2 as a MambaDecoder; Jamba
    and Qwen3-Next as a HybridDecoder.

    The folder holds config.json, model.safetensors or its shards with an index, and mostly tokenizer.json. Headers
    are checked against the config first. On the CPU in the checkpoint's own dtype the parameters are views of the
    memory-mapped files, read from disk when first used; otherwise each tensor is converted on its own. The files
    must not be cut short while the model is in use; replacing them by renaming is safe.

    Args:
        path: the folder.
        dtype: of the parameters; None keeps the dtype of the checkpoint's embedding.
        device: where the parameters go.
    Returns: the model in eval mode, its tokenizer in `model.tokenizer` (None without tokenizer.json).
    Raises: FileNotFoundError for a missing folder, config, weights or shard; NotImplementedError for an unknown
        architecture or feature, by name; ValueError for broken JSON, an index that points outside the folder, a
        truncated file, and missing, unexpected or misshapen tensors.
    """
    allowed = dtype is None or dtype in _DTYPES
    require_type(allowed, "load_model", "dtype", f"be None or one of {', '.join(map(str, _DTYPES))}", dtype)
    model, checkpoint = open_checkpoint(path)
    config, expected = model.config, dict(model.named_parameters())
    tokenizer = Tokenizer.from_folder(Path(path), config.eos_token_ids)

    dtype = dtype or checkpoint.dtypes[model.embedding_name]
    state = {name: tensor.to(device, dtype) for name, tensor in checkpoint.tensors(set(expected))}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.tokenizer = tokenizer
    return model.to(device).eval()


def open_checkpoint(path: str | os.PathLike[str]) -> tuple[AnyModel, Checkpoint]:
    """The model of a folder without its weights, on the meta device, and the checkpoint, whose headers fit it."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(message("load_model", "path", "be a folder", folder))
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    config = parse_config(raw, read_json(generation) if generation.is_file() else None)
    checkpoint = Checkpoint(folder)

    model = new_model(config, device="meta")
    optional = {name for name in checkpoint.shapes if _DERIVED.fullmatch(name)}
    if config.tie_word_embeddings:
        optional.add("lm_head.weight")
    check_tensors(checkpoint, dict(model.named_parameters()), optional)
    return model, checkpoint


def new_model(config: AnyConfig, **options: Any) -> AnyModel:
    """The decoder of a config's kind, started at random."""
    if isinstance(config, MambaConfig):
        return MambaDecoder(config, **options)
    return Decoder(config, **options) if isinstance(config, ModelConfig) else HybridDecoder(config, **options)
