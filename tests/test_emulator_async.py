"""Copies and barriers that do not wait: what they bring, and the mistakes that hardware mostly forgives."""

import ctypes

import pytest
import torch
from emulated import emulator, raise_if

BROKEN = {
    "ring_starved": r"thread \(32, 0, 0\) waits at an mbarrier, phase of parity 0, 1 arrivals and 0 bytes short",
    "ring_overrun": r"no barrier between warp [01]'s access of static shared memory \+ \d+ and this of warp [01]",
    "mbarrier_unmade": r"changes atomically 8 bytes at 0x\w+: nobody has written static shared memory",
    "mbarrier_unannounced": r"changes atomically 8 bytes at 0x\w+: no barrier between warp 0's access",
    "named_starved": r"\(32, 0, 0\): waits for ever at barrier 1 for 96 threads; thread \(0, 0, 0\) has returned",
    "named_odd": r"barrier 1: waits for 63 threads, which is no multiple of 32",
    "named_differently": r"barrier 2: one thread waits for 64 threads, another for 96",
    "copied_early": r"the cp\.async that fills static shared memory \+ \d+ was not waited for",
    "copied_misaligned": r"thread \(1, 0, 0\): writes 16 bytes at 0x\w+: not aligned to 16",
    "copied_past_end": r"cp\.async: fills 20 of 16",
}


def run(name):
    data = torch.arange(1.0, 129.0)
    with emulator(data=data) as emulated:
        raise_if(emulated.lcore_emulator_async(name.encode(), ctypes.c_void_p(data.data_ptr())))
    return data


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_caught(name):
    with pytest.raises(RuntimeError, match=BROKEN[name]):
        run(name)


def test_a_ring_of_mbarriers():
    assert torch.equal(run("ring"), 2 * torch.arange(1.0, 129.0).view(4, 32).flip(1).flatten())


def test_a_named_barrier():
    assert torch.equal(run("named")[:32], 2 * torch.arange(1.0, 33.0).flip(0))


def test_copies_of_4_bytes():
    assert torch.equal(run("copied")[:64], 2 * torch.arange(1.0, 65.0).flip(0))


def test_copies_fill_with_zeros():
    assert not run("copied_zeros")[:32].any()
