"""RoPE frequencies must be those of transformers to the bit, from every form of config that is about."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lcore.positions import RopeConfig, rope_frequencies
from lcore.positions.rope_config import split_by_layer_type

# (name, rope dict as in a real config.json, rope_theta, head_dim, max_position_embeddings)
CASES = [
    ("llama2", None, 10000.0, 128, 4096),
    ("llama3.0", None, 500000.0, 128, 8192),
    ("codellama-int-theta", None, 1000000, 64, 16384),
    ("linear", {"type": "linear", "factor": 4.0}, 10000.0, 128, 16384),
    ("linear-odd-factor", {"rope_type": "linear", "factor": 2.7}, 5e6, 80, 16384),
    (
        "llama3.1",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        500000.0,
        128,
        131072,
    ),
    (
        "llama3.2",
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        500000.0,
        64,
        131072,
    ),
    ("qwen2.5-yarn", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 1e6, 128, 131072),
    ("yarn-no-original", {"rope_type": "yarn", "factor": 4.0}, 1e6, 128, 32768),
    (
        "yarn-mscale",
        {
            "rope_type": "yarn",
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        },
        10000,
        64,
        163840,
    ),
    (
        "yarn-no-truncate",
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
        },
        150000,
        64,
        131072,
    ),
    (
        "yarn-attention-factor",
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.9, "original_max_position_embeddings": 2048},
        10000.0,
        32,
        4096,
    ),
    ("yarn-below-1", {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512}, 1e4, 16, 512),
    (
        "yarn-equal-bounds",
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 1, "beta_slow": 1, "original_max_position_embeddings": 64},
        1e4,
        16,
        512,
    ),
    (
        "yarn-no-factor",
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
        10000.0,
        128,
        65536,
    ),
]


def oracle(rope, theta, head_dim, limit):
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=limit,
        rope_parameters=dict(rope or {"rope_type": "default"}) | {"rope_theta": theta},
    )
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize(("rope", "theta", "head_dim", "limit"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_frequencies_are_those_of_transformers(rope, theta, head_dim, limit):
    want, want_scaling = oracle(rope, theta, head_dim, limit)
    beside = RopeConfig.from_dict(rope, rope_theta=theta, max_position_embeddings=limit)
    inside = RopeConfig.from_dict(dict(rope or {}) | {"rope_theta": theta}, max_position_embeddings=limit)
    assert beside == inside
    got, scaling = rope_frequencies(beside, head_dim)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert scaling == want_scaling
    again = RopeConfig.from_dict(beside.to_dict(), max_position_embeddings=limit)
    assert torch.equal(rope_frequencies(again, head_dim)[0], want)


def test_partial_rotary_factor():
    rope = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25, "rope_theta": 10000.0}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=dict(rope))
    want, _ = ROPE_INIT_FUNCTIONS["linear"](config, None)
    got, _ = rope_frequencies(rope, 64)
    assert got.shape == (8,)
    assert torch.equal(got, want)


def test_original_length_beside_the_dict_wins():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert RopeConfig.from_dict(rope, original_max_position_embeddings=2048).original_max_position_embeddings == 2048


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "axial", "mrope", "su"])
def test_other_types_are_refused_by_name(kind):
    with pytest.raises(NotImplementedError) as caught:
        rope_frequencies({"type": kind, "factor": 2.0}, 64)
    assert str(caught.value) == f"lcore.RopeConfig: rope_type must be one of default, linear, llama3, yarn, got {kind}"


@pytest.mark.parametrize(
    ("rope", "text"),
    [
        ({"type": "linear"}, "lcore.RopeConfig: rope_type 'linear' must come with factor, got none"),
        (
            {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            "lcore.RopeConfig: rope_type 'llama3' must come with low_freq_factor, high_freq_factor, got none",
        ),
        (
            {"type": "yarn", "original_max_position_embeddings": 64},
            "lcore.RopeConfig: rope_type 'yarn' must come with factor or max_position_embeddings, got none",
        ),
        ({"type": "linear", "factor": 0}, "lcore.RopeConfig: factor must be a number above 0, got 0"),
        ({"type": "linear", "factor": "8"}, "lcore.RopeConfig: factor must be a number above 0, got 8"),
        ({"rope_theta": -1.0}, "lcore.RopeConfig: theta must be a number above 0, got -1.0"),
        (
            {"partial_rotary_factor": 1.5},
            "lcore.RopeConfig: partial_rotary_factor must be in (0, 1], got 1.5",
        ),
        (
            {"partial_rotary_factor": 0.3},
            "lcore.rope_frequencies: head_dim * partial_rotary_factor must be even and at least 2, got 64 * 0.3 = 19",
        ),
    ],
)
def test_impossible_values_are_named(rope, text):
    with pytest.raises(ValueError, match="lcore") as caught:
        rope_frequencies(rope, 64)
    assert str(caught.value) == text


def test_dicts_by_layer_type():
    flat = {"rope_type": "default", "rope_theta": 1e4}
    assert split_by_layer_type(flat) == {"full_attention": flat}
    nested = {"full_attention": flat, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    assert split_by_layer_type(nested) == nested
    with pytest.raises(TypeError) as wrong:
        split_by_layer_type("linear")
    assert str(wrong.value) == "lcore.RopeConfig: rope_parameters must be a dict, got str"
    with pytest.raises(NotImplementedError) as caught:
        split_by_layer_type({"chunked_attention": flat})
    assert str(caught.value) == (
        "lcore.RopeConfig: rope_parameters must have the layer types full_attention and sliding_attention only, "
        "got chunked_attention"
    )
