"""What of a StateCache goes into a session file: its states, and those of its checkpoints behind them.

Tensors: "state.seen" int64 (rows,); "state.rows" and "state.places" int64 (checkpoints,), the row and the tokens of
each checkpoint, rising in each row; "state.N.conv" and "state.N.recurrent" of layer N, (rows + checkpoints, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcore.cache.state_places import LayerState
from lcore.cache.states import StateCache
from lcore.errors import dtype_name

STATE = "state."  # begins the tensors' names


def state_settings(cache: StateCache) -> dict[str, Any]:
    """The shape of a cache in JSON's types; what it keeps to go back to is the reader's choice."""
    layers = {
        f"states.{layer}.{name}": f"{dtype_name(x.dtype)} {list(x.shape[1:])}"
        for layer in range(cache.num_layers)
        for name, x in zip(LayerState._fields, cache.layer(layer), strict=True)
    }
    return {"states.num_layers": cache.num_layers, "batch_size": cache.batch_size, **layers}


def state_tensors(cache: StateCache) -> dict[str, Tensor]:
    """All that a cache knows."""
    kept = [(row, n, states) for row in range(cache.batch_size) for n, states in cache.checkpoints(row).items()]
    tensors = {
        "state.seen": cache.seen(),
        "state.rows": torch.tensor([row for row, _, _ in kept], dtype=torch.int64),
        "state.places": torch.tensor([n for _, n, _ in kept], dtype=torch.int64),
    }
    for layer in range(cache.num_layers):
        for field, name in enumerate(LayerState._fields):
            parts = [cache.layer(layer)[field], *(states[layer][field] for _, _, states in kept)]
            tensors[f"{STATE}{layer}.{name}"] = torch.cat(parts)
    return tensors


def misfit(cache: StateCache, tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with the tensors of a file whose settings are the cache's; "" for nothing."""
    own = state_tensors(cache)
    if set(own) != set(tensors):
        return f"the tensors {', '.join(sorted(tensors))}"
    rows, places, seen = (tensors[f"{STATE}{name}"] for name in ("rows", "places", "seen"))
    count = cache.batch_size + len(places)
    for name, tensor in tensors.items():
        first = {"state.rows": len(places), "state.places": len(places), "state.seen": cache.batch_size}
        shape = (first.get(name, count), *own[name].shape[1:])
        if tensor.dtype != own[name].dtype or tuple(tensor.shape) != shape:
            return f"{name} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < cache.batch_size and int(places.min()) > 0):
        return "checkpoints of other rows"
    if bool((seen < 0).any()) or bool((places > seen[rows]).any()):
        return "checkpoints behind the text"
    return ""


def fill_states(cache: StateCache, tensors: Mapping[str, Tensor]) -> None:
    """Puts what `state_tensors` gave into a cache that has read nothing."""
    layers = [[tensors[f"{STATE}{layer}.{name}"] for name in LayerState._fields] for layer in range(cache.num_layers)]
    rows = cache.batch_size
    for at, (row, n) in enumerate(zip(tensors["state.rows"].tolist(), tensors["state.places"].tolist(), strict=True)):
        states = tuple(LayerState(*(x[rows + at : rows + at + 1].clone() for x in pair)) for pair in layers)
        cache._places[row].add(n, states, cache.max_checkpoints)
    cache._replace(tuple(LayerState(*(x[:rows].clone() for x in pair)) for pair in layers))
    cache._seen = tensors["state.seen"].clone()
