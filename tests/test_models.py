"""Logits and gradients of whole decoders against transformers."""

import dataclasses

import pytest
import torch
from model_cases import CASES, WINDOW, build_reference, edit_config, random_tokens, reference_logits, write_reference

import lcore
from lcore.models import Decoder, ModelConfig
from lcore.positions import RopeConfig

SEQ = 40  # several times the sliding window of the cases


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
    assert got.dtype == torch.float32
    assert want.abs().max() > 3, "logits too small to tell models apart"
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5)
    torch.testing.assert_close(last, want[:, -1:], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-sliding", "llama-llama3", "llama-yarn", "llama-linear"])
def test_the_oracle_sees_windows_and_rope(name, tmp_path):
    want = reference_logits(write_reference(name, tmp_path), random_tokens(1, SEQ))
    model = lcore.load_model(tmp_path)
    config = model.config
    longer = tuple(size and size + 1 for size in config.sliding_window)
    mutants = [dataclasses.replace(config, sliding_window=longer)] if WINDOW in config.sliding_window else []
    if config.rope.rope_type != "default":
        mutants.append(dataclasses.replace(config, rope=RopeConfig(theta=config.rope.theta)))
    for mutant in mutants:
        wrong = Decoder(mutant)
        wrong.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert (wrong(random_tokens(1, SEQ)) - want).abs().max() > 1e-2


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.5}},
        {"rope_parameters": {"full_attention": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.5}}},
        {"architectures": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.5}},
    ],
    ids=["v4-type", "v4-rope_type", "v5", "v5-by-layer-type", "by-model_type"],
)
def test_every_generation_of_config_means_the_same(keys, tmp_path):
    model = build_reference("llama", rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5})
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, **keys)
    tokens = random_tokens(1, SEQ)
    with torch.no_grad():
        got = lcore.load_model(tmp_path)(tokens)
    torch.testing.assert_close(got, reference_logits(model, tokens), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3-sliding", "qwen2-sliding"])
def test_gradients_equal_transformers(name, tmp_path):
    reference = write_reference(name, tmp_path)
    model = lcore.load_model(tmp_path)
    tokens = random_tokens(2, SEQ)
    targets = random_tokens(2 * SEQ, seed=2)
    for net in (reference, model):
        out = net(tokens)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    want = dict(reference.named_parameters())
    got = dict(model.named_parameters())
    assert got.keys() == want.keys()
    for key, parameter in got.items():
        assert parameter.grad is not None, key
        scale = want[key].grad.abs().max()
        assert (parameter.grad - want[key].grad).abs().max() <= 2e-5 * scale + 1e-7, key


def test_bfloat16_is_as_near_as_transformers(tmp_path):
    exact = write_reference("qwen3", tmp_path)
    tokens = random_tokens(2, SEQ)
    want = reference_logits(exact, tokens)
    rounded = build_reference("qwen3").to(torch.bfloat16)
    theirs = (reference_logits(rounded, tokens) - want).pow(2).mean().sqrt()
    model = lcore.load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(layer.self_attn.rotary.inv_freq.dtype == torch.float32 for layer in model.model.layers)
    with torch.no_grad():
        got = model(tokens)
    assert got.dtype == torch.float32
    assert (got - want).pow(2).mean().sqrt() <= 1.2 * theirs


def test_chosen_positions(tmp_path):
    reference = write_reference("llama", tmp_path)
    model = lcore.load_model(tmp_path)
    tokens = random_tokens(2, 12)
    positions = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(3)).sort(1).values
    with torch.no_grad():
        want = reference(tokens, position_ids=positions).logits
        got = model(tokens, positions=positions)
        shared = model(tokens, positions=positions[0])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    assert torch.equal(shared[0], got[0])


def test_padding_is_never_read(tmp_path):
    write_reference("mistral-window", tmp_path)
    model = lcore.load_model(tmp_path)
    tokens = random_tokens(3, SEQ)
    lengths = torch.tensor([SEQ, 17, 0])
    wild = tokens.masked_fill(torch.arange(SEQ) >= lengths[:, None], -5)
    with torch.no_grad():
        want = model(tokens)
        got = model(wild, lengths=lengths)
        last = model(wild, lengths=lengths, last_only=True)
    torch.testing.assert_close(got[1, :17], want[1, :17], rtol=0, atol=1e-5)
    torch.testing.assert_close(last[:2, 0], torch.stack([want[0, -1], want[1, 16]]), rtol=0, atol=1e-5)
    assert torch.equal(last[2], torch.zeros_like(last[2]))


def test_last_only_projects_one_row(tmp_path):
    model = Decoder(ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1))
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    model(random_tokens(2, 9, vocab=50), last_only=True)
    model(random_tokens(2, 9, vocab=50), last_only=True, lengths=torch.tensor([3, 9]))
    assert seen == [(2, 1, 16)] * 2


@pytest.mark.parametrize(
    ("tokens", "options", "error", "text"),
    [
        (torch.tensor([[1, 50]]), {}, ValueError, "tokens must be ids in 0 .. 49 (vocab_size 50), got 50"),
        (torch.tensor([[-1, 3]]), {}, ValueError, "tokens must be ids in 0 .. 49 (vocab_size 50), got -1"),
        (torch.tensor([1, 2]), {}, ValueError, "tokens must have shape (batch, seq) = (*, *), got (2,)"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, ValueError, "tokens must hold at least one token, got (1, 0)"),
        (torch.ones(1, 2), {}, TypeError, "tokens must have dtype int64 or int32, got float32"),
        (
            torch.tensor([[1, 2]]),
            {"lengths": torch.tensor([3])},
            ValueError,
            "lengths must be in 0 .. 2, got (3, 3)",
        ),
        (
            torch.tensor([[1, 2]]),
            {"lengths": torch.tensor([1, 1])},
            ValueError,
            "lengths must have shape (batch,) = (1,), got (2,)",
        ),
    ],
)
def test_bad_tokens_are_refused(tokens, options, error, text):
    model = Decoder(ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1))
    with pytest.raises(error) as caught:
        model(tokens, **options)
    assert str(caught.value) == f"lcore.Decoder: {text}"
