"""Mamba models loaded from folders that transformers wrote, against transformers."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from mamba_cases import CASES, build_reference, one_by_one, write_reference
from model_cases import edit_config, random_tokens, reference_logits

import lcore
from lcore.models import MambaConfig, MambaDecoder

SEQ = 150  # chunks of 64 in the kernels: two full ones and a rest
CHUNKS = {"one": [150], "mixed": [1, 2, 61, 1, 64, 20, 1], "steps": [130, *[1] * 20]}


def read(model, tokens, chunks):
    """Logits of all tokens, read chunk by chunk into a fresh cache."""
    cache = model.new_cache(tokens.shape[0])
    return torch.cat([model(part, cache) for part in tokens.split(chunks, dim=1)], dim=1), cache


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    reference = write_reference(name, tmp_path)
    tokens = random_tokens(2, SEQ)
    want = reference_logits(reference, tokens)
    model = lcore.load_model(tmp_path)
    assert not model.training
    with torch.no_grad():
        got = model(tokens)
        last = model(tokens, last_only=True)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5)
    torch.testing.assert_close(last, want[:, -1:], rtol=0, atol=5e-5)
    for chunks in CHUNKS.values():
        got, cache = read(model, tokens, chunks)
        torch.testing.assert_close(got, want, rtol=0, atol=5e-5)
        assert cache.seen().tolist() == [SEQ, SEQ]


@pytest.mark.parametrize("name", ["mamba", "falcon"])
def test_transformers_loses_the_state_and_lcore_does_not(name, tmp_path):
    """transformers' Mamba-1 starts from zeros when several tokens follow a cache: its oracle is token by token."""
    reference = write_reference(name, tmp_path)
    tokens = random_tokens(1, 60)
    want = one_by_one(reference, tokens.split(1, dim=1))
    halves = tokens.split(30, dim=1)
    assert (one_by_one(reference, halves) - want)[:, 30:].abs().max() > 0.02
    got, _ = read(lcore.load_model(tmp_path), tokens, 30)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["mamba", "falcon"])
def test_bits_do_not_depend_on_chunks_batch_or_padding(name, tmp_path):
    write_reference(name, tmp_path)
    model = lcore.load_model(tmp_path)
    tokens = random_tokens(3, SEQ)
    want, _ = read(model, tokens, SEQ)
    for chunks in CHUNKS.values():
        assert torch.equal(read(model, tokens[1:2], chunks)[0], want[1:2])
    with torch.no_grad():
        got = model(tokens, lengths=torch.tensor([SEQ, 31, 0]))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :31], want[1, :31])


@pytest.mark.parametrize("name", CASES)
def test_rows_of_different_lengths(name, tmp_path):
    reference = write_reference(name, tmp_path)
    model = lcore.load_model(tmp_path)
    cache = model.new_cache(3)
    texts = [torch.empty(0, dtype=torch.int64)] * 3
    steps = [[70, 1, 0], [1, 0, 33], [0, 0, 1], [2, 90, 40]]  # tokens of each row; the padding holds no ids at all
    for seed, step in enumerate(steps):
        tokens, lengths = random_tokens(3, max(step), seed=seed), torch.tensor(step)
        wild = tokens.masked_fill(torch.arange(max(step)) >= lengths[:, None], -5)
        texts = [torch.cat([text, row[:n]]) for text, row, n in zip(texts, tokens, step, strict=True)]
        got = model(wild, cache, lengths=lengths, last_only=True)
        for row, text in enumerate(texts):
            if step[row] == 0:
                assert not got[row].any()
            else:
                want = reference_logits(reference, text[None])[0, -1]
                torch.testing.assert_close(got[row, 0], want, rtol=0, atol=5e-5)
    assert cache.seen().tolist() == [73, 91, 74]


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_transformers(name, tmp_path):
    reference = write_reference(name, tmp_path)
    model = lcore.load_model(tmp_path)
    tokens, targets = random_tokens(2, 70), random_tokens(140, seed=2)
    for net in (reference, model):
        out = net(tokens)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    want, got = dict(reference.named_parameters()), dict(model.named_parameters())
    assert got.keys() == want.keys()
    for key, parameter in got.items():
        scale = want[key].grad.abs().max()
        assert scale > 0, key
        assert (parameter.grad - want[key].grad).abs().max() <= 5e-5 * scale + 1e-7, key


def test_gradients_of_padded_rows(tmp_path):
    write_reference("mamba2", tmp_path)
    tokens, lengths = random_tokens(2, 40), torch.tensor([40, 13])
    grads = []
    for padded in (True, False):
        model = lcore.load_model(tmp_path)
        rows = model(tokens, lengths=lengths) if padded else model(tokens)
        (rows[0].sum() + rows[1, :13].sum()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["mamba", "falcon", "mamba2"])
