"""Builds the CUDA emulator once a session and calls the emulated kernels on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "emulator"
KERNELS = (
    *("broken", "async", "collectives", "gemm", "gemm_fp8", "store_fragments", "count_bytes"),
    *("move_box", "move_bytes", "exchange", "wgmma", "pipeline"),
)
ENTRIES = ["lcore_emulated_merge_states", *(f"lcore_emulator_{name}" for name in KERNELS)]  # return an error's words
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def commanded(*command: object) -> tuple[bool, str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


@functools.cache
def built() -> tuple[str, str]:
    """Why there can be no emulator, and why its build failed; both empty when there is one."""
    cmake = shutil.which("cmake")
    if cmake is None:
        return "cmake is not installed", ""
    done, words = commanded(cmake, "-S", ROOT / "tests" / "emulator", "-B", BUILD)
    if "CUDA_HEADERS" in words:
        return "no CUDA headers: no cuda_runtime.h in $CUDA_HOME/include or /usr/local/cuda/include", ""
    if done:
        done, words = commanded(cmake, "--build", BUILD, "--parallel", os.cpu_count())
    return "", "" if done and "warning" not in words else words


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(BUILD / "libemulated.so"))
    for name in ENTRIES:
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


@contextmanager
def emulator(**tensors: Tensor) -> Iterator[ctypes.CDLL]:
    """The emulator, whose kernels may touch these tensors and nothing else."""
    missing, failure = built()
    if missing:
        pytest.skip(missing)
    assert not failure, failure
    found = library()
    for name, tensor in tensors.items():
        nbytes = ctypes.c_size_t(tensor.numel() * tensor.element_size())
        found.lcore_emulator_register(ctypes.c_void_p(tensor.data_ptr()), nbytes, name.encode())
    try:
        yield found
    finally:
        found.lcore_emulator_forget()


def raise_if(error: bytes) -> None:
    if error:
        raise RuntimeError(error.decode())


class MergeParams(ctypes.Structure):
    """csrc/core/merge_states.h"""

    _fields_ = (
        ("type", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("out_a", "out_b", "lse_a", "lse_b", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("batch", "seq", "heads", "head_dim")),
    )


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, architecture: int = 80
) -> tuple[Tensor, Tensor]:
    """lcore.merge_states of (batch, seq, heads, head_dim) by the CUDA kernel."""
    memory = {"out_a": out_a, "out_b": out_b, "lse_a": lse_a, "lse_b": lse_b}
    memory |= {"out": torch.full_like(out_a, torch.nan), "lse": torch.full_like(lse_a, torch.nan)}
    assert all(x.is_contiguous() for x in memory.values())
    pointers = (x.data_ptr() for x in memory.values())
    with emulator(**memory) as emulated:
        emulated.lcore_emulator_set_architecture(architecture)
        params = MergeParams(DTYPES[out_a.dtype], *pointers, *out_a.shape)
        raise_if(emulated.lcore_emulated_merge_states(ctypes.byref(params)))
    return memory["out"], memory["lse"]


class Gemm(ctypes.Structure):
    """tests/emulator/kernels/gemm.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "c")),
        *((name, ctypes.c_int) for name in ("m", "n", "k")),
    )


class Matrices(ctypes.Structure):
    """tests/emulator/kernels/gemm_sm90.cu"""

    _fields_ = (("fragments", ctypes.c_void_p), ("out", ctypes.c_void_p), ("transposed", ctypes.c_bool))
