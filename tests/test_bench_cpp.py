"""The standalone benchmarks build without torch and leave the same rows as the Python ones."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench import decode
from bench.attention import Settings, measure
from bench.shapes import Shape
from bench.tables import markdown

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench-cpp"  # as `make bench-cpp`, so that only what has changed is built
PEAKS = {"fma_gflops": 100.0, "dot_bf16_gflops": 0.0, "read_gbytes": 20.0}
SMALL = ["--head-dim", "32", "--heads", "4", "--kv-heads", "2", "--benchmark_min_time=0.01"]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LCORE_NUM_THREADS": "2"}
    command = [str(BUILD / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    configured = subprocess.run(
        [cmake, "-S", ROOT / "bench" / "cpp", "-B", BUILD], capture_output=True, text=True, check=False
    )
    if "libbenchmark-dev" in configured.stderr:
        pytest.skip("Google Benchmark is not installed")
    assert configured.returncode == 0, configured.stderr
    done = subprocess.run([cmake, "--build", BUILD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def rows_of(name: str, path: Path, *arguments: str) -> list[dict]:
    done = run(name, *SMALL, "--json", str(path), "--commit", "0123456789ab", *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    content = json.loads(path.read_text())
    assert list(content) == ["bench", "machine", "peaks", "rows"]
    assert content["bench"] == name
    assert content["machine"]["commit"] == "0123456789ab"
    assert content["machine"]["threads"] == 2
    assert set(content["peaks"]) == set(PEAKS)
    assert markdown(content).count("\n|") == len(content["rows"]) + 2
    for row in content["rows"]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    return content["rows"]


def test_attention_rows_are_those_of_python(tmp_path):
    options = ["--seq", "100,150", "--dtype", "fp32,bf16,fp16", "--batch", "2", "--packed", "--window", "40"]
    rows = rows_of("attention", tmp_path / "rows.json", *options)
    assert [row["pass"] for row in rows] == ["forward"] * 6 + ["backward"] * 6
    shape = Shape("backward", "fp16", 150, 32, batch=2, packed=True, heads=4, kv_heads=2, window=40)
    twin = measure(shape, Settings(PEAKS, flex=False, torch_seq=0, seconds=0))
    assert list(twin) == list(rows[-1])
    assert shape.fields().items() <= rows[-1].items()
    assert rows[-1]["gflops"] == pytest.approx(shape.flops() / rows[-1]["ms"] / 1e6, rel=1e-6)


def test_decode_rows_are_those_of_python(tmp_path):
    options = ["--tokens", "300", "--new-tokens", "1,3", "--kv-format", "fp16"]
    rows = rows_of("decode", tmp_path / "rows.json", *options)
    assert [(row["paged"], row["new_tokens"]) for row in rows] == [(True, 1), (True, 3), (False, 1)]
    _, twin = decode.measure(decode.Geometry(4, 2, 32), "fp16", 300, [1, 3], 0)
    assert list(twin) == list(rows[1])
    for key in ("kind", "kv_format", "batch", "tokens", "new_tokens", "heads", "kv_heads", "head_dim"):
        assert rows[1][key] == twin[key]
    assert rows[1]["gbytes_per_s"] == pytest.approx(300 * 2 * 32 * 2 * 2 / rows[1]["ms"] / 1e6, rel=1e-6)


def test_without_a_gpu_cuda_is_one_clear_line():
    if shutil.which("nvcc") is None or torch.cuda.is_available():
        pytest.skip("nvcc is not installed, or there is a GPU")
    target = ["--target", "cuda_benchmarks"]
    done = subprocess.run(["cmake", "--build", BUILD, *target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("merge_states_cuda")
    assert done.returncode == 2
    assert "lcore: cudaGetDeviceProperties failed: cudaError" in done.stderr.splitlines()[-1]


def test_a_wrong_flag_is_one_clear_line():
    done = run("attention", "--sequence", "100")
    assert done.returncode == 2
    assert "--sequence is none of" in done.stderr.splitlines()[-1]


def test_no_torch_is_linked():
    needed = subprocess.run(["readelf", "-d", BUILD / "attention"], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed and "python" not in needed
