"""`lcore demo`: the document that it builds, what it asks, and what it reports."""

import re

import pytest
from tiny_model import byte_tokenizer, tiny_decoder, tiny_folder
from typer.testing import CliRunner

from lcore.cli import app
from lcore.demo import Answer, hide, report
from lcore.evaluation.haystack import Needle, make_needles, needle_sentence
from lcore.generation import Generator, Stats


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


def demo(*arguments):
    return CliRunner().invoke(app, ["demo", *(str(a) for a in arguments)])


def test_a_random_model_is_honestly_wrong(folder):
    result = demo("--model", folder, "--tokens", 3000, "--depths", "0,0.3,1")
    assert result.exit_code == 0, result.stderr
    out = result.stdout
    assert "reading 3,000 tokens of Python sources with 3 hidden needles" in out
    for needle, depth in zip(make_needles(3, seed=0), ("0%", "30%", "100%"), strict=True):
        assert re.search(rf"^ *{depth} +{needle.key} +{needle.value} .*wrong$", out, re.MULTILINE)
    assert "0 of 3 right" in out
    assert re.search(r"prefill [\d,]+ tokens/s \(3,000 tokens in [\d.]+ s\), decode [\d,]+ tokens/s \(\d+ tokens", out)
    cache_bytes, each = re.search(r"cache ([\d,]+) bytes \(([\d,]+) a token\), peak memory [\d,]+ MB", out).groups()
    per_token = 2 * 2 * 2 * 16 * 4  # K and V, layers, kv heads, head_dim, float32
    assert int(cache_bytes.replace(",", "")) >= 3000 * per_token
    assert int(each.replace(",", "")) >= per_token


def test_own_text_and_seed(folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a line of text\nand another\n" * 20)
    result = demo("--model", folder, "--tokens", 500, "--depths", "0.5", "--text", path, "--seed", 4)
    assert result.exit_code == 0, result.stderr
    assert f"reading 500 tokens of {path} with 1 hidden needle\n" in result.stdout
    assert make_needles(1, seed=4)[0].key in result.stdout


def test_the_document_holds_each_needle_at_its_depth():
    model = tiny_decoder()
    needles = make_needles(2, seed=1)
    ids = hide(model, "some line\n" * 200, 1500, needles, [0.25, 0.75])
    text = model.tokenizer.decode(ids)
    assert len(ids) == 1500
    for needle, depth in zip(needles, [0.25, 0.75], strict=True):
        assert abs(text.index(needle_sentence(needle)) - depth * 1500) < 80


def test_a_tokenizer_that_begins_texts_begins_the_document():
    class Begins:
        def encode(self, text, *, add_special_tokens):
            return [256] * add_special_tokens + byte_tokenizer().encode(text, add_special_tokens=False)

    model = tiny_decoder()
    model.tokenizer = Begins()
    ids = hide(model, "some line\n" * 20, 100, [], [])
    assert ids.count(256) == 1 and ids[0] == 256 and len(ids) == 100


def test_each_question_continues_the_document_alone(folder, monkeypatch):
    """One read of the document; then every question runs on a fork, so no question sees another."""
    calls = []
    original = Generator.stream

    def record(self, prompt, *arguments, **options):
        cache = options.get("cache")
        calls.append((prompt, None if cache is None else int(cache.seen()[0])))
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(Generator, "stream", record)
    assert demo("--model", folder, "--tokens", 600, "--depths", "0.2,0.6").exit_code == 0
    assert [held for _, held in calls] == [None, 600, 600]
    for (prompt, _), needle in zip(calls[1:], make_needles(2, seed=0), strict=True):
        assert needle.key in prompt


def test_the_report_counts_right_and_wrong():
    stats = Stats(10, 0.5, 4, 0.25, 1000, 5_000_000)
    read = Stats(2000, 4.0, 0, 0.0, 8000, 4_000_000)
    answers = [
        Answer(Needle("amber-fox", "1234"), 0.1, "1234.", stats),
        Answer(Needle("red-fox", "77"), 0.9, "", stats),
    ]
    assert report(answers, read) == [
        " depth  key         value  answer",
        "   10%  amber-fox    1234  1234.  right",
        "   90%  red-fox        77  (nothing)  wrong",
        "1 of 2 right",
        "prefill 500 tokens/s (2,000 tokens in 4.0 s), decode 16 tokens/s (8 tokens in 0.50 s)",
        "cache 8,000 bytes (4 a token), peak memory 5 MB",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--depths", "a"], 2, "--depths must be numbers with commas between them, got 'a'"),
        (["--depths", "0.5,1.5"], 1, "depths"),
        (["--tokens", "0"], 2, "Invalid value for '--tokens'"),
        (["--tokens", "20"], 1, "length"),
        (["--text", "/does/not/exist"], 2, "does not exist"),
        (["--tokens", "600", "--seed", "-1"], 2, "Invalid value for '-s'"),
    ],
)
def test_wrong_use_is_one_clear_error(folder, arguments, code, text):
    result = demo("--model", folder, *arguments)
    assert result.exit_code == code
    assert text in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
