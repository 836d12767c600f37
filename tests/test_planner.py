"""The planner: its bytes are those that a cache then takes, its limits are exact, and its refusals name a way out."""

import json
import re

import pytest
import torch
from state_cases import tiny_states_model
from tiny_model import tiny_decoder, tiny_folder
from typer.testing import CliRunner

import lcore
from lcore.cache.formats import FORMATS
from lcore.cli import app
from lcore.generation import memory, planner

MB = 1 << 20


@pytest.fixture(scope="module")
def model():
    return tiny_decoder(max_position_embeddings=3000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("kv_format", [*FORMATS, ("fp32", "bf16")])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_planned_bytes_are_what_a_cache_takes(model, kv_format, batch, tokens):
    [found] = planner.model_planner(model, batch, 128, free=100 * MB).plan(tokens, [kv_format]).formats
    cache = model.new_cache(batch, kv_format=kv_format)
    cache.reserve(tokens)
    for _ in range(2):  # before the tokens have come, and after
        stats = cache.stats()
        assert found.pages == stats["pool_bytes"]
        assert found.tails_and_tables == stats["tail_bytes"] + stats["table_bytes"]
        assert found.pages + found.tails_and_tables == stats["bytes"]
        for layer in range(2):
            if cache.seen(layer)[0] == 0:
                cache.append(layer, *torch.zeros(2, batch, tokens, 2, 16))


def test_the_items_add_up_and_the_longest_context_is_the_last_that_fits(model):
    plans = planner.model_planner(model, 2, 128, free=80 * MB)
    found = plans.plan(500)
    assert [row.kv_format for row in found.formats] == list(FORMATS)
    assert found.workspace == memory.workspace_bytes(model.config, 128, 2, 4) and found.chunk == 128
    for row in found.formats:
        assert row.needed == found.weights + found.workspace + row.pages + row.tails_and_tables
        assert row.left == found.free - row.needed and row.fits
        assert plans.longest(row.kv_format) == row.longest > 500
        [last], [next_one] = (plans.plan(row.longest + more, [row.kv_format]).formats for more in (0, 1))
        assert last.fits and not next_one.fits
    bytes_of = {row.kv_format: row.longest for row in found.formats}
    assert bytes_of["bf16"] == bytes_of["fp16"] > bytes_of["fp32"]


def test_a_context_shorter_than_a_chunk_needs_less_room_for_the_chunk(model):
    plans = planner.model_planner(model, 1, 2048, free=memory.SPARE_BYTES + 300_000)
    longest = plans.longest("fp32")
    assert 0 < longest < 2048
    assert planner.model_planner(model, 1, 2048, free=memory.SPARE_BYTES).longest("fp32") == 0


def test_weights_count_while_they_are_in_a_file_only(model, folder):
    """The system counts mapped pages as free memory; tensors that torch has allocated are gone from it already."""
    loaded = lcore.load_model(folder)
    weights = sum(parameter.nbytes for parameter in loaded.parameters())
    assert planner.mapped_bytes(list(loaded.parameters())) == weights
    assert planner.mapped_bytes(list(model.parameters())) == 0
    assert planner.mapped_bytes([torch.zeros(4 * MB)]) == 0
    assert planner.model_planner(loaded, 1, 2048).plan(10).weights == weights
    assert planner.folder_planner(folder, None, 1, 2048).plan(10).weights == weights
    assert planner.folder_planner(folder, torch.bfloat16, 1, 2048).plan(10).weights == weights // 2


def test_a_part_of_free_memory_is_left_to_others(model, monkeypatch):
    monkeypatch.setattr(planner, "free_bytes", lambda device: 3200 * MB)
    assert planner.model_planner(model, 1, 2048).plan(10).free == 3100 * MB


@pytest.mark.parametrize(
    ("context", "batch", "chunk", "text"),
    [
        (0, 1, 2048, r"context must be in 1 \.\. 2147483647, got 0"),
        (2**31, 1, 2048, r"context must be in 1 \.\. 2147483647, got 2147483648"),
        (1, 0, 2048, r"batch must be 1 or more, got 0"),
        (1, 1, 0, r"prefill_chunk must be 1 or more, got 0"),
    ],
)
def test_wrong_numbers(model, context, batch, chunk, text):
    with pytest.raises(ValueError, match=rf"^lcore\.plan: {text}"):
        planner.model_planner(model, batch, chunk).plan(context)


@pytest.fixture
def free(monkeypatch):
    """Sets what is free, all of it for the planner."""
    monkeypatch.setattr(planner, "_LEFT_ALONE", 0)

    def set_free(count):
        for module in ("caches", "planner"):
            monkeypatch.setattr(f"lcore.generation.{module}.free_bytes", lambda device: count)

    return set_free


def test_a_generator_makes_room_for_its_context_once(model, free):
    gen = lcore.Generator(model, prefill_chunk=64, context=2000, prefix_reuse=False)
    gen.generate("abc", max_new_tokens=5)
    room = gen.cache.stats()["bytes"]
    assert room == sum(planner.cache_bytes(model.new_cache(), 2000))
    gen.generate("d" * 1000, max_new_tokens=5, cache=gen.cache)
    assert gen.cache.stats()["bytes"] == room and int(gen.cache.seen()[0]) == 1013
    gen.generate(["abc", "de"], max_new_tokens=5)
    assert gen.cache.stats()["bytes"] == sum(planner.cache_bytes(model.new_cache(2), 2000))


def test_a_generator_keeps_its_context_with_a_session(model, tmp_path):
    gen = lcore.Generator(model, context=2000)
    for prompt in ("abc", "abcdef"):
        gen.generate(prompt, max_new_tokens=0, session=tmp_path / "a.session")
        assert gen.cache.stats()["bytes"] == sum(planner.cache_bytes(model.new_cache(), 2000))


def test_a_call_beyond_the_context_is_refused(model):
    gen = lcore.Generator(model, context=10)
    gen.generate("abcde", max_new_tokens=5)
    rule = r"lcore.Generator: prompt \+ max_new_tokens must fit into context=10, got 11"
    with pytest.raises(ValueError, match=rule):
        gen.stream("abcde", max_new_tokens=6)


@pytest.mark.parametrize("value", [0, -3])
def test_context_is_positive_or_auto(model, value):
    with pytest.raises(ValueError, match="context must be 1 or more"):
        lcore.Generator(model, context=value)
    with pytest.raises(TypeError, match="context"):
        lcore.Generator(model, context="all")


def test_a_context_that_does_not_fit_is_refused_before_the_prompt(model, free):
    one = planner.model_planner(model, 1, 64, free=1 << 40).plan(100_000).formats
    sizes = {row.kv_format: row.needed for row in one}
    free(sizes["bf16"])
    with pytest.raises(MemoryError) as caught:
        lcore.Generator(model, prefill_chunk=64, context=100_000)
    assert re.fullmatch(
        rf"lcore\.Generator: context=100,000 must fit into memory: {sizes['fp32']:,} bytes are needed with kv_format "
        rf"'fp32', {sizes['bf16']:,} are free; with kv_format 'fp16', 'bf16', 'fp8', 'int8', 'int4', 'int2' it would "
        r"fit, and [\d,]+ tokens with this one",
        str(caught.value),
    )
    tokens = int(re.search(r"and ([\d,]+) tokens", str(caught.value))[1].replace(",", ""))
    lcore.Generator(model, prefill_chunk=64, context=tokens)
    lcore.Generator(model, "bf16", prefill_chunk=64, context=100_000)
    with pytest.raises(MemoryError):
        lcore.Generator(model, prefill_chunk=64, context=tokens + 1)
    free(1000)
    with pytest.raises(MemoryError, match="no kv_format would fit, and 0 tokens with this one"):
        lcore.Generator(model, prefill_chunk=64, context=100_000)


def test_auto_is_the_longest_that_fits_but_not_beyond_the_model(model, free):
    gen = lcore.Generator(model, prefill_chunk=64, context="auto", prefix_reuse=False)
    free(1 << 34)
    gen.generate("abc", max_new_tokens=2)
    assert gen.cache.stats()["bytes"] == sum(planner.cache_bytes(model.new_cache(), 3000))
    count = memory.SPARE_BYTES + MB
    free(count)
    gen.generate("abc", max_new_tokens=2)
    longest = planner.model_planner(model, 1, 64, free=count).longest(None)
    assert 64 < longest < 3000
    assert gen.cache.stats()["bytes"] == sum(planner.cache_bytes(model.new_cache(), longest))
    free(memory.SPARE_BYTES + 1000)
    with pytest.raises(MemoryError, match="0 tokens would fit"):
        gen.generate("x" * 100, max_new_tokens=2)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_bytes_as_json(folder):
    result = run("plan", folder, "--context", 5000, "--batch", 2, "--prefill-chunk", 100, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["context"], found["batch"], found["chunk"], found["dtype"]) == (5000, 2, 100, "float32")
    assert [row["kv_format"] for row in found["formats"]] == list(FORMATS)
    for row in found["formats"]:
        cache = lcore.PagedCache(2, 2, 16, batch_size=2, dtype=torch.float32, kv_format=row["kv_format"])
        cache.reserve(5000)
        assert row["pages"] + row["tails_and_tables"] == cache.stats()["bytes"]
        assert row["left"] == found["free"] - row["needed"]


def test_the_command_prints_a_table(folder):
    result = run("plan", folder, "-c", 100_000_000, "--kv-format", "bf16,fp32", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0][:2] == ["100,000,000", "tokens,"] and lines[0][-1] == "free"
    assert lines[1][:3] == ["weights", "82.4", "kB"]
    row = lines[-1]  # 100 M tokens x 2 layers x 2 heads x 16 x (2 + 4) bytes, and the page tables
    assert row[:3] == ["bf16,fp32", "38.4", "GB"] and row[5:7] == ["38.5", "GB"]
    assert sum("fp" in line[0] for line in lines) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["-c", "10", "--kv-format", "int3"], 1, "kv_format must be one of"),
        (["-c", "0"], 2, "Invalid value"),
        (["-c", "3000000000"], 1, "context must be in 1 .. 2147483647"),
        ([], 2, "Missing option"),
    ],
)
def test_the_command_refuses(folder, arguments, code, text):
    result = run("plan", folder, *arguments)
    assert result.exit_code == code and text in result.stderr, result.output


