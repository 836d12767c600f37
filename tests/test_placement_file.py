"""The file of PagedCache(overflow=...): which pages stay, a full disk, wrong folders, and that nothing is left."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import random_kv
from placement_cases import SYSTEM_PAGE, open_files, resident_bytes

import lcore

if sys.platform != "linux":
    pytest.skip("overflow needs Linux", allow_module_level=True)

from lcore._runtime import PageFile

FOLDER = os.environ.get("TMPDIR", "/var/tmp")


def ids(*values):
    return np.array(values, dtype=np.int32)


def page_file(page_bytes, pages):
    with tempfile.TemporaryFile(dir=FOLDER) as file:
        made = PageFile(file.fileno(), page_bytes)
    memory = made.map(pages)
    made.back(np.arange(pages, dtype=np.int32))
    return made, memory


def touch(file, used, most, ahead=(), *, writes=False):
    return file.touch(ids(*used), ids(*ahead), most, writes)


def hot(file, pages):
    return [i for i in range(pages) if i in file]


def in_memory(memory):
    """Pages of which the system has something in memory."""
    return [i for i in range(len(memory)) if resident_bytes(memory[i : i + 1])]


def test_the_pages_used_longest_ago_are_dropped():
    size = 2 * SYSTEM_PAGE
    file, memory = page_file(size, 8)
    most = 4 * size
    touch(file, [0, 1, 2, 3], most, writes=True)
    memory[:4] = np.arange(4)[:, None] + 1
    touch(file, [1], most)
    touch(file, [4], most)
    assert hot(file, 8) == [1, 2, 3, 4] and file.resident_bytes == most
    touch(file, [3, 2], most)
    touch(file, [0, 5], most)
    assert hot(file, 8) == [0, 2, 3, 5] and not {1, 4} & set(in_memory(memory))
    assert (memory[:4] == np.arange(4)[:, None] + 1).all()


def test_pages_of_one_call_stay_until_the_next():
    file, _ = page_file(SYSTEM_PAGE, 8)
    touch(file, [0, 1, 2, 3, 4, 3], 2 * SYSTEM_PAGE)
    assert hot(file, 8) == [0, 1, 2, 3, 4]
    touch(file, [], 2 * SYSTEM_PAGE)
    assert hot(file, 8) == [3, 4], "3 was used after 4"
    touch(file, [], 0)
    assert hot(file, 8) == [] and file.resident_bytes == 0


def test_pages_ahead_stay_too():
    file, memory = page_file(SYSTEM_PAGE, 8)
    touch(file, range(8), 8 * SYSTEM_PAGE, writes=True)
    memory[:] = np.arange(8)[:, None]
    touch(file, [], 0)
    touch(file, [0, 1], 2 * SYSTEM_PAGE, ahead=[2, 3])
    assert hot(file, 8) == [0, 1, 2, 3] and (memory[:2] == np.arange(2)[:, None]).all()
    touch(file, [2, 3], 2 * SYSTEM_PAGE, ahead=[4])
    assert hot(file, 8) == [*in_memory(memory[:4]), 4] == [2, 3, 4]
    assert (memory[2:5] == np.arange(2, 5)[:, None]).all()


def test_counts_what_came_back_to_readers():
    file, memory = page_file(SYSTEM_PAGE, 8)
    drops = touch(file, [0, 1], 8 * SYSTEM_PAGE)
    assert file.drops == drops < touch(file, [2], SYSTEM_PAGE) == file.drops
    assert not memory[0].any() and in_memory(memory) == [0, 2] and hot(file, 8) == [2]
    file.recount(ids(0), 8 * SYSTEM_PAGE)
    assert hot(file, 8) == [0, 2]
    file.recount(ids(1), SYSTEM_PAGE)
    assert resident_bytes(memory) <= file.resident_bytes <= SYSTEM_PAGE


def test_pages_without_disk_space_are_an_error():
    """As a disk that fails is."""
    file, _ = page_file(SYSTEM_PAGE, 8)
    file.map(16)
    for writes in (False, True):
        with pytest.raises(OSError, match="Input/output error"):
            touch(file, [12], 8 * SYSTEM_PAGE, writes=writes)


def test_small_pages_share_what_the_system_moves():
    pages, size = 100, SYSTEM_PAGE // 4 + 8
    file, memory = page_file(size, pages)
    values = np.random.default_rng(0).integers(0, 256, (pages, size), dtype=np.uint8)
    for i in np.random.default_rng(1).permutation(pages):
        touch(file, [i], 2 * SYSTEM_PAGE, writes=True)
        memory[i] = values[i]
        assert i in file and file.resident_bytes <= 2 * SYSTEM_PAGE and resident_bytes(memory) <= 2 * SYSTEM_PAGE
    for i in range(pages):
        touch(file, [i], 2 * SYSTEM_PAGE)
        assert (memory[i] == values[i]).all()
    file.discard(ids(*range(10, 90)))
    for i in (9, 90, *range(10)):
        assert (memory[i] == values[i]).all(), "the neighbours of what was given back"
    assert not memory[10:90].any()
    assert file.file_bytes < 30 * size + 2 * SYSTEM_PAGE + 8192


def test_growing_keeps_bytes_and_old_mappings():
    file, memory = page_file(1000, 10)
    touch(file, [9], 1 << 20, writes=True)
    memory[9] = 7
    longer = file.map(50)
    file.back(np.arange(50, dtype=np.int32))
    assert longer.shape == (50, 1000) and (longer[9] == 7).all() and not longer[10:].any()
    longer[9, 0] = 8
    assert memory[9, 0] == 8
    del file
    assert longer[9, 0] == 8
    with pytest.raises(ValueError, match="num_pages must be >= 50"):
        page_file(1000, 50)[0].map(49)
    for wrong in (-1, 50):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            touch(page_file(1000, 50)[0], [wrong], 0)


def filled(**options):
    cache = lcore.PagedCache(1, 2, 64, max_bytes=1 << 20, overflow=True, **options)
    for _ in range(8):
        cache.append(0, *random_kv(1, 512, 2, 64, dtype=torch.bfloat16))
    return cache


def test_nothing_is_left():
    before, names = open_files(), set(os.listdir(FOLDER))
    cache = filled()
    assert cache.stats()["file_bytes"] >= 2 << 20 and open_files() == (before[0] + 1, before[1] + 1)
    assert not [name for name in set(os.listdir(FOLDER)) - names if name.startswith("lcore-")]
    fork = cache.fork()
    cache.close()
    fork.append(0, *random_kv(1, 100, 2, 64, dtype=torch.bfloat16))
    fork.attend(0, torch.randn(1, 1, 2, 64).bfloat16())
    fork.close()
    assert open_files() == before
    del cache, fork
    with pytest.raises(TypeError):
        filled(page_size="16")
    assert open_files() == before


FULL = """
import resource, torch, lcore
resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20))
def kv(n):
    return (torch.full((1, n, 2, 64), 0.5 + n % 2).bfloat16() for _ in range(2))
