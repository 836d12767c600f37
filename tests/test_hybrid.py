"""Jamba and Qwen3-Next models loaded from folders that transformers wrote, against transformers."""

import dataclasses

import pytest
import torch
import transformers
from hybrid_cases import CASES, build_reference, unfused, write_reference
from mamba_cases import one_by_one
from model_cases import edit_config, random_tokens, reference_logits

import lcore
from lcore.models import HybridDecoder, JambaConfig, Qwen3NextConfig

SEQ = 150  # chunks of 64 in the kernels: two full ones and a rest
CHUNKS = {"one": [150], "mixed": [1, 2, 61, 1, 64, 20, 1]}
NAMES = ["jamba", "qwen3_next"]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A case's folder, and transformers' model of it with its logits."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = write_reference(request.param, folder)
    tokens = random_tokens(2, SEQ)
    return folder, reference, tokens, reference_logits(reference, tokens)


def read(model, tokens, chunks):
    """Logits of all tokens, read chunk by chunk into a fresh cache."""
    cache = model.new_cache(tokens.shape[0])
    return torch.cat([model(part, cache) for part in tokens.split(chunks, dim=1)], dim=1), cache


def assert_near(got, want):
    """In float32, of logits as large as these."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_logits_equal_transformers(pair):
    folder, _, tokens, want = pair
    model = lcore.load_model(folder)
    assert isinstance(model, HybridDecoder) and not model.training
    with torch.no_grad():
        assert_near(model(tokens), want)
        assert_near(model(tokens, last_only=True), want[:, -1:])
    for chunks in CHUNKS.values():
        got, cache = read(model, tokens, chunks)
        assert_near(got, want)
        assert cache.seen().tolist() == cache.states.seen().tolist() == [SEQ, SEQ]


def test_gradients_equal_transformers(pair):
    folder, reference, *_ = pair
    model = lcore.load_model(folder)
    tokens, targets = random_tokens(2, 70), random_tokens(140, seed=2)
    for net in (reference, model):
        out = net(tokens)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    want = {}
    for name, parameter in reference.named_parameters():
        want |= unfused(name, parameter.grad)
    reference.zero_grad()
    got = dict(model.named_parameters())
    assert got.keys() == want.keys()
    for name, parameter in got.items():
        scale = want[name].abs().max()
        assert scale > 0, name
        assert (parameter.grad - want[name]).abs().max() <= 2e-4 * scale + 1e-7, name


def test_float64_equals_transformers_but_for_its_float32(pair):
    """Norms, routers and recurrences are float32 in a float64 model of transformers: what is left is their rounding."""
    folder, reference, tokens, want = pair
    model = lcore.load_model(folder, dtype=torch.float64)
    exact = reference.to(torch.float64)
    with torch.no_grad():
        theirs = exact(tokens[:1, :40]).logits
        got = model.lm_head(model.features(tokens[:1, :40]))
    reference.to(torch.float32)
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_rows_of_different_lengths(pair):
    folder, reference, *_ = pair
    model = lcore.load_model(folder)
    cache = model.new_cache(3)
    texts = [torch.empty(0, dtype=torch.int64)] * 3
    steps = [[70, 1, 0], [1, 0, 33], [2, 40, 9]]  # tokens of each row; the padding holds no ids at all
    for seed, step in enumerate(steps):
        tokens, lengths = random_tokens(3, max(step), seed=seed), torch.tensor(step)
        wild = tokens.masked_fill(torch.arange(max(step)) >= lengths[:, None], -5)
        texts = [torch.cat([text, row[:n]]) for text, row, n in zip(texts, tokens, step, strict=True)]
        got = model(wild, cache, lengths=lengths, last_only=True)
        assert all(not got[row].any() for row in range(3) if step[row] == 0)
    for row, text in enumerate(texts):
        assert_near(got[row, 0], reference_logits(reference, text[None])[0, -1])
    assert cache.seen().tolist() == cache.states.seen().tolist() == [73, 41, 42]


def test_saved_folders_load_in_transformers(pair, tmp_path):
    folder, reference, tokens, want = pair
    model = lcore.load_model(folder)
    model.save(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(reference)
    assert_near(reference_logits(back, tokens[:, :30]), want[:, :30])
    again = lcore.load_model(tmp_path / "ours")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))


def test_bits_of_jamba_do_not_depend_on_chunks_batch_or_padding(tmp_path):
    write_reference("jamba", tmp_path)
    model = lcore.load_model(tmp_path)
    tokens = random_tokens(3, SEQ)
    want, _ = read(model, tokens, SEQ)
    assert torch.equal(read(model, tokens[1:2], CHUNKS["mixed"])[0], want[1:2])
    with torch.no_grad():
        got = model(tokens, lengths=torch.tensor([SEQ, 31, 0]))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :31], want[1, :31])


def test_transformers_loses_the_state_of_jamba_and_lcore_does_not(tmp_path):
    """transformers' Mamba layers start from zeros when several tokens follow a cache: its oracle is token by token."""
    reference = write_reference("jamba", tmp_path)
    tokens = random_tokens(1, 40)
    want = one_by_one(reference, tokens.split(1, dim=1))
    halves = tokens.split(20, dim=1)
    assert (one_by_one(reference, halves) - want)[:, 20:].abs().max() > 0.02
    assert_near(read(lcore.load_model(tmp_path), tokens, 20)[0], want)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_equals_transformers(name, tmp_path):
    """Token by token, which transformers has right in every family."""
    reference = write_reference(name, tmp_path)
    prompt = random_tokens(1, 20)
    cache, part, wanted = None, prompt[:, :1], []
    with torch.no_grad():
        for step in range(20 + 11):
            out = reference(part, cache=cache, use_cache=True)
            cache, chosen = out.cache, out.logits[:, -1:].argmax(-1)
            part = prompt[:, step + 1 : step + 2] if step < 19 else chosen
            wanted.append(int(chosen))
    got = lcore.Generator(lcore.load_model(tmp_path)).generate(prompt[0].tolist(), max_new_tokens=12)
    assert got.tokens == wanted[19:]
    assert len(set(got.tokens)) > 3


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_near_as_transformers(name, tmp_path):
    exact = write_reference(name, tmp_path)
    tokens = random_tokens(2, 100)
    want = reference_logits(exact, tokens)
    theirs = (reference_logits(build_reference(name).to(torch.bfloat16), tokens) - want).pow(2).mean().sqrt()
    model = lcore.load_model(tmp_path, dtype=torch.bfloat16)
    got, cache = read(model, tokens, 50)
    assert cache.states.layer(0).recurrent.dtype == torch.float32
    assert (got - want).pow(2).mean().sqrt() <= 1.2 * theirs


