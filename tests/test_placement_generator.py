"""Generator(overflow=...) and lcore plan --overflow: texts are the same, and what is planned with is the disk."""

import json
import shutil
import sys
from collections import namedtuple

import pytest
import torch
from tiny_model import tiny_decoder, tiny_folder
from typer.testing import CliRunner

import lcore
from lcore.cli import app
from lcore.generation import memory, planner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="overflow needs Linux")
MB = 1 << 20
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model():
    return tiny_decoder(max_position_embeddings=100_000)


def most_bytes(model, kv_format=None):
    """Room for the tails and tables of two caches, the last and the next, and a few pages."""
    return 2 * int(model.new_cache(kv_format=kv_format).stats()["bytes"]) + 96 * 1024


@pytest.mark.parametrize("options", [{}, {"prefix_reuse": False}, {"kv_format": "int4"}])
def test_the_same_text_from_a_file(model, options, one_thread):
    ids = torch.randint(0, model.config.vocab_size, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = lcore.Generator(model, prefill_chunk=512, **options)
    most = most_bytes(model, options.get("kv_format"))
    placed = lcore.Generator(model, prefill_chunk=512, max_bytes=most, overflow=True, **options)
    for prompt in (ids, ids[:2000] + ids[:100]):
        want, got = (generator.generate(prompt, max_new_tokens=8).tokens for generator in (plain, placed))
        assert want == got
        stats = placed.cache.stats()
        assert stats["bytes"] <= most and stats["file_bytes"] > 1.5 * stats["pool_bytes"]


def test_a_session_and_a_policy_in_a_file(model, tmp_path, one_thread):
    ids = torch.randint(0, model.config.vocab_size, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    limits = {"max_bytes": most_bytes(model), "overflow": True, "prefill_chunk": 256}
    for options in ({}, {"policy": lcore.policies.SnapKV(budget=400)}):
        plain = lcore.Generator(model, prefill_chunk=256, **options)
        placed = lcore.Generator(model, **limits, **options)
        assert plain.generate(ids, 8).tokens == placed.generate(ids, 8).tokens
    want = lcore.Generator(model, prefill_chunk=256).generate(ids + ids[:50], 8).tokens
    lcore.Generator(model, **limits).generate(ids, 0, session=tmp_path / "session")
    generator = lcore.Generator(model, **limits)
    assert generator.generate(ids + ids[:50], 8, session=tmp_path / "session").tokens == want
    assert generator.cache.stats()["bytes"] <= most_bytes(model)


def test_a_context_that_memory_has_no_room_for(model, monkeypatch, one_thread):
    monkeypatch.setattr("lcore.generation.planner.free_bytes", lambda device: memory.SPARE_BYTES + 8 * MB)
    monkeypatch.setattr("lcore.generation.caches.free_bytes", lambda device: memory.SPARE_BYTES + 8 * MB)
    with pytest.raises(MemoryError, match="must fit into memory"):
        lcore.Generator(model, prefill_chunk=64, context=50_000)
    generator = lcore.Generator(model, prefill_chunk=64, context=50_000, overflow=True)
    generator.generate([1, 2, 3], 2)
    stats = generator.cache.stats()
    assert stats["bytes"] < 8 * MB < stats["file_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 10 * MB))
    with pytest.raises(MemoryError, match=r"and [\d,]+ of the disk, which has 10,485,760 free"):
        lcore.Generator(model, prefill_chunk=64, context=50_000, overflow=True)
    with pytest.raises(ValueError, match="be None when a PrefixCache is given"):
        lcore.Generator(model, prefix_reuse=lcore.PrefixCache(), overflow=True)


def test_the_plan_counts_the_disk(model, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 40 * MB))
    plans = planner.model_planner(model, 1, 128, free=memory.SPARE_BYTES + 4 * MB, overflow="/var/tmp")
    found = plans.plan(5000)
    assert found.disk == 40 * MB
    for row in found.formats:
        assert row.needed == found.weights + found.workspace + row.tails_and_tables
        assert row.left == min(found.free - row.needed, found.disk - row.pages) and row.fits
        [last], [next_one] = (plans.plan(row.longest + more, [row.kv_format]).formats for more in (0, 1))
        assert last.fits and not next_one.fits
    folder = tiny_folder(tmp_path / "tiny")
    arguments = ["plan", str(folder), "-c", "1000", "--overflow", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["disk"] == 40 * MB
    assert "pages on disk, 41.9 MB free" in CliRunner().invoke(app, arguments).output.replace("\n", " ")