cache = lcore.PagedCache(1, 2, 64, max_bytes=1 << 20, overflow=True)
held = 0
try:
    while True:
        cache.append(0, *kv(512))
        held += 512
except OSError as error:
    print(type(error).__name__, error)
assert held and cache.seen().tolist() == [held], held
q = torch.ones(1, 1, 2, 64).bfloat16()
assert (cache.attend(0, q) == 0.5).all()
try:
    cache.reserve(100_000)
except OSError:
    cache.append(0, *kv(1))
assert cache.attend(0, q).isfinite().all()
cache.crop(512)
cache.append(0, *kv(512))
assert (cache.attend(0, q) == 0.5).all()
print("held", held)
"""


def test_a_full_disk_is_an_error_and_the_cache_goes_on():
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error, held = done.stdout.splitlines()
    assert error.startswith("OSError [Errno 27]") and FOLDER in error
    assert "lcore.PagedCache.append needs up to" in error and "use another folder" in error
    assert int(held.split()[1]) >= 2560


def test_no_space_leaves_none_taken(monkeypatch):
    cache = filled()
    before = cache.stats()
    pool = cache._slots.pool
    back = pool.overflow.back

    def full(function, ids):
        back(function, ids[: len(ids) // 2])
        pool.overflow.discard(ids)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool.overflow, "back", full)
    with pytest.raises(OSError, match="No space left"):
        cache.append(0, *random_kv(1, 512, 2, 64, dtype=torch.bfloat16))
    after = cache.stats()
    assert (after["tokens"], after["pages"]) == (before["tokens"], before["pages"])
    assert after["file_bytes"] == pytest.approx(before["file_bytes"], rel=0.01)


@pytest.mark.parametrize(("folder", "error"), [("/nowhere/at/all", FileNotFoundError), (__file__, NotADirectoryError)])
def test_a_wrong_folder(folder, error):
    before = open_files()
    with pytest.raises(error, match="overflow must be a folder to write to") as raised:
        lcore.PagedCache(1, 1, 64, max_bytes=1 << 20, overflow=folder)
    assert folder in str(raised.value) and open_files() == before


def test_what_overflow_may_be(monkeypatch, tmp_path):
    with pytest.raises(TypeError, match="overflow must be a folder, a bool or None, got 3"):
        lcore.PagedCache(1, 1, 64, max_bytes=1 << 20, overflow=3)
    with pytest.raises(ValueError, match="max_bytes must be given with overflow"):
        lcore.PagedCache(1, 1, 64, overflow=True)
    if Path("/dev/shm").is_dir():
        with pytest.raises(ValueError, match=r"overflow must be a folder on a disk.*got /dev/shm, which"):
            lcore.PagedCache(1, 1, 64, max_bytes=1 << 20, overflow="/dev/shm")
    assert lcore.PagedCache(1, 1, 64, max_bytes=1 << 20, overflow=False).overflow is None
    with pytest.raises(MemoryError, match="for tables and tails"):
        lcore.PagedCache(64, 8, 128, max_bytes=1 << 20, overflow=True)
    monkeypatch.setattr("lcore.cache.overflow.sys.platform", "darwin")
    with pytest.raises(NotImplementedError, match="overflow needs Linux"):
        lcore.PagedCache(1, 1, 64, max_bytes=1 << 20, overflow=True)


def test_a_forked_process_may_not_write_into_its_parents_file():
    cache = filled()
    q = torch.ones(1, 1, 2, 64).bfloat16()
    child = os.fork()
    if child == 0:
        try:
            cache.attend(0, q)
        except RuntimeError as error:
            os._exit(7 if "from which this one was forked" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    cache.attend(0, q)


def test_a_killed_process_leaves_nothing():
    code = "import sys, lcore, os; c = lcore.PagedCache(1, 1, 64, max_bytes=1 << 20, overflow=sys.argv[1])"
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        command = [sys.executable, "-c", f"{code}; c.reserve(9999); os.kill(os.getpid(), 9)", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert os.listdir(folder) == []
