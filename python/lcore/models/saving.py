"""From a model to a Hugging Face folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from lcore.errors import dtype_name, message, require
from lcore.models.checkpoint import INDEX, SINGLE, shown
from lcore.models.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    from lcore.models.causal_lm import CausalLM

# transformers' own limit: larger single files are awkward to move and to resume
SHARD_BYTES = 5 * 10**9
_FILES = {"config.json", "generation_config.json", SINGLE, INDEX, *TOKENIZER_FILES}


def save_model(
    model: CausalLM, path: str | os.PathLike[str], *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json, generation_config.json, the weights and the tokenizer; see `Decoder.save`."""
    target = Path(path)
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    fresh = target.parent / f".{target.name}.{mark}.new"
    fresh.mkdir()
    try:
        _write_json(fresh / "config.json", model.config.to_dict() | {"dtype": dtype_name(model.dtype)})
        ids = {name: model.config.to_dict()[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        given = {name: value for name, value in ids.items() if value is not None}
        _write_json(fresh / "generation_config.json", given)
        _write_weights(fresh, dict(model.named_parameters()), shard_bytes)
        if model.tokenizer is not None:
            model.tokenizer.save(fresh)
        _move(fresh, target, target.parent / f".{target.name}.{mark}.old")
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    require(target.is_dir(), "Decoder.save", "path", "be a folder or not exist", target)
    held = sorted(entry.name for entry in target.iterdir())
    if held and not overwrite:
        rule = "not exist or be empty (overwrite=True replaces a saved model)"
        raise FileExistsError(message("Decoder.save", "path", rule, f"{target} with {shown(held)}"))
    foreign = [name for name in held if name not in _FILES and not name.endswith(".safetensors")]
    require(not foreign, "Decoder.save", "path", "hold only files of a saved model", f"{target} with {shown(foreign)}")


def _write_weights(folder: Path, parameters: dict[str, torch.nn.Parameter], shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, parameter in parameters.items():
        size = parameter.nbytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = parameter.detach().contiguous()
        filled += size
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        # safetensors makes its files readable by their owner alone; the others follow the umask.
        (folder / name).chmod((folder / "config.json").stat().st_mode)
    if count > 1:
        total = sum(parameter.nbytes for parameter in parameters.values())
        placed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _move(fresh: Path, target: Path, old: Path) -> None:
    """Renames fresh to target; a full target steps aside first and is deleted last."""
    if not target.exists() or not any(target.iterdir()):
        fresh.rename(target)
        return
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
