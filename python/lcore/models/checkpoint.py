"""The weights of a Hugging Face folder: found, checked and mapped into memory, never copied whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lcore.errors import message, require

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OWNER = "load_model"
# safetensors' names of the dtypes that a weight may have
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 4  # names listed in an error before "and N more"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError without the file, ValueError for anything but an object."""
    if not path.is_file():
        raise FileNotFoundError(message(_OWNER, "path", f"be a folder with {path.name}", path.parent))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(message(_OWNER, path.name, "be valid JSON", f"{path}: {error}")) from error
    require(isinstance(value, dict), _OWNER, path.name, "hold a JSON object", f"{path}: {type(value).__name__}")
    return value


class Checkpoint:
    """The tensors of a folder by name, over one model.safetensors or the shards of an index.

    Only headers are read until `tensors` runs. An index may name files in the folder only; the files themselves may
    be links, as in Hugging Face's cache.

    Raises: FileNotFoundError for a folder without weights or a missing shard; ValueError for a broken index, a file
        that is not whole, or a tensor that its shard does not hold.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[Path, list[str]] = {}
        for path, wanted in _shards(folder).items():
            with _open(path) as file:
                held = set(file.keys())
                lacking = sorted((wanted or held) - held)
                rule = f"hold the tensors that {INDEX} places in it"
                require(not lacking, _OWNER, path.name, rule, f"no {shown(lacking)}")
                self._files[path] = sorted(wanted or held)
                for name in self._files[path]:
                    part = file.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    kind = part.get_dtype()
                    if kind not in _DTYPES:
                        raise NotImplementedError(message(_OWNER, name, f"have dtype {', '.join(_DTYPES)}", kind))
                    self.dtypes[name] = _DTYPES[kind]

    def tensors(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor): read-only-until-written views of the files, which stay mapped as long as they live."""
        for path, held in self._files.items():
            with _open(path) as file:
                for name in held:
                    if name in names:
                        yield name, file.get_tensor(name)


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor], optional: set[str]) -> None:
    """ValueError unless the checkpoint holds the expected tensors in their shapes, and besides only optional ones."""
    missing = sorted(set(expected) - set(checkpoint.shapes))
    require(not missing, _OWNER, "weights", "hold every tensor of the model", f"none for {shown(missing)}")
    unexpected = sorted(set(checkpoint.shapes) - set(expected) - optional)
    rule = "hold only tensors of the model"
    require(not unexpected, _OWNER, "weights", rule, f"unexpected {shown(unexpected)}")
    for name, tensor in expected.items():
        require(
            checkpoint.shapes[name] == tuple(tensor.shape),
            _OWNER,
            name,
            f"have shape {tuple(tensor.shape)}",
            checkpoint.shapes[name],
        )


def shown(names: list[str]) -> str:
    """The first few names, and how many there are besides."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Files to read, with the tensors that the index places in each; None stands for all the file holds."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        found = sorted(path.name for path in folder.iterdir())
        rule = f"be a folder with {SINGLE} or {INDEX}"
        raise FileNotFoundError(message(_OWNER, "path", rule, f"{folder} with {shown(found) or 'nothing'}"))
    placed = read_json(folder / INDEX).get("weight_map")
    if not (isinstance(placed, dict) and placed and all(isinstance(file, str) for file in placed.values())):
        rule = "have a weight_map from tensor names to file names"
        raise ValueError(message(_OWNER, INDEX, rule, type(placed).__name__))
    shards: dict[Path, set[str] | None] = {}
    for tensor, file in placed.items():
        # A name without any folder, on any system: nothing outside the checkpoint can be reached through the index.
        plain = PureWindowsPath(file).name == file and file not in ("", ".", "..")
        require(plain, _OWNER, INDEX, "name files inside the folder", f"{file!r} for {tensor}")
        names = shards.setdefault(folder / file, set())
        assert names is not None
        names.add(tensor)
    for path in shards:
        if not path.is_file():
            raise FileNotFoundError(message(_OWNER, INDEX, "name files that exist", f"{path.name}, not in {folder}"))
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(message(_OWNER, path.name, "be a whole safetensors file", f"{path}: {error}")) from error
