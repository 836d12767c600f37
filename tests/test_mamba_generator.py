"""The generator and the command line with a model of recurrent states."""

import re

import pytest
import torch
from tiny_model import byte_tokenizer, tiny_decoder
from typer.testing import CliRunner

import lcore
from lcore.cli import app
from lcore.generation import Generator
from lcore.models import MambaConfig, MambaDecoder

PROMPT = [(17 * i * i + 5 * i + 3) % 256 for i in range(150)]
HOT = {"temperature": 1.0, "top_p": 0.95}


def tiny_mamba(kind="mamba"):
    torch.manual_seed(0)
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if kind == "mamba2" else {}
    config = MambaConfig(257, 32, 2, model_type=kind, state_size=8, use_conv_bias=True, initializer_range=0.5, **heads)
    model = MambaDecoder(config, tokenizer=byte_tokenizer()).eval()
    for layer in model.backbone.layers:
        bias = layer.mixer.dt_bias if kind == "mamba2" else layer.mixer.dt_proj.bias
        bias.data += 2
    return model


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_greedy_text_follows_the_models_own_logits(kind):
    model = tiny_mamba(kind)
    generator = Generator(model, prefill_chunk=16)
    ids = PROMPT[:50] + generator.generate(PROMPT[:50], max_new_tokens=20).tokens
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    assert logits[49:-1].argmax(-1).tolist() == ids[50:]
    assert len(set(ids[50:])) > 4
    assert generator.cache.seen().tolist() == [len(ids)]
    assert generator.prefixes is None


@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
def test_a_batch_of_different_lengths_equals_single_runs(options):
    generator = Generator(tiny_mamba(), prefill_chunk=64)
    prompts = [PROMPT[:130], PROMPT[:1], PROMPT[5:69]]
    free = [generator.generate(p, max_new_tokens=12, seed=1 + row, **options).tokens for row, p in enumerate(prompts)]
    stop = next(token for token in free[0][:6] if token not in free[1] + free[2])
    batch = generator.generate(prompts, max_new_tokens=12, seed=1, stop_ids=[stop], **options)
    assert batch[0].tokens == free[0][: free[0].index(stop) + 1]
    assert [completion.tokens for completion in batch[1:]] == free[1:]
    held = [len(p) + len(c.tokens) for p, c in zip(prompts, batch, strict=True)]
    assert generator.cache.seen().tolist() == held
    assert batch[0].stats.cache_bytes == generator.cache.stats()["bytes"]


def test_a_cache_is_continued():
    generator = Generator(tiny_mamba())
    want = generator.generate(PROMPT, max_new_tokens=10).tokens
    generator.generate(PROMPT[:90], max_new_tokens=0)
    before = generator.cache
    for _ in range(2):
        assert generator.generate(PROMPT[90:], max_new_tokens=10, cache=before.fork()).tokens == want
    assert before.seen().tolist() == [90]


def test_an_interrupted_stream_leaves_a_cache_to_continue():
    generator = Generator(tiny_mamba(), prefill_chunk=40)
    stream = generator.stream(PROMPT, max_new_tokens=10)
    next(stream), next(stream)
    stream.close()
    assert generator.cache.seen().tolist() == [40]
    want = generator.generate(PROMPT, max_new_tokens=10).tokens
    generator.generate(PROMPT[:40], max_new_tokens=0)
    handle = generator.model.backbone.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
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
        ("speculate", "ngram"),
        ("skip_layers", (0,)),
        ("fp_prefix", 64),
        ("max_bytes", 1 << 20),
        ("overflow", "/tmp"),
        ("prefix_reuse", lcore.PrefixCache()),
        ("session", "file"),
    ],
)
def test_what_only_a_kv_cache_has_is_refused(name, value):
    model = tiny_mamba()
    rule = f"lcore.Generator: {name} must be left out with a model of recurrent states, whose cache has no pages, got "
    with pytest.raises(NotImplementedError, match=f"^{re.escape(rule)}"):
        if name == "session":
            Generator(model).stream(PROMPT, session=value)
        else:
            Generator(model, **{name: value})


def test_a_cache_of_the_other_kind_is_refused():
    mamba, llama = tiny_mamba(), tiny_decoder()
    for model, other in ((mamba, llama), (llama, mamba)):
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


def test_command_line(tmp_path):
    tiny_mamba().save(tmp_path / "m")
    want = Generator(lcore.load_model(tmp_path / "m")).generate("Once upon", max_new_tokens=12)
    result = CliRunner().invoke(app, ["generate", "-m", str(tmp_path / "m"), "-p", "Once upon", "-n", "12"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == want.text + "\n"
    assert "wrote 12 in" in result.stderr
    refused = CliRunner().invoke(app, ["plan", str(tmp_path / "m"), "-c", "1000"])
    assert refused.exit_code != 0
    assert "lcore.plan: model must be a model with a KV cache" in " ".join(refused.stderr.replace("│", " ").split())
