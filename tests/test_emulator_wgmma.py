"""Products of a warpgroup against plain ones, alone and behind a pipeline of tensor copies, and their mistakes."""

import ctypes

import pytest
import torch
from emulated import emulator, raise_if

TYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn, "s8": torch.int8
}  # fmt: skip
WAYS = [
    *("bf16", "bf16 n256", "bf16 rows of 64", "bf16 rows of 32", "bf16 no swizzle", "bf16 b by n", "bf16 both by mn"),
    *("fp16 both by mn, rows of 32", "fp16 both by mn, no swizzle", "bf16 a in registers"),
    *("fp16 a in registers, b by n", "tf32", "tf32 a in registers", "e4m3", "e4m3 a in registers", "s8"),
    "s8 a in registers",
]
DEPTH = 128


def numbers(*shape):
    """Integers whose products and sums every type holds exactly."""
    return torch.randint(-8, 9, shape).float()


def product(way, mistake="none", threads=128):
    """c of the kernel, and the a and b that it was given: (64, k) and (k, n)."""
    with emulator() as emulated:
        n = emulated.lcore_emulator_wgmma_size(way.encode())
    dtype = TYPES[way.split()[0]]
    a, b = numbers(64, DEPTH).to(dtype), numbers(DEPTH, n).to(dtype)
    given_a = a.T.contiguous() if "both" in way else a
    given_b = b if "b by n" in way or "both" in way else b.T.contiguous()
    c = torch.zeros(64, n, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    with emulator(a=given_a, b=given_b, c=c) as emulated:
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (given_a, given_b, c))
        raise_if(emulated.lcore_emulator_wgmma(way.encode(), mistake.encode(), *pointers, DEPTH, threads))
    return c, a, b


@pytest.mark.parametrize("way", WAYS)
def test_products_are_exact(way):
    c, a, b = product(way)
    assert torch.equal(c.double(), a.double() @ b.double())


def test_results_appear_at_the_wait():
    c, _, _ = product("bf16", "reads_early")
    assert c.isnan().all()


BROKEN = {
    "no_fence": r"wgmma: no wgmma_fence since the warp's last wait",
    "writes_early": r"wgmma: accumulators were written before the wait",
    "no_proxy_fence": r"wgmma reads 16 bytes: no fence\.proxy\.async after warp \d wrote dynamic shared memory \+ \d+",
    "overwrites": r"writes 1 bytes at .*: an asynchronous operation that reads dynamic shared memory \+ \d+ was not",
    "leaves": r"wgmma: the thread returned while products were on their way",
    "three_warps": r"wgmma: warps of a warpgroup ask for different products",
    "one_warp_less": r"wgmma\.wait_group for warps of its warpgroup that have not asked for product 0; thread \(",
    "odd_start": r"wgmma: the operand does not begin in the first row of the swizzle's pattern",
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_kernel_is_caught(mistake):
    with pytest.raises(RuntimeError, match=BROKEN[mistake]):
        product("bf16", mistake)


def test_a_warpgroup_has_four_warps():
    with pytest.raises(RuntimeError, match=r"wgmma: a warpgroup is four warps, and this block's last has fewer"):
        product("bf16", threads=96)


def pipeline(mistake="none", m=256, n=384, k=320, blocks=2):
    a, b, c = numbers(m, k).bfloat16(), numbers(n, k).bfloat16(), torch.full((m, n), torch.nan).bfloat16()
    with emulator(a=a, b=b, c=c) as emulated:
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, c))
        raise_if(emulated.lcore_emulator_pipeline(mistake.encode(), *pointers, m, n, k, blocks))
    assert torch.equal(c, (a.float() @ b.float().T).bfloat16())


@pytest.mark.parametrize("blocks", [1, 4, 6])
def test_a_pipeline_of_warpgroups(blocks):
    pipeline(blocks=blocks)


PIPELINES = {
    "no_empty_wait": r"tma_load writes 8192 bytes: (the bulk|an async|no barrier)|more than 1 arrivals in a phase",
    "releases_early": r"tma_load writes 8192 bytes: (an asynchronous operation that reads|no barrier between warp \d)",
    "one_stage_behind": r"wgmma reads 16 bytes: (the bulk load that|nobody has written|no barrier between the bulk)",
    "no_fence": r"tma_store reads 8192 bytes: no fence\.proxy\.async after warp \d+ wrote dynamic shared memory",
}


@pytest.mark.parametrize("mistake", PIPELINES)
def test_a_broken_pipeline_is_caught(mistake):
    with pytest.raises(RuntimeError, match=PIPELINES[mistake]):
        pipeline(mistake)
