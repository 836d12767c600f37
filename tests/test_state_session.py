"""Recurrent states in files: saved and loaded to the bit, refused by name, and sessions of a generator over them."""

import re

import pytest
import torch
from model_cases import random_tokens
from state_cases import HYBRIDS, KINDS, PROMPT, same_states, tiny_states_model
from typer.testing import CliRunner

import lcore
from lcore.cli import app
from lcore.generation import Generator, caches

KIND_OF = {"mamba": lcore.StateCache, "mamba2": lcore.StateCache, "jamba": lcore.HybridCache,
           "qwen3_next": lcore.HybridCache}  # fmt: skip


def filled(model, rows=2, **options):
    cache = model.new_cache(rows, checkpoint_every=64, **options)
    tokens = random_tokens(rows, 150, vocab=250)
    for part in tokens.split([64, 64, 22], dim=1):
        model(part, cache)
    return cache, tokens


@pytest.fixture(autouse=True)
def short_checkpoints(monkeypatch):
    for module in (caches, __import__("lcore.generation.states", fromlist=["x"])):
        monkeypatch.setattr(module, "CHECKPOINT_TOKENS", 64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_cache_is_the_saved_one(kind, tmp_path):
    model = tiny_states_model(kind)
    cache, tokens = filled(model)
    cache.save(tmp_path / "c", tokens=list(tokens), metadata={"who": "me"})
    back = KIND_OF[kind].load(tmp_path / "c", metadata={"who": "me"})
    assert same_states(back, cache) and back.seen().tolist() == [150, 150]
    states = getattr(back, "states", back)
    assert list(states.checkpoints(1)) == [64, 128]
    next_tokens = random_tokens(2, 5, vocab=250, seed=3)
    assert torch.equal(model(next_tokens, back), model(next_tokens, cache))
    for one in (back, cache):
        one.crop(64)
    assert same_states(back, cache)
    assert torch.equal(model(next_tokens, back), model(next_tokens, cache))
    cache.save(tmp_path / "d")
    cache.save(tmp_path / "e")
    assert (tmp_path / "d").read_bytes() == (tmp_path / "e").read_bytes()


@pytest.mark.parametrize("kind", ["mamba2", "jamba"])
def test_every_damaged_byte_is_found(kind, tmp_path):
    model = tiny_states_model(kind)
    filled(model, rows=1)[0].save(tmp_path / "c")
    data = (tmp_path / "c").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(data), (40,), generator=generator).tolist():
        broken = bytearray(data)
        broken[place] ^= 16
        (tmp_path / "b").write_bytes(broken)
        with pytest.raises(ValueError, match="path must be a session file"):
            KIND_OF[kind].load(tmp_path / "b")
    (tmp_path / "b").write_bytes(data[:-9])
    with pytest.raises(ValueError, match="cut short"):
        KIND_OF[kind].load(tmp_path / "b")