def test_bfloat16_is_as_near_as_transformers(name, tmp_path):
    exact = write_reference(name, tmp_path)
    tokens = random_tokens(2, SEQ)
    want = reference_logits(exact, tokens)
    theirs = (reference_logits(build_reference(name).to(torch.bfloat16), tokens) - want).pow(2).mean().sqrt()
    model = lcore.load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for chunks in CHUNKS.values():
        got, cache = read(model, tokens, chunks)
        assert got.dtype == torch.float32
        assert cache.layer(0).recurrent.dtype == torch.float32
        assert (got - want).pow(2).mean().sqrt() <= 1.2 * theirs


@pytest.mark.parametrize("name", CASES)
def test_saved_folders_load_in_transformers(name, tmp_path):
    reference = write_reference(name, tmp_path / "theirs")
    model = lcore.load_model(tmp_path / "theirs")
    model.save(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = random_tokens(1, 30)
    assert type(back) is type(reference)
    torch.testing.assert_close(reference_logits(back, tokens), reference_logits(reference, tokens), rtol=0, atol=1e-5)
    again = lcore.load_model(tmp_path / "ours")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))


def test_the_oracle_sees_the_config(tmp_path):
    tokens = random_tokens(1, 40)
    for name, changes in (
        ("mamba2-limits", {"time_step_limit": (0.0, math.inf)}),
        ("falcon", {"mixer_rms_eps": 1e-6}),
        ("falcon", {"model_type": "mamba"}),
        ("mamba", {"layer_norm_epsilon": 1.0}),
    ):
        want = reference_logits(write_reference(name, tmp_path / name), tokens)
        model = lcore.load_model(tmp_path / name)
        wrong = MambaDecoder(dataclasses.replace(model.config, **changes))
        wrong.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert (wrong(tokens) - want).abs().max() > 1e-3, changes


def test_configs_of_either_version_of_transformers(tmp_path):
    write_reference("mamba2", tmp_path)
    want = lcore.load_model(tmp_path).config
    assert want.time_step_limit == (0.0, math.inf)
    edit_config(tmp_path, time_step_limit=[0.0, math.inf], architectures=None)
    assert "Infinity]" in (tmp_path / "config.json").read_text()
    assert lcore.load_model(tmp_path).config == want
    edit_config(tmp_path, time_step_limit=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"^lcore.load_model: time_step_limit must be two numbers, the second not"):
        lcore.load_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    edit_config(tmp_path, time_step_limit=None)
    assert lcore.load_model(tmp_path).config.eos_token_ids == (7, 9)


def test_a_fresh_model_starts_like_transformers():
    config = MambaConfig(vocab_size=131, hidden_size=64, num_layers=1)
    torch.manual_seed(0)
    ours = dict(MambaDecoder(config).named_parameters())
    theirs = dict(transformers.MambaForCausalLM(transformers.MambaConfig(**{
        "vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 1, "tie_word_embeddings": False,
    })).named_parameters())  # fmt: skip
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.shape == theirs[name].shape
        if name.endswith(("A_log", ".D", "norm.weight", "norm_f.weight")):
            assert torch.equal(parameter, theirs[name]), name
        elif not name.endswith("conv1d.bias"):
            assert 0.8 < parameter.std() / theirs[name].std() < 1.25, name


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"model_type": "rwkv"},
            NotImplementedError,
            "model_type must be one of mamba, falcon_mamba, mamba2, got rwkv",
        ),
        ({"num_layers": 0}, ValueError, "num_layers must be a positive integer, got 0"),
        ({"model_type": "mamba2"}, ValueError, "intermediate_size must be a positive integer, got 0"),
        (
            {"model_type": "mamba2", "num_heads": 4, "head_dim": 8, "n_groups": 3},
            ValueError,
            "num_heads must be a multiple of n_groups = 3, got 4",
        ),
    ],
)
def test_bad_configs_are_refused(changes, error, text):
    with pytest.raises(error) as caught:
        MambaConfig(**({"vocab_size": 50, "hidden_size": 16, "num_layers": 1} | changes))
    assert str(caught.value) == f"lcore.MambaConfig: {text}"


def test_bad_calls_are_refused():
    model = MambaDecoder(MambaConfig(vocab_size=50, hidden_size=16, num_layers=1))
    with pytest.raises(
        ValueError, match=r"^lcore.MambaDecoder: tokens must be ids in 0 .. 49 \(vocab_size 50\), got 50$"
    ):
        model(torch.tensor([[50]]))
    with pytest.raises(
        ValueError, match=r"^lcore.MambaDecoder: cache must have batch_size = 1, the rows of tokens, got 2$"
    ):
        model(torch.tensor([[1]]), model.new_cache(2))
