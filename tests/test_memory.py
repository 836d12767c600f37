"""The check that a context fits, before any work, and the memory it measures against."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import lcore
from lcore.generation import memory

CONFIG = SimpleNamespace(
    num_heads=8, num_kv_heads=2, head_dim=64, hidden_size=512, intermediate_size=2048, vocab_size=32000
)
CPU = torch.device("cpu")
GIB = 1 << 30


# 16 tokens in 2 layers with 3 heads of 8 are 6 pages: what they take in the pool, and what the cache counts for them.
IN_POOL = 6 * 16 * 8 * 2 * 4
COUNTED = 16 * lcore.PagedCache.bytes_per_token(2, 3, 8, "fp32", page_size=16)


def new_cache(rows: int = 1) -> lcore.PagedCache:
    return lcore.PagedCache(2, 3, 8, batch_size=rows, dtype=torch.float32, kv_format="fp32", page_size=16)


def fill(cache: lcore.PagedCache, tokens: int) -> None:
    for layer in range(2):
        cache.append(layer, *torch.zeros(2, cache.batch_size, tokens, 3, 8))


def test_the_limit_is_exact():
    cache = new_cache()
    with pytest.raises(MemoryError):
        memory.reserve(cache, [160], workspace=77, free=10 * COUNTED + 76)
    assert cache.stats()["pool_bytes"] == 0
    memory.reserve(cache, [160], workspace=77, free=10 * COUNTED + 77)
    assert cache.stats()["pool_bytes"] == 10 * IN_POOL


def test_what_was_reserved_is_enough():
    cache = new_cache()
    memory.reserve(cache, [163], workspace=0, free=GIB)
    fill(cache, 163)
    assert cache.stats()["pool_bytes"] == 10 * IN_POOL


def test_the_error_says_needed_free_and_what_would_fit():
    cache = new_cache()
    with pytest.raises(MemoryError) as caught:
        memory.reserve(cache, [5000], workspace=77, free=20_077)
    assert str(caught.value) == (
        f"lcore.Generator: prompt + max_new_tokens must fit into memory: 5,000 tokens need {312 * COUNTED + 77:,} "
        f"bytes (cache {312 * COUNTED:,}, workspace 77), 20,077 bytes are free; 48 tokens would fit"
    )
    memory.reserve(cache, [48], workspace=77, free=20_077)  # and it does


def test_a_batch_is_the_sum_of_its_rows():
    memory.reserve(new_cache(2), [16, 160], workspace=0, free=11 * COUNTED)
    with pytest.raises(MemoryError, match=r"2 rows of up to 160 tokens need .* 80 tokens a row would fit"):
        memory.reserve(new_cache(2), [16, 160], workspace=0, free=11 * COUNTED - 1)
    cache = new_cache(2)
    memory.reserve(cache, [16, 160], workspace=0, free=GIB)
    assert cache.stats()["pool_bytes"] == 11 * IN_POOL


def test_every_row_gets_its_own_room():
    cache = new_cache(3)
    for layer in range(2):
        cache.append(layer, *torch.zeros(2, 3, 70, 3, 8), lengths=torch.tensor([70, 3, 0]))
    memory.reserve(cache, [10, 28, 15], workspace=0, free=GIB)
    assert cache.stats()["pool_bytes"] == (5 + 1 + 0) * IN_POOL
    for layer in range(2):
        cache.append(layer, *torch.zeros(2, 3, 28, 3, 8), lengths=torch.tensor([10, 28, 15]))
    assert cache.stats()["pool_bytes"] == 6 * IN_POOL


def test_a_pool_that_grows_is_there_twice_for_a_moment():
    cache = new_cache()
    fill(cache, 160)
    cache.crop(16)
    memory.reserve(cache, [144], workspace=0, free=0)  # free pages of the pool cost nothing
    with pytest.raises(MemoryError):
        memory.reserve(cache, [160], workspace=0, free=10 * IN_POOL + COUNTED - 1)
    memory.reserve(cache, [160], workspace=0, free=10 * IN_POOL + COUNTED)
    assert cache.stats()["pool_bytes"] == 11 * IN_POOL


def test_no_memory_at_all():
    with pytest.raises(MemoryError, match=r"10 bytes are free; 0 tokens would fit"):
        memory.reserve(new_cache(), [1], workspace=77, free=10)


def test_workspace_grows_with_the_chunk_not_with_the_context():
    one, two = (memory.workspace_bytes(CONFIG, tokens, 1, 2) for tokens in (1024, 2048))
    fixed = 2 * 32000 * 4 + memory.SPARE_BYTES
    assert two - fixed == 2 * (one - fixed) > 0


def write_group(folder: Path, maximum: str, used: int, cached: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    prefix = "total_" if version == 1 else ""
    (folder / names[0]).write_text(maximum + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {cached}\n{prefix}active_file 0\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts(tmp_path, version):
    base = tmp_path / "memory" if version == 1 else tmp_path
    write_group(base / "outer", str(4 * GIB), 3 * GIB, GIB // 2, version)  # 1.5 GiB left
    write_group(base / "outer/inner", str(3 * GIB), 1 * GIB, 0, version)  # 2 GiB left
    membership = tmp_path / "self"
    membership.write_text("7:cpu,cpuacct:/x\n5:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    assert memory.cgroup_free_bytes(tmp_path, membership) == 3 * GIB // 2


def test_a_container_sees_its_group_as_the_root(tmp_path):
    write_group(tmp_path, str(2 * GIB), GIB, 0, 2)
    membership = tmp_path / "self"
    membership.write_text("0::/host/path/that/is/not/here\n")
    assert memory.cgroup_free_bytes(tmp_path, membership) == GIB


def test_no_limit_and_no_control_groups(tmp_path):
    write_group(tmp_path, "max", GIB, 0, 2)
    membership = tmp_path / "self"
    membership.write_text("0::/\n")
    assert memory.cgroup_free_bytes(tmp_path, membership) is None
    assert memory.cgroup_free_bytes(tmp_path, tmp_path / "absent") is None


def test_more_used_than_allowed_leaves_nothing(tmp_path):
    write_group(tmp_path, str(GIB), 2 * GIB, 0, 2)
    membership = tmp_path / "self"
    membership.write_text("0::/\n")
    assert memory.cgroup_free_bytes(tmp_path, membership) == 0


def test_free_bytes_is_the_smaller_of_machine_and_group(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500))
    monkeypatch.setattr(memory, "cgroup_free_bytes", lambda: 300)
    assert memory.free_bytes(CPU) == 300
    monkeypatch.setattr(memory, "cgroup_free_bytes", lambda: None)
    assert memory.free_bytes(CPU) == 500


def test_peak_bytes_counts_this_process():
    assert memory.peak_bytes() >= psutil.Process().memory_info().rss // 2 > 1 << 20
