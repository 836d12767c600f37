"""Builds the CUDA emulator once a session, and lets its kernels take the place of the CPU's."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import warnings
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


def commanded(*command: object) -> tuple[bool, str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


@functools.cache
def built() -> tuple[str, str]:
    """Why there can be no emulator, and why its build failed; both empty when there is one."""
    cmake = shutil.which("cmake")
    if cmake is None:
        return "cmake is not installed", ""
    torch_folder = Path(torch.__file__).parent
    done, words = commanded(cmake, "-S", ROOT / "tests" / "emulator", "-B", BUILD, f"-DTORCH_DIR={torch_folder}")
    if "CUDA_HEADERS" in words:
        return "no CUDA headers: no cuda_runtime.h in $CUDA_HOME/include or /usr/local/cuda/include", ""
    if done:
        done, words = commanded(cmake, "--build", BUILD, "--parallel", os.cpu_count())
    return "", "" if done and "warning" not in words else words


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator; loading it defines torch.ops.lcore_emulated."""
    missing, failure = built()
    if missing:
        pytest.skip(missing)
    assert not failure, failure
    torch.ops.load_library(BUILD / "libemulated.so")
    loaded = ctypes.CDLL(str(BUILD / "libemulated.so"))
    for name in KERNELS:
        getattr(loaded, f"lcore_emulator_{name}").restype = ctypes.c_char_p
    return loaded


@contextmanager
def cuda_kernels(*ops: str, architecture: int = 80) -> Iterator[None]:
    """Inside, these ops of torch.ops.lcore run their CUDA kernels on CPU tensors, called from anywhere."""
    library().lcore_emulator_set_architecture(architecture)
    override = torch.library.Library("lcore", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*other operators may also be overridden")
        for op in ops:
            override.impl(op, getattr(torch.ops.lcore_emulated, op).default, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()


@contextmanager
def emulator(**tensors: Tensor) -> Iterator[ctypes.CDLL]:
    """The emulator, whose kernels may touch these tensors and nothing else."""
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


class Gemm(ctypes.Structure):
    """tests/emulator/kernels/gemm.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "c")),
        *((name, ctypes.c_int) for name in ("m", "n", "k")),
    )


class Matrices(ctypes.Structure):
    """tests/emulator/kernels/gemm_sm90.cu"""

    _fields_ = (("fragments", ctypes.c_void_p), ("out", ctypes.c_void_p), ("transposed", ctypes.c_bool))
