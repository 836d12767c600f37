"""examples/hybrid: it learns, its caches continue what a full pass computes, and the evaluation writes its file."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

HYBRID = Path(__file__).resolve().parents[1] / "examples" / "hybrid"
NAMES = ("hybrid_model", "hybrid_start", "train_hybrid", "evaluate_hybrid")
KINDS = ("attention", "delta", "mamba2", "hybrid")


@pytest.fixture(scope="module")
def example():
    """The modules of the folder by name; their names are free again afterwards."""
    paths, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(HYBRID))
    modules = {name: importlib.import_module(name) for name in NAMES}
    yield modules
    sys.path[:] = paths
    for name in ("data", "train", "start", *modules):
        if name not in known:
            sys.modules.pop(name, None)


def small(example, kind):
    model = example["hybrid_model"]
    sizes = model.Sizes(vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=16)
    decoder = model.HybridDecoder(model.MODELS[kind], sizes)
    example["hybrid_start"].start_for_retrieval(decoder)
    return decoder


@pytest.mark.parametrize("kind", KINDS)
def test_caches_continue_what_a_full_pass_computes(example, kind, one_thread):
    model = small(example, kind)
    tokens = torch.randint(0, 64, (2, 150))
    with torch.no_grad():
        want = model(tokens)
        for cuts in ([150], [1, 64, 3, 1, 81]):
            cache = model.new_cache(2)
            got = torch.cat([model(part, cache) for part in tokens.split(cuts, dim=1)], dim=1)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        forgetful = model(tokens[:, 100:])
    assert (forgetful[:, 20:] - want[:, 120:]).abs().max() > 1e-2  # what a cache holds matters


@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_are_the_likeliest_of_a_full_pass(example, kind, one_thread):
    model = small(example, kind)
    tokens = torch.randint(0, 64, (2, 70))
    cache = model.new_cache(2)
    with torch.no_grad():
        example["hybrid_model"].read(model, cache, tokens[:, :40])
        fork = cache.fork()
        new = torch.stack(list(example["hybrid_model"].generate(model, fork, tokens[:, 40:], 6)), dim=1)
        whole = torch.cat([tokens, new], dim=1)
        assert torch.equal(model(whole)[:, 69:-1].argmax(-1), new)
        again = torch.stack(list(example["hybrid_model"].generate(model, cache, tokens[:, 40:], 6)), dim=1)
    assert torch.equal(again, new)  # the fork left the cache where it was


def test_bytes_of_pages_grow_and_those_of_states_do_not(example, one_thread):
    sizes = {}
    for kind in KINDS:
        model = small(example, kind)
        for length in (256, 1024):
            cache = model.new_cache()
            with torch.no_grad():
                model(torch.zeros(1, length, dtype=torch.int64), cache)
            sizes[kind, length] = cache.bytes()
            cache.close()
    for kind in ("delta", "mamba2"):
        assert sizes[kind, 256] == sizes[kind, 1024] and sizes[kind, 256][0] == 0
    a_token = 2 * 2 * 16 * 4  # keys and values of two heads of 16 in float32
    for kind, layers in (("attention", 3), ("hybrid", 1)):
        assert sizes[kind, 256][1] == sizes[kind, 1024][1]
        assert sizes[kind, 256][0] >= 256 * layers * a_token
        assert sizes[kind, 1024][0] >= 1024 * layers * a_token


def test_the_loss_falls_and_the_checkpoint_comes_back(example, tmp_path, one_thread):
    trainer, model = example["train_hybrid"], example["hybrid_model"]
    tokenizer, text = trainer.Tokenizer.from_folder(trainer.BUNDLED_MODEL), trainer.stdlib_text(50_000, split="train")
    windows = trainer.Windows(tokenizer.backend, text, seed=0, span=1 << 17)
    stage = trainer.Stage(steps=12, batch=2, window=128, needles=2, questions=2)
    batch = windows.batch(stage)
    trained = model.HybridDecoder(model.MODELS["hybrid"])
    example["hybrid_start"].start_for_retrieval(trained)
    loss = importlib.import_module("train").loss_of
    before = loss(trained, batch, torch.float32)[0].item()
    list(trainer.train(trained, windows, (stage,), 3e-3, torch.float32))
    assert loss(trained, batch, torch.float32)[0].item() < before - 1

    trained.save(tmp_path / "hybrid.safetensors")
    loaded = model.HybridDecoder.load(tmp_path / "hybrid.safetensors")
    assert loaded.mixers == trained.mixers
    for name, weight in trained.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.bfloat16().float()), name


def test_what_is_trained_is_evaluated_into_a_file(example, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(sys, "argv", ["train_hybrid.py", "--smoke", "--models", "delta,hybrid", "--out", str(tmp_path)])
    example["train_hybrid"].main()
    assert {file.name for file in tmp_path.iterdir()} == {"delta.safetensors", "hybrid.safetensors"}
    out, picture = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--lengths", "128,256", "--needles", "2", "--samples", "2", "--seconds", "0.01", "--json", str(out)]
    options += ["--loads", "1,3", "--load-length", "256"]
    if importlib.util.find_spec("matplotlib"):
        options += ["--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["evaluate_hybrid.py", "--folder", str(tmp_path), *options])
    example["evaluate_hybrid"].main()
    assert picture.exists() == ("--plot" in options)
    written = json.loads(out.read_text())
    assert written["machine"]["cpu_isa"] and written["peaks"]["fma_gflops"] > 0
    recall, speed = (
        [row for row in written["rows"] if row["kind"] == f"hybrid_{kind}"] for kind in ("recall", "speed")
    )
    assert [(row["tokens"], row["needles"]) for row in recall] == [(128, 2), (256, 2), (256, 1), (256, 3)]
    assert all(row["asked"] == 2 * row["needles"] for row in recall)
    assert all(0 <= share <= 1 for row in recall for share in row["recall"].values())
    assert len(speed) == 2
    for row in speed:
        for measure in ("read_tokens_per_s", "written_tokens_per_s", "state_bytes"):
            assert set(row[measure]) == {"delta", "hybrid"} and min(row[measure].values()) > 0
        assert row["page_bytes"]["delta"] == 0 < row["page_bytes"]["hybrid"]