def test_the_oracle_sees_the_config(tmp_path):
    tokens = random_tokens(1, 40)
    for name, changes in (
        ("jamba", {"num_experts_per_tok": 1}),
        ("jamba", {"rms_norm_eps": 1.0}),
        ("qwen3_next", {"norm_topk_prob": False}),
        ("qwen3_next", {"rope": lcore.positions.RopeConfig(partial_rotary_factor=0.5)}),
        ("qwen3_next", {"rms_norm_eps": 1.0}),
    ):
        want = reference_logits(write_reference(name, tmp_path / name), tokens)
        model = lcore.load_model(tmp_path / name)
        wrong = HybridDecoder(dataclasses.replace(model.config, **changes))
        wrong.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert (wrong(tokens) - want).abs().max() > 1e-2, changes


def test_configs_that_say_little(tmp_path):
    write_reference("qwen3_next", tmp_path)
    want = lcore.load_model(tmp_path).config
    edit_config(tmp_path, layer_types=None, rope_parameters=None, architectures=None, partial_rotary_factor=0.25)
    assert lcore.load_model(tmp_path).config == want
    assert want.layer_types[3] == "full_attention" and want.attends == [False, False, False, True]


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("kind", "changes", "error", "text"),
    [
        (JambaConfig, {"attn_layer_offset": 8}, ValueError, "attn_layer_offset must be in 0 .. 7, got 8"),
        (JambaConfig, {}, ValueError, "layers must have attention layers and recurrent ones, got 0 of 2 that attend"),
        (
            JambaConfig,
            {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 5},
            ValueError,
            "num_experts_per_tok must be in 1 .. num_experts = 4, got 5",
        ),
        (Qwen3NextConfig, {"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads = 3, got 2"),
        (
            Qwen3NextConfig,
            {"layer_types": ("full_attention", "sliding_attention")},
            NotImplementedError,
            "layer_types must be full_attention or linear_attention, got sliding_attention",
        ),
    ],
)
def test_bad_configs_are_refused(kind, changes, error, text):
    with pytest.raises(error) as caught:
        kind(**SMALL, **changes)
    assert str(caught.value) == f"lcore.{kind.__name__}: {text}"
