"""`lcore generate --session`: the same text from a file that another run has left."""

import os
import re
import signal
import subprocess
import sys

import pytest
from tiny_model import byte_tokenizer, tiny_folder
from typer.testing import CliRunner

from lcore.cache import StoredSession
from lcore.cli import app
from lcore.evaluation.needle import BUNDLED_MODEL

PROMPT = "One ring to rule them all, one ring to find them,"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.session"


def tokens_of(path) -> list[int]:
    with StoredSession(path) as stored:
        return stored.tokens[0].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_goes_on_where_it_stopped(folder, path, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text(PROMPT)
    first = run("generate", "-m", folder, "--session", path, "-f", text, "-n", 0)
    assert first.exit_code == 0 and first.stdout == "\n", first.output
    second = run("generate", "-m", folder, "--session", path, "-f", text, "-p", " And?", "-n", 12)
    assert second.stdout == run("generate", "-m", folder, "-p", PROMPT + " And?", "-n", 12).stdout
    assert "read 5 tokens in" in second.stderr and f"kept {len(PROMPT)} tokens" in second.stderr
    third = run("generate", "-m", folder, "--session", path, "-f", text, "-p", " But?", "-n", 4, "--kv-format", "bf16")
    assert third.exit_code == 1 and third.stderr.startswith("error: lcore.Generator: cache.kv_format must be ")


def test_two_programs_on_one_session_file(folder, path):
    command = [sys.executable, "-m", "lcore", "generate", "-m", folder, "--session", path, "-t", "1"]
    command = [str(part) for part in command]
    pipe = subprocess.PIPE
    first = subprocess.Popen([*command, "-p", "abc", "-n", "1000000"], stdout=pipe, stderr=pipe)
    try:
        first.stdout.read(1)  # it is writing
        second = subprocess.run([*command, "-p", "abc"], capture_output=True, text=True, check=False)
        assert second.returncode == 1 and second.stdout == ""
        assert re.match(r"error: lcore.Generator: path must be .* that no other process or thread", second.stderr)
        assert not path.exists()
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130
    finally:
        first.kill()
        first.communicate()
    assert tokens_of(path)[:3] == byte_tokenizer().encode("abc") and os.listdir(path.parent) == ["a.session"]


def test_the_bundled_model_answers_from_a_session(path, tmp_path):
    """A document that ends in the middle of a line, so that the question changes the document's last token."""
    text = tmp_path / "code.py"
    text.write_text("".join(f"value_{i} = {i * 37 % 101}\n" for i in range(60)) + "# the e")
    arguments = ["generate", "-m", BUNDLED_MODEL, "-f", text, "-n", 6]
    question = "nd\nvalue_7 = "
    want = run(*arguments, "-p", question)
    assert run(*arguments[:-1], 0, "--session", path).exit_code == 0
    resumed = run(*arguments, "-p", question, "--session", path)
    assert resumed.stdout == want.stdout, resumed.output
    kept = int(re.search(r"kept ([\d,]+) tokens", resumed.stderr)[1].replace(",", ""))
    assert kept > 300
