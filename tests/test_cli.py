"""The command line: what it prints where, and how it fails."""

import json
import re
import subprocess
import sys

import pytest
import torch
from tiny_model import TEMPLATE, byte_tokenizer, tiny_decoder, tiny_folder
from typer.testing import CliRunner

import lcore
from lcore.cli import app, main
from lcore.evaluation.needle import BUNDLED_MODEL
from lcore.generation import Generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def run(folder):
    def invoke(*arguments, input=None):
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input)

    return invoke


def plain(text: str) -> str:
    """Without the frame that usage errors are drawn in."""
    return " ".join(text.replace("│", " ").split())


def text_of(folder, prompt, **options) -> str:
    return Generator(lcore.load_model(folder)).generate(prompt, **options).text


def test_generate_writes_text_to_stdout_and_rates_to_stderr(run, folder):
    result = run("generate", "--model", folder, "--prompt", "Once upon", "-n", 12)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == text_of(folder, "Once upon", max_new_tokens=12) + "\n"
    assert "read 9 tokens in" in result.stderr
    assert "wrote 12 in" in result.stderr
    assert "cache" in result.stderr and "peak memory" in result.stderr
    assert "ended by length" in result.stderr


def test_generate_passes_its_options_on(run, folder):
    options = {"temperature": 1.2, "top_k": 90, "top_p": 0.9, "min_p": 0.001, "seed": 3}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run("generate", "-m", folder, "-p", "abc", "-n", 20, *flags, "--prefill-chunk", 2, "--kv-format", "fp32")
    assert result.stdout == text_of(folder, "abc", max_new_tokens=20, **options) + "\n"
    other = run("generate", "-m", folder, "-p", "abc", "-n", 20, *flags[:-1], 4)
    assert other.stdout != result.stdout


def test_generate_keeps_what_a_policy_keeps(run, folder):
    prompt = "All work and no play makes Jack a dull boy. " * 5
    arguments = ["generate", "-m", folder, "-p", prompt, "-n", 20, "--prefill-chunk", 64]
    result = run(*arguments, "--policy", "snapkv:budget=40,window=8")
    generator = Generator(lcore.load_model(folder), prefill_chunk=64, policy=lcore.policies.SnapKV(40, window=8))
    assert result.stdout == generator.generate(prompt, max_new_tokens=20).text + "\n"
    assert result.stdout != run(*arguments).stdout


def test_generate_reads_files_and_stdin(run, folder, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("día\n", encoding="utf-8")
    want = text_of(folder, "día\n", max_new_tokens=5) + "\n"
    assert run("generate", "-m", folder, "-f", path, "-n", 5).stdout == want
    assert run("generate", "-m", folder, "-f", "-", "-n", 5, input="día\n").stdout == want


def test_generate_stops_at_stop_strings(run, folder):
    text = text_of(folder, "x", max_new_tokens=30)
    stop = text[10:13]
    result = run("generate", "-m", folder, "-p", "x", "-n", 30, "--stop", "never", "--stop", stop)
    assert result.stdout == text[: text.index(stop)] + "\n"
    assert "ended by stop" in result.stderr


def test_generate_uses_the_chat_template_unless_raw(run, tmp_path):
    folder = tiny_folder(tmp_path / "chat", tokenizer=byte_tokenizer(TEMPLATE))
    chat = text_of(folder, "<user>hi\n<bot>", max_new_tokens=8) + "\n"
    raw = text_of(folder, "hi", max_new_tokens=8) + "\n"
    assert run("generate", "-m", folder, "-p", "hi", "-n", 8).stdout == chat
    assert run("generate", "-m", folder, "-p", "hi", "-n", 8, "--chat").stdout == chat
    assert run("generate", "-m", folder, "-p", "hi", "-n", 8, "--raw").stdout == raw != chat


def test_generate_in_another_dtype(run, folder):
    result = run("generate", "-m", folder, "-p", "abc", "-n", 8, "--dtype", "bfloat16")
    model = lcore.load_model(folder, dtype=torch.bfloat16)
    assert result.stdout == Generator(model).generate("abc", max_new_tokens=8).text + "\n"


def test_generate_says_how_many_drafts_were_accepted(run):
    arguments = ["generate", "-m", BUNDLED_MODEL, "-p", "import os\n" * 5, "-n", 30]
    plain, drafting = run(*arguments), run(*arguments, "--speculate", "ngram")
    assert drafting.stdout == plain.stdout
    assert "drafted" not in plain.stderr
    accepted, drafted = map(int, re.search(r", (\d+) of (\d+) drafted tokens accepted, ", drafting.stderr).groups())
    assert 0 < accepted <= drafted < 60
    short = run(*arguments, "--speculate", "self")  # too short a context for this to draft
    assert (short.exit_code, short.stdout) == (0, plain.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "give --prompt, --prompt-file, or both"),
        (["-p", "a", "-c", "many"], 2, "--context must be a number of tokens or auto, got 'many'"),
        (["-p", "a", "-c", "0"], 1, "context must be 1 or more, got 0"),
        (["-p", ""], 1, "error: lcore.Generator: prompt must not be empty"),
        (["-f", "/does/not/exist"], 1, "No such file or directory: '/does/not/exist'"),
        (["-p", "a", "--temp", "-1"], 1, "error: lcore.Generator: temperature must be 0 or more, got -1.0"),
        (["-p", "a", "--top-p", "0"], 1, "error: lcore.Generator: top_p must be in (0, 1], got 0.0"),
        (["-p", "a", "-n", "x"], 2, "Invalid value for '-n'"),
        (["-p", "a", "-n", "1000000000000"], 1, "bytes are free"),
        (["-p", "a", "--dtype", "int8"], 2, "Invalid value for '--dtype'"),
        (["-p", "a", "--kv-format", "int3"], 1, "kv_format"),
        (["-p", "a", "--chat"], 1, "chat_template"),
        (["-p", "a", "--policy", "lru"], 1, "error: lcore.policies: policy must be one of adakv, cam, h2o"),
        (["-p", "a", "--policy", "h2o"], 1, "must be given a budget, as in h2o:budget=2048"),
        (["-p", "a", "--prefill-chunk", "0"], 1, "prefill_chunk must be 1 or more, got 0"),
    ],
)
def test_wrong_use_is_one_clear_error(run, folder, arguments, code, text):
    result = run("generate", "-m", folder, *arguments)
    assert result.exit_code == code
    assert text in plain(result.stderr)
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_prompt_that_is_not_text(run, folder, tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"abc\xff\xfe")
    result = run("generate", "-m", folder, "-f", path)
    assert result.exit_code == 1
    assert "--prompt-file must be UTF-8 text" in result.stderr


