"""The run on a GPU, driven on the CPU: every part at a small size, the result file, and what resumes."""

import json
import subprocess

import pytest
import torch

from bench.gpu import checks, run
from bench.gpu.__main__ import main
from bench.gpu.device import Cpu
from bench.gpu.measure import measured, rate
from bench.gpu.run import PARTS, Results, here, run_parts
from bench.gpu.tables import markdown

FIGURES = ["merge_states", "attention_forward", "attention_backward", "decode", "scan", "ssd", "conv1d", "linear"]


def fake_clock(calls):
    """Calls everything once; each call takes a second more than the one before."""
    for call in calls.values():
        call()
    return {name: float(i) for i, name in enumerate(calls, 1)}


@pytest.fixture
def device():
    return Cpu(fake_clock)


@pytest.fixture
def results(tmp_path, device):
    return Results(tmp_path / "gpu.json", device)


def run_quietly(parts, results, device, **options):
    said = []
    well = run_parts(parts, results, device, runner=options.pop("runner", here), say=said.append, **options)
    return well, said


@pytest.mark.parametrize("part", ["ceilings", *FIGURES])
def test_a_part(part, results, device):
    well, said = run_quietly([part], results, device)
    assert well, results.content["parts"][part]
    content = json.loads(results.path.read_text())
    rows = content["rows"]
    assert rows and all(row["part"] == part for row in rows)
    for row in rows:
        assert row["status"] == "ok", row
        if part != "ceilings":
            assert row["seconds"] == 1 and row["op"]
    assert {"commit", "torch", "gpu", "date"} <= content["machine"].keys()
    assert said == [f"{part}: done, {len(rows)} rows, {content['parts'][part]['seconds']:.0f} s"]


def test_a_part_that_is_done_is_not_run_again(results, device):
    assert run_quietly(["ceilings", "conv1d"], results, device)[0]
    before = results.path.read_text()

    def never(*unused):
        raise AssertionError

    again = Results(results.path, device)
    assert run_quietly(["ceilings", "conv1d"], again, device, runner=never) == (
        True, ["ceilings: done before", "conv1d: done before"],
    )  # fmt: skip
    assert results.path.read_text() == before
    assert again.peaks["copy_gbytes"] > 0
    again.commit = "another"  # figures of another commit are not this one's
    assert run_quietly(["conv1d"], again, device)[1] == ["conv1d: done, 1 rows, 0 s"]
    assert [row["part"] for row in again.content["rows"]] == ["ceilings", "conv1d"]


@pytest.mark.parametrize("error", [ValueError("broken"), subprocess.TimeoutExpired("part", 480)])
def test_a_part_that_fails_is_run_again(error, results, device):
    def fails(*unused):
        raise error

    well, said = run_quietly(["scan", "ceilings"], results, device, runner=fails, limit=480)
    assert not well and [line.split(",")[0] for line in said] == ["scan: failed", "ceilings: failed"]
    assert ("broken" if isinstance(error, ValueError) else "more than 480 s") in results.content["parts"]["scan"][
        "error"
    ]
    assert run_quietly(["scan"], results, device)[0]


def test_no_kernel_is_a_row(monkeypatch, results, device):
    def missing(*unused, **options):
        raise NotImplementedError("Could not run 'lcore::ssd' with arguments from the 'CUDA' backend.\nMore words")

    monkeypatch.setattr("lcore.ssd", missing)
    assert run_quietly(["ssd"], results, device)[0]
    (row,) = results.content["rows"]
    assert row["status"] == "no kernel" and row["seconds"] is None and row["tokens_per_s"] is None
    assert row["reason"] == "NotImplementedError: Could not run 'lcore::ssd' with arguments from the 'CUDA' backend."


def test_a_wrong_kernel_gets_no_time(monkeypatch, results, device):
    monkeypatch.setattr("lcore.ssd", lambda x, *unused: x)
    assert not run_quietly(["ssd"], results, device)[0]
    (row,) = results.content["rows"]
    assert row["status"] == "wrong" and row["seconds"] is None
    assert not results.done("ssd")


def test_rows_beside_peers(device):
    def missing():
        import a_package_that_is_not_there  # noqa: F401

    row = measured({"kind": "x"}, device, lambda: lambda: None, {"one": lambda: lambda: None, "two": missing})
    assert (row["seconds"], row["peers"], row["speedup"]) == (1, {"one": 2}, 2)
    assert row["errors"]["two"].startswith("ModuleNotFoundError: No module named")
    row = rate(row, "tflops", 100, 400)
    assert (row["tflops"], row["peer_tflops"], row["of_peak"]) == (100, 50, 0.25)


def test_results_of_another_gpu_are_not_mixed(results, device):
    run_quietly(["ceilings"], results, device)
    content = json.loads(results.path.read_text())
    content["machine"]["gpu"] = "another"
    results.path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is of another, this is none"):
        Results(results.path, device)


def test_the_command_in_processes_of_their_own(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert main(["ceilings", "--device", "cpu", "--out", str(path)]) == 0
    assert json.loads(path.read_text())["parts"]["ceilings"]["status"] == "done"
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "no part nothing; there are ceilings, tests" in capsys.readouterr().err


def test_the_sanitizer_is_asked_for_errors(monkeypatch, device):
    asked = []

    def done(command, **unused):
        asked.append(command)
        return subprocess.CompletedProcess(command, 77, "one\n1 failed, 2 passed, 3 skipped in 1s\n", "")

    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(checks.subprocess, "run", done)
    (row,) = PARTS["memcheck"](device, {})
    assert row["status"] == "found errors" and row["tool"] == "memcheck"
    assert asked[0][:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"] and "gpu" in asked[0]
    (row,) = PARTS["tests"](device, {})
    assert (row["status"], row["passed"], row["failed"], row["skipped"]) == ("failed", 2, 1, 3)


def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="torch sees no GPU; --device cpu goes through the parts on small sizes"):
        main([])


def test_every_part_has_a_place():
    assert set(PARTS) == {"ceilings", "tests", "memcheck", "racecheck", *FIGURES}
    assert next(iter(PARTS)) == "ceilings" and run.LIMIT <= 480


def test_what_breaks_is_a_row_too(monkeypatch, results, device):
    def breaks(*unused, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand much more")

    monkeypatch.setattr("lcore.merge_states", breaks)
    assert not run_quietly(["merge_states"], results, device)[0]
    (row,) = results.content["rows"]
    assert row["status"] == "failed" and row["reason"].endswith("illegal memory access was encountered")
    assert row["peers"]["torch"] == 1


def test_tests_that_all_skip_are_no_success(monkeypatch, results, device):
    monkeypatch.setattr(checks, "pytest", lambda *options, before=(): (0, "s\n80 skipped in 1s"))
    assert not run_quietly(["tests"], results, device)[0]
    assert results.content["rows"][0]["status"] == "none ran"


def test_tables(results, device):
    def fails(*unused):
        raise ValueError("broken")

    run_quietly(["ceilings", "conv1d"], results, device)
    run_quietly(["scan"], results, device, runner=fails)
    lines = markdown(results.content).splitlines()
    assert lines[0].startswith("none; copy ")
    assert "**conv1d**: done, 0 s" in lines and "ValueError: broken" in lines
    header = next(line for line in lines if "torch µs" in line)
    assert header.startswith(
        "| dtype | batch | dim | len | status | speedup | gbytes_per_s | peer_gbytes_per_s | of_peak"
    )
    values = lines[lines.index(header) + 2].split(" | ")
    assert values[:5] == ["| bf16", "1", "8", "64", "ok"] and values[-2:] == ["1e+06", "2e+06 |"]
