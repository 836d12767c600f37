"""The generator and the command line with a model of recurrent states."""

import re

import pytest
import torch
from state_cases import HYBRIDS, KINDS, PROMPT, tiny_states_model
from tiny_model import tiny_decoder
from typer.testing import CliRunner

import lcore
from lcore.cli import app
from lcore.generation import Generator, SelfSpeculation

HOT = {"temperature": 1.0, "top_p": 0.95}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_follows_the_models_own_logits(kind):
    model = tiny_states_model(kind)
    generator = Generator(model, prefill_chunk=16)
    ids = PROMPT[:50] + generator.generate(PROMPT[:50], max_new_tokens=20).tokens
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    assert logits[49:-1].argmax(-1).tolist() == ids[50:]
    assert len(set(ids[50:])) > 4
    assert generator.cache.seen().tolist() == [len(ids)]


@pytest.mark.parametrize("kind", ["mamba", *HYBRIDS])
@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
def test_a_batch_of_different_lengths_equals_single_runs(kind, options):
    generator = Generator(tiny_states_model(kind), prefill_chunk=64)
    prompts = [PROMPT[:130], PROMPT[:1], PROMPT[5:69]]
    free = [generator.generate(p, max_new_tokens=12, seed=1 + row, **options).tokens for row, p in enumerate(prompts)]
    stop = next(token for token in free[0][:6] if token not in free[1] + free[2])
    batch = generator.generate(prompts, max_new_tokens=12, seed=1, stop_ids=[stop], **options)
    assert batch[0].tokens == free[0][: free[0].index(stop) + 1]
    assert [completion.tokens for completion in batch[1:]] == free[1:]
    held = [len(p) + len(c.tokens) for p, c in zip(prompts, batch, strict=True)]
    assert generator.cache.seen().tolist() == held
    assert batch[0].stats.cache_bytes == generator.cache.stats()["bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_continued(kind):
    generator = Generator(tiny_states_model(kind))
    want = generator.generate(PROMPT, max_new_tokens=10).tokens
    generator.generate(PROMPT[:90], max_new_tokens=0)
    before = generator.cache
    for _ in range(2):
        assert generator.generate(PROMPT[90:], max_new_tokens=10, cache=before.fork()).tokens == want
    assert before.seen().tolist() == [90]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_stream_leaves_a_cache_to_continue(kind):
    generator = Generator(tiny_states_model(kind), prefill_chunk=40)
    stream = generator.stream(PROMPT, max_new_tokens=10)
    next(stream), next(stream)
    stream.close()
    assert generator.cache.seen().tolist() == [40]
    want = generator.generate(PROMPT, max_new_tokens=10).tokens
    generator.generate(PROMPT[:40], max_new_tokens=0)
    model = generator.model
    layers = model.model.layers if kind in HYBRIDS else model.backbone.layers
    handle = layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generator.generate(PROMPT[40:], max_new_tokens=10, cache=generator.cache)
    handle.remove()
    assert generator.cache.seen().tolist() == [40]
    assert generator.generate(PROMPT[40:], max_new_tokens=10, cache=generator.cache).tokens == want


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_format", "int8"),
        ("policy", lcore.policies.StreamingLLM(64)),
        ("select", lcore.selection.Quest(64)),
        ("skip_layers", (0,)),
        ("fp_prefix", 64),
        ("max_bytes", 1 << 20),
        ("overflow", "/tmp"),
    ],
)
def test_what_only_a_kv_cache_has_is_refused(name, value):
    model = tiny_states_model("mamba")
    rule = f"lcore.Generator: {name} must be left out with a model of recurrent states, whose cache has no pages, got "
    with pytest.raises(NotImplementedError, match=f"^{re.escape(rule)}"):
        Generator(model, **{name: value})
    with pytest.raises(
        NotImplementedError, match=r"^lcore.Generator: speculate must be 'ngram' or None with a model of"
    ):
        Generator(model, speculate=SelfSpeculation()).stream(PROMPT)


def test_a_cache_of_the_other_kind_is_refused():
    mamba, llama, jamba = tiny_states_model("mamba"), tiny_decoder(), tiny_states_model("jamba")
    for model, other in ((mamba, llama), (llama, mamba), (jamba, llama), (llama, jamba), (mamba, jamba)):
        kind, got = type(model.new_cache()).__name__, type(other.new_cache()).__name__
        rule = f"cache must be a {kind}, as "
        with pytest.raises(
            TypeError, match=f"^lcore.{type(model).__name__}: {rule}new_cache\\(\\) makes it, got {got}$"
        ):
            model(torch.tensor([[1]]), other.new_cache())
        with pytest.raises(
            TypeError, match=f"^lcore.Generator: {rule}the model's new_cache\\(\\) makes it, got {got}$"
        ):
            Generator(model).stream(PROMPT, cache=other.new_cache())


@pytest.mark.parametrize("kind", ["mamba2", *HYBRIDS])
def test_command_line(kind, tmp_path):
    tiny_states_model(kind).save(tmp_path / "m")
    want = Generator(lcore.load_model(tmp_path / "m")).generate("Once upon", max_new_tokens=12)
    result = CliRunner().invoke(app, ["generate", "-m", str(tmp_path / "m"), "-p", "Once upon", "-n", "12"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == want.text + "\n"
    assert "wrote 12 in" in result.stderr
