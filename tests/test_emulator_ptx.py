"""The wrappers of csrc/cuda/ptx: emulated against plain loops, and compiled by nvcc from the same source."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from emulated import ROOT, Gemm, Matrices, emulator, raise_if

KERNELS = ROOT / "tests" / "emulator" / "kernels"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "s8": torch.int8}


def product(a, b, how):
    c = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32 if a.dtype == torch.int8 else torch.float32)
    # 16-bit operands come through ldmatrix with b by rows, the others as words with b by columns.
    b_memory = b.contiguous() if a.element_size() == 2 else b.T.contiguous()
    with emulator(a=a, b=b_memory, c=c) as emulated:
        raise_if(
            how(emulated, ctypes.byref(Gemm(a.data_ptr(), b_memory.data_ptr(), c.data_ptr(), *c.shape, a.shape[1])))
        )
    return c


def small_numbers(*shape):
    """Integers whose products and sums every type holds exactly."""
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(16, 8, 32), (32, 24, 96), (48, 8, 160)])
def test_products_are_exact(name, m, n, k):
    a, b = small_numbers(m, k).to(TYPES[name]), small_numbers(k, n).to(TYPES[name])
    c = product(a, b, lambda emulated, p: emulated.lcore_emulator_gemm(name.encode(), p))
    assert torch.equal(c.double(), a.double() @ b.double())


def test_products_of_fp8():
    a, b = (small_numbers(*shape).to(torch.float8_e4m3fn) for shape in ((32, 64), (64, 16)))
    c = product(a, b, lambda emulated, p: emulated.lcore_emulator_gemm_fp8(p))
    assert torch.equal(c.double(), a.double() @ b.double())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_products_are_added_in_float32(name):
    a, b = torch.randn(16, 512).to(TYPES[name]), torch.randn(512, 8).to(TYPES[name])
    c = product(a, b, lambda emulated, p: emulated.lcore_emulator_gemm(name.encode(), p))
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-4)
    assert not torch.equal(c.double(), a.double() @ b.double())


def test_tf32_forgets_the_lower_bits():
    a, b = torch.full((16, 8), 1 + 2**-11 + 2**-12), torch.full((8, 8), 1 + 2**-10)
    c = product(a, b, lambda emulated, p: emulated.lcore_emulator_gemm(b"tf32", p))
    assert torch.equal(c, torch.full((16, 8), 8 * (1 + 2**-10)))


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(transposed):
    want = torch.randperm(256).to(torch.int16).reshape(4, 8, 8)
    fragments = torch.zeros(32, 4, 2, dtype=torch.int16)
    for lane in range(32):
        for half in range(2):
            row, column = lane // 4, 2 * (lane % 4) + half
            fragments[lane, :, half] = want[:, column, row] if transposed else want[:, row, column]
    out = torch.zeros_like(want)
    with emulator(fragments=fragments, out=out) as emulated:
        matrices = Matrices(fragments.data_ptr(), out.data_ptr(), transposed)
        raise_if(emulated.lcore_emulator_store_fragments(ctypes.byref(matrices)))
    assert torch.equal(out, want)


def count_bytes(announced, brought):
    out = torch.zeros(1)
    with emulator(out=out) as emulated:
        raise_if(emulated.lcore_emulator_count_bytes(ctypes.c_void_p(out.data_ptr()), announced, brought))
    return out.item()


def test_an_mbarrier_counts_bytes():
    assert count_bytes(4096, 4096) == 7


def test_an_mbarrier_waits_for_missing_bytes():
    with pytest.raises(RuntimeError, match=r"an mbarrier, phase of parity 0, \d arrivals and \d+ bytes short"):
        count_bytes(4096, 4080)


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("gemm", "sm_80"),
        ("async", "sm_80"),
        ("gemm_sm90", "sm_90"),
        ("tma", "sm_90a"),
        ("pipeline", "sm_90a"),
        pytest.param("wgmma", "sm_90a", marks=pytest.mark.slow),
        pytest.param("broken", "sm_80", marks=pytest.mark.slow),
        pytest.param("collectives", "sm_80", marks=pytest.mark.slow),
    ],
)
def test_nvcc_compiles_the_same_source(source, architecture, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}"]  # the real wrappers first
    command = [
        nvcc,
        "-std=c++20",
        f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}",
        *include,
        "-c",
        str(KERNELS / f"{source}.cu"),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_wrapper_has_a_twin():
    real, twins = (
        {path.name for path in (ROOT / folder).glob("*.h")} for folder in ("csrc/cuda/ptx", "tests/emulator/cuda/ptx")
    )
    assert real == twins
