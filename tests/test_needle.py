"""The bundled model, the documents it is asked about, and the script that trained it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lcore
from lcore.evaluation.haystack import (
    Needle,
    build_haystack,
    even_depths,
    is_correct,
    make_needles,
    needle_sentence,
    question,
    stdlib_files,
    stdlib_text,
)
from lcore.evaluation.needle import BUNDLED_MODEL, ask, right_share

TRAIN = Path(__file__).resolve().parents[1] / "examples" / "needle" / "train.py"


@pytest.fixture(scope="module")
def model():
    return lcore.load_model(BUNDLED_MODEL)


def test_documents_have_the_length_asked_for_and_every_needle_at_its_depth(model):
    needles, depths = make_needles(5, seed=3), even_depths(5)
    tokenizer = model.tokenizer

    def encode(line):
        return tokenizer.encode(line, add_special_tokens=False)

    document = build_haystack(encode, stdlib_text(40_000), 3000, needles, depths)
    text = tokenizer.decode(document)
    assert len(document) == 3000
    places = [text.index(needle_sentence(needle)) / len(text) for needle in needles]
    assert places == sorted(places)
    assert all(abs(place - depth) < 0.05 for place, depth in zip(places, depths, strict=True))
    again = build_haystack(encode, stdlib_text(40_000), 3000, needles, depths)
    assert again == document


def test_training_and_evaluation_read_different_files():
    train, held_out = set(stdlib_files("train")), set(stdlib_files("eval"))
    assert train and held_out and not train & held_out


def test_answers_are_compared_whole():
    needle = Needle("amber-falcon", "4821")
    assert is_correct(needle, " 4821.\n") and is_correct(needle, "4821")
    assert not is_correct(needle, " 48213.") and not is_correct(needle, " 482") and not is_correct(needle, "")


def test_the_bundled_model_finds_needles_beyond_its_training_windows(model):
    answers = list(ask(model, stdlib_text(), 6000, 12, sample=7))
    assert [answer.depth for answer in answers] == even_depths(12)
    assert right_share(answers) >= 0.9


def test_an_unanswerable_question_is_not_answered_right(model):
    needle = Needle("amber-falcon", "4821")
    document = build_haystack(
        lambda line: model.tokenizer.encode(line, add_special_tokens=False), stdlib_text(40_000), 1000, [], []
    )
    prompt = document + model.tokenizer.encode(question(needle), add_special_tokens=False)
    assert not is_correct(needle, lcore.Generator(model).generate(prompt, 8).text)


def test_transformers_reads_the_bundled_folder(model):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    tokens = torch.tensor([model.tokenizer.encode(stdlib_text(3000))])
    ours = lcore.load_model(BUNDLED_MODEL, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=5e-3)


def test_the_folder_is_small_and_readable():
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) <= 8e6
    assert all(file.stat().st_mode & 0o044 for file in BUNDLED_MODEL.iterdir())


def test_the_training_script_writes_a_folder_that_loads(tmp_path):
    out = tmp_path / "model"
    run = subprocess.run(
        [sys.executable, TRAIN, "--smoke", "--threads", "1", "--out", out], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert lcore.load_model(out)(torch.tensor([[1, 2, 3]])).shape == (1, 3, 2048)
