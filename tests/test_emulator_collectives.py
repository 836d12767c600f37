"""Shuffles, votes, reductions and atomics of the emulator against what CUDA says they do."""

import ctypes
import functools
import operator

import pytest
import torch
from emulated import emulator, raise_if

EXPECTED = {  # thread -> value, by column
    "shfl": lambda t: t // 32 * 32 + 5,
    "shfl in segments of 8": lambda t: t // 8 * 8 + 1,
    "shfl_up": lambda t: t - 3 if t % 32 >= 3 else t,
    "shfl_down in segments of 16": lambda t: t + 3 if t % 16 < 13 else t,
    "shfl_xor": lambda t: t ^ 6,
    "ballot": lambda t: sum(1 << lane for lane in range(0, 32, 3)),
    "any and all": lambda t: t // 32 + 2 * (t < 32),
    "match_any": lambda t: sum(1 << lane for lane in range(t % 4, 32, 4)),
    "reduce_add": lambda t: sum(warp_of(t)),
    "reduce_min and reduce_max": lambda t: min(warp_of(t)) - 40 + 1000 * max(warp_of(t)),
    "reduce_xor": lambda t: functools.reduce(operator.xor, (1 << lane % 5 for lane in range(32))),
    "a part of a warp": lambda t: t ^ 1 if t % 32 < 8 else -1,
    "syncthreads_count": lambda t: 13,
    "syncthreads_or and _and": lambda t: 1,
    "shfl of double": lambda t: t ^ 1,
}


def warp_of(t):
    return range(t // 32 * 32, t // 32 * 32 + 32)


@pytest.fixture(scope="module")
def results():
    out, sums = torch.full((64, 16), -1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with emulator(out=out, sums=sums) as emulated:
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (out, sums))
        raise_if(emulated.lcore_emulator_collectives(*pointers, 1))
    return out, sums


@pytest.mark.parametrize("name", EXPECTED)
def test_collective(name, results):
    column = results[0][:, list(EXPECTED).index(name)]
    want = torch.tensor([EXPECTED[name](t) for t in range(64)]).to(torch.int32)  # votes fill the sign bit
    assert torch.equal(column, want)


def test_atomics(results):
    out, sums = results
    assert sums.tolist() == [sum(range(64)), 63, 7, 1]
    assert sorted(out[:, 15].tolist()) == list(range(64))


def test_atomics_of_blocks_on_several_cores():
    out, sums = torch.zeros(64, 16, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with emulator(out=out, sums=sums) as emulated:
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (out, sums))
        raise_if(emulated.lcore_emulator_collectives(*pointers, 200))
    assert sums.tolist() == [200 * sum(range(64)), 63 + 199, 7, 1]
