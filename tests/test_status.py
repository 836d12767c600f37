"""README's table of kernels is made from result files and tests, and is up to date."""

import json

import pytest

from bench import status


def test_the_readme_is_up_to_date():
    text = status.README.read_text()
    assert status.page(text) == text, "run python -m bench.status"


def test_emulated_ops_are_found(monkeypatch, tmp_path):
    (tmp_path / "test_emulator_x.py").write_text(
        'OPS = ("a", "a_backward")\ndef test():\n    with cuda_kernels("b", architecture=90), cuda_kernels(*OPS):\n'
        "        pass\n"
    )
    monkeypatch.setattr(status, "TESTS", tmp_path)
    assert status.emulated() == {"a", "a_backward", "b"}


def write(path, machine, *rows):
    path.write_text(json.dumps({"bench": "x", "machine": machine, "rows": list(rows)}))


def test_the_newest_file_and_its_best_row_count(monkeypatch, tmp_path):
    monkeypatch.setattr(status, "RESULTS", tmp_path)
    monkeypatch.setattr(status, "emulated", lambda: {"ssd", "rope", "rope_backward"})
    cpu, gpu = {"date": "2030-01-02"}, {"date": "2030-01-03", "gpu": "NVIDIA H200"}
    row = {"kind": "attention", "gflops": 300.0}
    write(tmp_path / "2030-01-01-old.json", {"date": "2030-01-01"}, {**row, "gflops": 500.0})
    write(tmp_path / "2030-01-02-new.json", cpu, row, {**row, "gflops": 400.0}, {"kind": "memory"})
    ssd = {"kind": "gpu_ssd", "op": "ssd", "status": "ok", "tokens_per_s": 5.1e7}
    none = {**ssd, "op": "rope", "status": "no kernel", "tokens_per_s": None}
    write(tmp_path / "2030-01-03-gpu.json", gpu, ssd, none, {"kind": "gpu_tests", "status": "ok"})
    lines = {line.split(" | ")[0].strip("| `"): line for line in status.table().splitlines()}
    assert lines["attention"].startswith("| `attention` | 400 GFLOP/s, 2030-01-02 | – |")
    assert lines["ssd"].endswith("| tested | yes | 5.1e+07 tokens/s on NVIDIA H200, 2030-01-03 |")
    assert "| tested | forward and backward |" in lines["rope"] and "2030" not in lines["rope"]


def test_a_readme_without_marks():
    with pytest.raises(ValueError, match=r"bench\.status: README\.md has no"):
        status.page("nothing")
