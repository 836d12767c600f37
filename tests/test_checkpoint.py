"""Broken, hostile and unknown checkpoint folders: one clear error each, before any work."""

import json
import os

import pytest
import torch
from model_cases import edit_config, random_tokens, write_reference
from safetensors.torch import load_file, save_file

import lcore

SUPPORTED = (
    "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, MambaForCausalLM, "
    "FalconMambaForCausalLM, Mamba2ForCausalLM, JambaForCausalLM, Qwen3NextForCausalLM"
)


@pytest.fixture
def folder(tmp_path):
    """A whole single-file folder."""
    write_reference("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """A whole folder with an index."""
    write_reference("llama", tmp_path, max_shard_size="60KB")
    assert not (tmp_path / "model.safetensors").exists()
    return tmp_path


def refused(path, error):
    with pytest.raises(error) as caught:
        lcore.load_model(path)
    assert type(caught.value) is error
    return str(caught.value).removeprefix("lcore.load_model: ")


def edit_index(folder, tensor, file):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = file
    path.write_text(json.dumps(index))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_no_folder(tmp_path):
    missing = tmp_path / "nowhere"
    assert refused(missing, FileNotFoundError) == f"path must be a folder, got {missing}"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file", FileNotFoundError) == f"path must be a folder, got {tmp_path / 'file'}"


def test_config_missing_or_broken(folder):
    config = folder / "config.json"
    config.write_text('{"model_type": "llama",')
    assert refused(folder, ValueError).startswith(f"config.json must be valid JSON, got {config}: Expecting property")
    config.write_bytes(b"\xff\xfe\x00")
    assert refused(folder, ValueError).startswith(f"config.json must be valid JSON, got {config}: ")
    config.write_text("[1]")
    assert refused(folder, ValueError) == f"config.json must hold a JSON object, got {config}: list"
    config.unlink()
    assert refused(folder, FileNotFoundError) == f"path must be a folder with config.json, got {folder}"


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            NotImplementedError,
            f"architecture must be one of {SUPPORTED}, got GemmaForCausalLM",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            NotImplementedError,
            f"architecture must be one of {SUPPORTED}, got LlamaForSequenceClassification",
        ),
        (
            {"architectures": None, "model_type": "gpt2"},
            NotImplementedError,
            f"architecture must be one of {SUPPORTED}, got model_type 'gpt2'",
        ),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act must be silu, got gelu"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            NotImplementedError,
            "weights must be unquantized, got quantization_config 'gptq'",
        ),
        (
            {"partial_rotary_factor": 0.5},
            NotImplementedError,
            "partial_rotary_factor must be 1 in these families, got 0.5",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            NotImplementedError,
            "partial_rotary_factor must be 1 in these families, got 0.25",
        ),
        ({"hidden_size": None}, ValueError, "config.json must have hidden_size as a positive integer, got None"),
        ({"vocab_size": "9"}, ValueError, "config.json must have vocab_size as a positive integer, got 9"),
        (
            {"num_key_value_heads": 3},
            ValueError,
            "lcore.ModelConfig: num_heads must be a multiple of num_kv_heads = 3, got 4",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            NotImplementedError,
            "lcore.RopeConfig: rope_type must be one of default, linear, llama3, yarn, got longrope",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]},
            ValueError,
            "layer_types must have num_hidden_layers = 3 entries, got 1",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "linear_attention", "x"]},
            NotImplementedError,
            "layer_types must be full_attention or sliding_attention, got linear_attention",
        ),
    ],
)
def test_config_that_cannot_be_built(changes, error, text, folder):
    edit_config(folder, **changes)
    assert refused(folder, error) == text


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused(folder, FileNotFoundError) == (
        "path must be a folder with model.safetensors or model.safetensors.index.json, "
        f"got {folder} with config.json, generation_config.json, pytorch_model.bin"
    )


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    start = f"model.safetensors must be a whole safetensors file, got {file}: "
    assert refused(folder, ValueError).startswith(start)
    for size in (100, 7, 0):
        os.truncate(file, size)
        assert refused(folder, ValueError).startswith(start)


def test_a_file_of_something_else(folder):
    torch.save({"a": torch.zeros(3)}, folder / "model.safetensors")
    assert refused(folder, ValueError).startswith("model.safetensors must be a whole safetensors file, got ")


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    want = f"model.safetensors.index.json must name files that exist, got {shard.name}, not in {sharded}"
    assert refused(sharded, FileNotFoundError) == want


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    assert refused(sharded, ValueError).startswith(f"{shard.name} must be a whole safetensors file, got {shard}: ")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../model.safetensors", "sub/model.safetensors", "..", "", ".", "..\\m", "C:\\m", "C:m"]
)
def test_index_that_points_outside(name, sharded):
    edit_index(sharded, "model.norm.weight", name)
    want = f"model.safetensors.index.json must name files inside the folder, got {name!r} for model.norm.weight"
    assert refused(sharded, ValueError) == want


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_index_without_a_map(content, sharded):
    (sharded / "model.safetensors.index.json").write_text(content)
    start = "model.safetensors.index.json must have a weight_map from tensor names to file names, got "
    assert refused(sharded, ValueError).startswith(start)
    (sharded / "model.safetensors.index.json").write_text("{")
    assert refused(sharded, ValueError).startswith("model.safetensors.index.json must be valid JSON, got ")


def test_index_that_places_a_tensor_in_the_wrong_shard(sharded):
    first, *_, last = (path.name for path in sorted(sharded.glob("*.safetensors")))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    tensor = next(name for name, file in index.items() if file == first)
    edit_index(sharded, tensor, last)
    want = f"{last} must hold the tensors that model.safetensors.index.json places in it, got no {tensor}"
    assert refused(sharded, ValueError) == want


def test_missing_unexpected_and_misshapen_tensors(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    want = "weights must hold every tensor of the model, got none for model.layers.1.mlp.up_proj.weight"
    assert refused(folder, ValueError) == want

    edit_weights(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 96)}))
    want = "model.layers.1.mlp.up_proj.weight must have shape (96, 64), got (64, 96)"
    assert refused(folder, ValueError) == want

    def extra(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64)
        tensors |= {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(64) for i in range(6)}

    edit_weights(folder, extra)
    names = ", ".join(f"model.layers.{i}.self_attn.q_proj.bias" for i in range(4))
    want = f"weights must hold only tensors of the model, got unexpected {names} and 2 more"
    assert refused(folder, ValueError) == want


def test_integer_weights(folder):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    assert refused(folder, NotImplementedError) == "model.norm.weight must have dtype F64, F32, F16, BF16, got I8"


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": 3}')
    start = f"tokenizer.json must be a file of the tokenizers library, got {folder / 'tokenizer.json'}: "
    assert refused(folder, ValueError).startswith(start)


def test_shards_may_be_links(sharded, tmp_path_factory):
    """Hugging Face's cache keeps a folder of links to files elsewhere."""
    store = tmp_path_factory.mktemp("blobs")
    for number, file in enumerate(sorted(sharded.glob("*.safetensors"))):
        file.rename(store / str(number))
        file.symlink_to(store / str(number))
    assert lcore.load_model(sharded)(random_tokens(1, 3)).isfinite().all()
