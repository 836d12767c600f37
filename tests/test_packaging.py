"""One binary for every torch from 2.10 on: what the library needs, and that it loads in another torch than its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

OTHER_TORCH = os.environ.get("LCORE_OTHER_TORCH", "2.10.0")

CHECK = """
import sys, torch
torch.ops.load_library(sys.argv[1])
q, k, v = (torch.randn(1, 300, 4, 64, dtype=torch.float64) for _ in range(3))
out, lse = torch.ops.lcore.attention(q, k, v, True)
expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
torch.testing.assert_close(out, expected.transpose(1, 2))
try:
    torch.ops.lcore.attention(q, k[:, :, :3], v)
except RuntimeError as error:
    assert "heads must be a multiple of kv_heads" in str(error), error
else:
    raise AssertionError("a wrong shape was accepted")
print("torch", torch.__version__, "runs", torch.ops.lcore._build_facts().split()[0])
"""


def library() -> str:
    spec = importlib.util.find_spec("lcore._C")
    assert spec is not None and spec.origin is not None
    return spec.origin


def test_needs_only_the_cpu_library_of_torch() -> None:
    readelf = subprocess.run(["readelf", "-d", library()], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.+)\]", readelf.stdout)
    torch_libraries = [name for name in needed if "torch" in name or "c10" in name]
    assert torch_libraries == ["libtorch_cpu.so"]
    assert not [name for name in needed if "cuda" in name or "python" in name]


def test_uses_only_the_stable_symbols_of_torch() -> None:
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", library()], capture_output=True, text=True, check=True)
    foreign = re.findall(r"\b((?:at|c10|torch)::\S+)", symbols.stdout)
    assert not foreign, f"C++ symbols of torch are not stable: {foreign[:5]}"
    assert "aoti_torch" in symbols.stdout


def test_every_op_has_a_fake_kernel_and_a_cpu_kernel() -> None:
    import torch

    import lcore  # noqa: F401

    ops = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("lcore::")]
    ops = [op.removeprefix("lcore::") for op in ops if not op.startswith("lcore::_")]
    assert len(ops) >= 7
    for op in ops:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"lcore::{op}", "CompositeImplicitAutograd"):
            continue  # made of other ops
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lcore::{op}", "CPU"), op
        assert torch._library.simple_registry.singleton.find(f"lcore::{op}").fake_impl.kernel is not None, op


def test_the_cuda_kernels_of_this_build_are_registered() -> None:
    import torch

    import lcore

    built = bool(lcore.build_info()["cuda_archs"])
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lcore::merge_states", "CUDA") == built


@pytest.mark.slow
def test_loads_in_another_torch(tmp_path: Path) -> None:
    """Installs LCORE_OTHER_TORCH into an environment of its own and runs this build's library there."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={OTHER_TORCH}", "numpy"], check=True)
    run = subprocess.run([python, "-c", CHECK, library()], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"torch {OTHER_TORCH}" in run.stdout