def test_generate_takes_a_context(folder):
    want = run("generate", "-m", folder, "-p", "abc", "-n", 5).stdout
    for context in ("1000", "auto"):
        assert run("generate", "-m", folder, "-p", "abc", "-n", 5, "-c", context).stdout == want
    result = run("generate", "-m", folder, "-p", "abc", "-n", 5, "-c", 7)
    assert result.exit_code == 1 and "fit into context=7, got 8" in result.stderr


@pytest.mark.parametrize("kind", ["jamba", "qwen3_next"])
def test_states_of_a_hybrid_model_are_planned_beside_its_pages(kind, tmp_path):
    model = tiny_states_model(kind)
    model.save(tmp_path / "m")
    found = planner.folder_planner(tmp_path / "m", torch.bfloat16, 3, 128).plan(500, ["fp32", "int8"])
    for row in found.formats:
        cache = model.to(torch.bfloat16).new_cache(3, kv_format=row.kv_format)
        cache.reserve(500)
        stats = cache.stats()
        assert (row.pages, found.states) == (stats["pool_bytes"], stats["state_bytes"])
        assert row.pages + row.tails_and_tables + found.states == stats["bytes"]
        assert row.needed == found.weights + found.workspace + found.states + row.pages + row.tails_and_tables


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_checkpoints_are_planned_as_a_generator_keeps_them(kind, tmp_path):
    model = tiny_states_model(kind)
    model.save(tmp_path / "m")
    plans = planner.folder_planner(tmp_path / "m", None, 1, 512)
    generator = lcore.Generator(model, prefill_chunk=512, prefix_reuse=False)
    generator.generate([n % 256 for n in range(1100)], max_new_tokens=1)
    states = getattr(generator.cache, "states", generator.cache)
    assert plans.plan(1101).states == states.stats()["bytes"] == 3 * plans.plan(500).states
    assert plans.plan(10**6).states == 17 * plans.plan(500).states


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_model_of_states_alone_needs_as_much_at_any_length(kind, tmp_path):
    model = tiny_states_model(kind)
    model.save(tmp_path / "m")
    plans = planner.folder_planner(tmp_path / "m", None, 2, 128)
    short, long, longer = (plans.plan(tokens) for tokens in (500, 10**5, 10**6))
    assert short.states == model.new_cache(2).stats()["bytes"] and long.states == longer.states
    for found in (short, long, longer):
        [row] = found.formats
        assert (row.kv_format, row.pages, row.tails_and_tables, row.longest) == ("none", 0, 0, 2**31 - 2)
        assert row.needed == found.weights + found.workspace + found.states
    assert plans.plan(10).workspace < short.workspace
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "m"), "-c", "1000"])
    assert result.exit_code == 0 and "recurrent states" in result.stdout, result.output


def test_a_workspace_is_as_large_as_what_a_step_holds():
    """Of the kinds of layers, all that the widest computes for a token at one time."""
    for kind in ("mamba", "mamba2", "jamba", "qwen3_next"):
        model = tiny_states_model(kind)
        inputs = torch.zeros(1, 1024, dtype=torch.int64)
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            model(inputs, last_only=True)
        held, most = 0, 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        assert most > 0
        assert most <= memory.workspace_bytes(model.config, 1024, 1, 4) - memory.SPARE_BYTES, kind