def test_folders_that_are_no_model(run, tmp_path):
    result = run("generate", "-m", tmp_path / "none", "-p", "a")
    assert result.exit_code == 2 and "does not exist" in plain(result.stderr)
    result = run("generate", "-m", tmp_path, "-p", "a")
    assert result.exit_code == 1 and "config.json" in result.stderr
    tiny_decoder(tokenizer=None).save(tmp_path / "silent")
    result = run("generate", "-m", tmp_path / "silent", "-p", "a")
    assert result.exit_code == 1 and "tokenizer.json" in result.stderr


def test_ctrl_c_ends_quietly(run, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lcore.models.Decoder.forward", interrupted)
    result = run("generate", "-m", folder, "-p", "a")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr and "Traceback" not in result.output


def test_a_long_context_is_a_warning_in_one_line(run, tmp_path):
    folder = tiny_folder(tmp_path / "short", max_position_embeddings=8)
    result = run("generate", "-m", folder, "-p", "abcdef", "-n", 4)
    assert result.exit_code == 0
    warning = "warning: lcore.Generator: prompt + max_new_tokens is 10 tokens, the model was made for 8"
    assert result.stderr.startswith(warning)


def test_info_says_what_runs_where(run):
    facts = lcore.build_info()
    result = run("info")
    assert result.exit_code == 0
    assert f"lcore {facts['version']}, torch {torch.__version__}" in result.stdout
    assert facts["cpu_isa"] in result.stdout
    assert all(op in result.stdout for op in facts["ops"])
    assert json.loads(run("info", "--json").stdout) == json.loads(json.dumps(facts))


def test_eval_needle_passes_its_options_on(run, folder):
    result = run("eval", "needle", "--model", folder, "--lengths", 600, "--samples", 1, "--needles", 2)
    assert result.exit_code == 0, result.output
    assert "600 tokens" in result.stdout and "needles found" in result.stdout
    assert "--lengths" in run("eval", "needle", "--help").stdout
    assert run("eval", "needle", "--samples", "x").exit_code == 2
    failed = run("eval", "needle", "--model", folder, "--lengths", 10)
    assert failed.exit_code == 1 and failed.stderr.startswith("error: ")


def test_no_command_shows_help(run):
    result = run()
    assert all(command in result.output for command in ("generate", "plan", "info", "demo", "eval"))


def test_a_reader_that_leaves_ends_the_command_quietly(folder):
    command = f"{sys.executable} -m lcore generate -m {folder} -p a -n 3000 | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, encoding="utf-8", check=False)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_python_m_lcore_is_the_command(folder):
    command = [sys.executable, "-m", "lcore", "generate", "-m", str(folder), "-f", "-", "-n", "4", "-t", "1"]
    result = subprocess.run(command, input="día", capture_output=True, text=True, encoding="utf-8", check=True)
    assert result.stdout == text_of(folder, "día", max_new_tokens=4) + "\n"
    assert result.stderr.startswith("read 4 tokens in ")
    failed = subprocess.run([*command[:6], "-p", ""], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr == "error: lcore.Generator: prompt must not be empty, got ''\n"
    assert callable(main)
