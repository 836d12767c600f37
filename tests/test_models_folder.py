"""What load_model reads and Decoder.save writes: shards, ties, dtypes, memory, tokenizer files."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from model_cases import edit_config, random_tokens, reference_logits, write_reference
from safetensors.torch import load_file, save_file

import lcore
from lcore.models import Decoder, ModelConfig
from lcore.models.saving import save_model
from lcore.positions import RopeConfig


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens)


def test_shards_equal_one_file(tmp_path):
    reference = write_reference("qwen2", tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    tokens = random_tokens(1, 20)
    one, many = (logits(lcore.load_model(tmp_path / name), tokens) for name in ("one", "many"))
    assert torch.equal(one, many)


def test_tied_weights_are_one_parameter(tmp_path):
    write_reference("llama-gqa-tied", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = lcore.load_model(tmp_path, dtype=torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_old_checkpoints_carry_derived_tensors(tmp_path):
    reference = write_reference("llama-gqa-tied", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    tokens = random_tokens(1, 20)
    got = logits(lcore.load_model(tmp_path), tokens)
    torch.testing.assert_close(got, reference_logits(reference, tokens), rtol=0, atol=5e-5)


def test_dtype_follows_the_checkpoint(tmp_path):
    reference = write_reference("mistral-full", tmp_path / "f32")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    kept = lcore.load_model(tmp_path / "bf16")
    assert kept.dtype == torch.bfloat16
    assert lcore.load_model(tmp_path / "f32").dtype == torch.float32
    cast = lcore.load_model(tmp_path / "f32", dtype=torch.bfloat16)
    for (name, a), b in zip(kept.named_parameters(), cast.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(TypeError, match=r"^lcore.load_model: dtype must be None or one of .*, got torch.int8$"):
        lcore.load_model(tmp_path / "f32", dtype=torch.int8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_not_read(tmp_path):
    write_reference("llama", tmp_path)
    model = lcore.load_model(tmp_path)
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(tmp_path / "model.safetensors")):
            low, high = line.split()[0].split("-")
            spans.append(range(int(low, 16), int(high, 16)))
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in span for span in spans), name


def test_training_a_mapped_model_leaves_the_file_alone(tmp_path):
    write_reference("llama", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = lcore.load_model(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa-tied",
        "llama-biases",
        "llama-llama3",
        "llama-yarn",
        "mistral-window",
        "qwen2-sliding",
        "qwen3-sliding",
    ],
)
def test_saved_folders_load_in_transformers(name, tmp_path):
    reference = write_reference(name, tmp_path / "theirs")
    model = lcore.load_model(tmp_path / "theirs")
    model.save(tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    tokens = random_tokens(1, 30)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(back) is type(reference)
    assert back.dtype == torch.float32
    torch.testing.assert_close(reference_logits(back, tokens), reference_logits(reference, tokens), rtol=0, atol=1e-5)
    again = lcore.load_model(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_save_in_shards(tmp_path):
    model = Decoder(ModelConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2))
    save_model(model, tmp_path / "m", shard_bytes=20_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _ in model.named_parameters()}
    assert len(set(index["weight_map"].values())) > 1
    tokens = random_tokens(1, 8, vocab=50)
    assert torch.equal(logits(lcore.load_model(tmp_path / "m"), tokens), logits(model, tokens))


def test_save_never_leaves_half_a_folder(tmp_path, monkeypatch):
    model = Decoder(ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1))
    model.save(tmp_path / "m")
    kept = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError) as caught:
        model.save(tmp_path / "m")
    assert str(caught.value) == (
        "lcore.Decoder.save: path must not exist or be empty (overwrite=True replaces a saved model), "
        f"got {tmp_path / 'm'} with config.json, generation_config.json, model.safetensors"
    )

    def disk_full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lcore.models.saving.save_file", disk_full)
        for target in ("m", "new"):
            with pytest.raises(OSError, match="no space left"):
                model.save(tmp_path / target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == kept

    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save(tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != kept
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"path must hold only files of a saved model, got .* with thesis.tex$"):
        model.save(tmp_path / "m", overwrite=True)


def test_a_loaded_model_saves_over_its_own_files(tmp_path):
    write_reference("llama", tmp_path / "m")
    model = lcore.load_model(tmp_path / "m")
    tokens = random_tokens(1, 9)
    want = logits(model, tokens)
    model.save(tmp_path / "m", overwrite=True)
    assert torch.equal(logits(model, tokens), want)
    assert torch.equal(logits(lcore.load_model(tmp_path / "m"), tokens), want)


def test_end_ids_come_from_generation_config_first(tmp_path):
    write_reference("llama", tmp_path)
    edit_config(tmp_path, eos_token_id=5, bos_token_id=1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = lcore.load_model(tmp_path).config
    assert (config.eos_token_ids, config.bos_token_id) == ((7, 9), 1)
    (tmp_path / "generation_config.json").unlink()
    assert lcore.load_model(tmp_path).config.eos_token_ids == (5,)


def test_rope_by_layer_type_survives_saving(tmp_path):
    sliding = RopeConfig(rope_type="linear", theta=100.0, factor=2.0, max_position_embeddings=64)
    full = RopeConfig(theta=5000.0, max_position_embeddings=64)
    config = ModelConfig(
        model_type="qwen3", vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=1,
        sliding_window=(None, 4), rope=full, sliding_rope=sliding, max_position_embeddings=64,
    )  # fmt: skip
    model = Decoder(config)
    assert (config.layer_rope(0), config.layer_rope(1)) == (full, sliding)
    model.save(tmp_path / "m")
    again = lcore.load_model(tmp_path / "m")
    assert again.config == config
    tokens = random_tokens(1, 20, vocab=50)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
