"""The emulator names the mistakes that hardware hides, and is silent where there is none."""

import ctypes

import pytest
import torch
from emulated import emulator, raise_if

STATIC = r"static shared memory \+ \d+"
BROKEN = {
    "global_past_end": r"thread \(63, 0, 0\): writes 4 bytes at 0x\w+ \(broken\.cu:\d+\): 256 bytes into data",
    "global_before": r"thread \(0, 0, 0\): reads 4 bytes at .*: 4 bytes before data",
    "shared_past_end": r"thread \(63, 0, 0\): writes .*: outside the block's 256 bytes of dynamic shared memory",
    "static_past_end": r"thread \(63, 0, 0\): indexes past the end of an array \(broken\.cu:\d+\)",
    "shared_unwritten": rf"thread \((4|5|6)\d, 0, 0\): reads 4 bytes at .*: nobody has written {STATIC}",
    "no_barrier": rf"nobody has written {STATIC}",
    "no_barrier_before_reuse": rf"4 bytes .*: no barrier between warp \d's access of {STATIC} and this of warp \d",
    "barrier_for_some": r"\(0, 0, 0\): waits for ever at barrier 0 for 64 threads; thread \(33, 0, 0\) has returned",
    "vote_for_some": r"\(0, 0, 0\): waits for ever at a vote of its warp; thread \(5, 0, 0\) has returned",
    "misaligned": r"uses a pointer that is not aligned for its type \(broken\.cu:\d+\)",
    "spin_for_ever": r"thread \(0, 0, 0\): runs for ever: 2\^24 accesses",
    "too_much_shared": r"a block has at most 227 KB \(232448 bytes\) of shared memory, got 232449",
}
CORRECT = [
    *("shared_within", "static_within", "shared_written", "two_barriers"),
    *("barrier_for_all", "spin_a_while", "all_shared"),
]


def run(name):
    data = torch.zeros(64)
    with emulator(data=data) as emulated:
        raise_if(emulated.lcore_emulator_broken(name.encode(), ctypes.c_void_p(data.data_ptr())))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_caught(name):
    with pytest.raises(RuntimeError, match=BROKEN[name]) as info:
        run(name)
    if name != "too_much_shared":
        assert f"kernel {name}(Params), block (" in str(info.value)


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_kernel_is_not(name):
    run(name)
