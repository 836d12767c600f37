"""`make sanitize` is worth something only if its library is the sanitized one, and if that one sees what it should."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.environ.get("LCORE_SANITIZE") != "on", reason="the library of `make sanitize` only")

# NumPy makes views without looking at the memory: q, k and v of 4 tokens, and memory for 3 of one of them.
READ_TOO_FAR = """
import sys
import numpy as np, torch
from numpy.lib.stride_tricks import as_strided
import lcore

def tensor(tokens_held):
    memory = np.zeros(tokens_held * 256, dtype=np.float32)
    return torch.from_numpy(as_strided(memory, (1, 4, 2, 128), (0, 1024, 512, 4)))

which = sys.argv[1]
inputs = [tensor(3 if name == which else 4) for name in "qkv"]
print("called", flush=True)
lcore.attention(*inputs)
print("returned")
"""


def library(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return spec.origin


@pytest.mark.parametrize("module", ["lcore._C", "lcore._runtime"])
def test_the_library_calls_the_sanitizers(module):
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library(module)], capture_output=True, text=True, check=True
    )
    for symbol in ("__asan_init", "__asan_report_load", "__asan_report_store", "__ubsan_handle"):
        assert symbol in symbols.stdout


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_read_out_of_bounds_is_found(which):
    done = subprocess.run([sys.executable, "-c", READ_TOO_FAR, which], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["called"], done.stderr
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "lcore::cpu" in done.stderr, "the report names the kernel"