def test_files_of_another_kind_are_refused(tmp_path):
    jamba, mamba = tiny_states_model("jamba"), tiny_states_model("mamba")
    filled(jamba, rows=1)[0].save(tmp_path / "jamba")
    filled(mamba, rows=1)[0].save(tmp_path / "mamba")
    lcore.PagedCache(2, 2, 16, dtype=torch.float32, kv_format="fp32").save(tmp_path / "paged")
    for name in ("mamba", "paged"):
        with pytest.raises(ValueError, match=r"and have the settings of a cache of this version, got"):
            lcore.HybridCache.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"have the settings of a StateCache of this version"):
        lcore.StateCache.load(tmp_path / "paged")
    with pytest.raises(ValueError, match=r"hold the states of a PagedCache and no others"):
        lcore.PagedCache.load(tmp_path / "jamba")
    with pytest.raises(ValueError, match=r"^lcore.StateCache.load: metadata.who must be None as in the session file"):
        lcore.StateCache.load(tmp_path / "mamba", metadata={"who": "me"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_goes_on_where_its_file_ends(kind, tmp_path):
    generator = Generator(tiny_states_model(kind), prefill_chunk=32, prefix_reuse=False)
    path = tmp_path / "s"
    first = generator.generate(PROMPT[:70], max_new_tokens=8, session=path)
    held = PROMPT[:70] + first.tokens
    want = generator.generate(PROMPT[90:], max_new_tokens=8, cache=generator.cache.fork()).tokens
    again = generator.generate(held + PROMPT[90:], max_new_tokens=8, session=path)
    assert again.tokens == want and again.stats.reused_tokens == len(held)
    assert generator.cache.seen().tolist() == [len(held) + 60 + 8]


@pytest.mark.parametrize("kind", KINDS)
def test_another_question_on_the_same_document_begins_at_a_checkpoint(kind, tmp_path):
    generator = Generator(tiny_states_model(kind), prefill_chunk=32, prefix_reuse=False)
    path = tmp_path / "s"
    generator.generate(PROMPT, max_new_tokens=20, session=path)
    for prompt, kept in (([*PROMPT[:140], 9, 8], 128), ([*PROMPT[:140], 9], 128), ([*PROMPT[:100], 1, 2], 64)):
        want = generator.generate(prompt, max_new_tokens=8).tokens
        got = generator.generate(prompt, max_new_tokens=8, session=path)
        assert got.tokens == want and got.stats.reused_tokens == kept
    got = generator.generate([*PROMPT[:30], 5], max_new_tokens=8, session=path)  # no state so early: from the begin
    assert got.stats.reused_tokens == 0
    assert got.tokens == generator.generate([*PROMPT[:30], 5], max_new_tokens=8).tokens


@pytest.mark.parametrize("kind", HYBRIDS)
def test_sessions_of_hybrid_models_in_a_coded_format(kind, tmp_path):
    generator = Generator(tiny_states_model(kind), "int8", prefill_chunk=64, prefix_reuse=False)
    generator.generate(PROMPT, max_new_tokens=5, session=tmp_path / "s")
    prompt = [*PROMPT[:145], 3]
    got = generator.generate(prompt, max_new_tokens=8, session=tmp_path / "s")
    assert got.stats.reused_tokens == 128
    assert got.tokens == generator.generate(prompt, max_new_tokens=8).tokens


def test_a_file_of_another_model_is_refused_by_the_field_that_differs(tmp_path):
    path = tmp_path / "s"
    Generator(tiny_states_model("jamba")).generate(PROMPT, max_new_tokens=2, session=path)
    before = path.read_bytes()
    rule = f"lcore.Generator: model.num_experts_per_tok must be '2' as in the session file {path}, got '1'"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        Generator(tiny_states_model("jamba", num_experts_per_tok=1)).generate(PROMPT, session=path)
    with pytest.raises(ValueError, match=r"^lcore.Generator: model.weights must be"):
        model = tiny_states_model("jamba")
        model.model.layers[0].mamba.D.data += 1
        Generator(model).generate(PROMPT, session=path)
    assert path.read_bytes() == before


def test_an_interrupted_stream_leaves_what_it_read_in_the_file(tmp_path):
    generator = Generator(tiny_states_model("qwen3_next"), prefill_chunk=32, prefix_reuse=False)
    stream = generator.stream(PROMPT, session=tmp_path / "s", max_new_tokens=4)
    for _ in range(4):
        next(stream)
    stream.close()
    got = generator.generate(PROMPT, session=tmp_path / "s", max_new_tokens=4)
    assert got.stats.reused_tokens == 96
    assert got.tokens == generator.generate(PROMPT, max_new_tokens=4).tokens


@pytest.mark.parametrize("kind", ["mamba2", "jamba"])
def test_command_line(kind, tmp_path):
    tiny_states_model(kind).save(tmp_path / "m")
    options = ["generate", "-m", str(tmp_path / "m"), "--session", str(tmp_path / "s")]
    first = CliRunner().invoke(app, [*options, "-p", "Once upon a time", "-n", "0"])
    assert first.exit_code == 0, first.stderr
    again = CliRunner().invoke(app, [*options, "-p", "Once upon a time, there", "-n", "6"])
    assert again.exit_code == 0, again.stderr
    assert "read 7 tokens" in again.stderr and "kept 16 tokens" in again.stderr
    fresh = CliRunner().invoke(app, ["generate", *options[1:3], "-p", "Once upon a time, there", "-n", "6"])
    assert fresh.stdout == again.stdout
