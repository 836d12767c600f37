"""Loads the op library and says what is in it."""

import importlib.util

import torch

_spec = importlib.util.find_spec("lcore._C")
if _spec is None or _spec.origin is None:
    raise ImportError(
        "lcore: the extension lcore._C is not installed; run `pip install --no-build-isolation .` in the source folder"
    )
torch.ops.load_library(_spec.origin)


def build_facts() -> dict[str, str]:
    """The build's version, instruction sets and CUDA architectures, as the op library states them."""
    lines = torch.ops.lcore._build_facts().splitlines()
    return dict(line.split("=", 1) for line in lines)
