"""The benchmarks' own logic, and that both run and leave rows that can be read."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lcore
from bench import plot, tables, torch_peers
from bench.attention import Settings, measure
from bench.check import Checker
from bench.machine import ceiling
from bench.memory import forward_bytes
from bench.shapes import Shape, full_set, packed_pair, window_pair
from bench.torch_peers import sdpa

ROOT = Path(__file__).resolve().parents[1]
PEAKS = {"fma_gflops": 100.0, "dot_bf16_gflops": 0.0, "read_gbytes": 20.0}


def run(bench: str, tmp_path: Path, *arguments: str) -> dict:
    path = tmp_path / f"{bench}.json"
    command = [sys.executable, "-m", f"bench.{bench}", "--seconds", "0", "--json", str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert list(content) == ["bench", "machine", "peaks", "rows"]
    assert content["bench"] == bench
    for row in content["rows"]:
        for key, value in row.items():
            assert not isinstance(value, float) or (math.isfinite(value) and value >= 0), (key, value)
    assert content["peaks"]["fma_gflops"] > 0 and content["peaks"]["read_gbytes"] > 0
    headers, *lines = tables.markdown(content).splitlines()[2:]
    assert headers.count("|") > 5 and all(line.count("|") == headers.count("|") for line in lines[: len(lines) // 2])
    return content


def test_attention_runs(tmp_path):
    shape = ["--seq", "150", "--head-dim", "32", "--heads", "4", "--kv-heads", "2", "--dtype", "bf16"]
    content = run("attention", tmp_path, *shape)
    forward, backward = content["rows"]
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    pairs = 4 * 150 * 151 // 2
    for row, flops in ((forward, 4 * pairs * 32), (backward, 10 * pairs * 32)):
        name = ceiling(content["peaks"], "bf16")
        assert row["gflops"] == pytest.approx(flops / row["ms"] / 1e6)
        assert (row["ceiling"], row["of_peak"]) == (name, pytest.approx(row["gflops"] / row["peak_gflops"]))
        assert row["torch_gqa"] in ("enable_gqa", "expanded")
        assert row["speedup"] == pytest.approx(row["gflops"] / row["torch_gflops"])
        assert row["flex_speedup"] is row["flex_error"] is None


def test_decode_runs(tmp_path):
    shape = ["--tokens", "300", "--head-dim", "32", "--heads", "4", "--kv-heads", "2", "--kv-format", "fp16"]
    content = run("decode", tmp_path, *shape, "--new-tokens", "1", "3", "--chunk", "20")
    *rows, prefill = content["rows"]
    assert [row["new_tokens"] for row in rows] == [1, 3]
    for row in rows:
        assert row["gbytes_per_s"] == pytest.approx(300 * 2 * 32 * 2 * 2 / row["ms"] / 1e6)
        assert row["tokens_per_s"] == pytest.approx(row["new_tokens"] / row["ms"] * 1e3)
        assert row["speedup_packed"] == pytest.approx(row["torch_packed_ms"] / row["ms"])
    assert prefill["kind"] == "ratio" and prefill["name"].startswith("time, a chunk of 20 at 300 tokens")


def test_key_mass_runs(tmp_path):
    shape = ["--keys", "300", "--head-dim", "32", "--heads", "4", "--kv-heads", "2", "--dtype", "bf16"]
    content = run("key_mass", tmp_path, *shape, "--queries", "300", "1")
    for row, pairs in zip(content["rows"], (300 * 301 // 2, 300), strict=True):
        assert row["gflops"] == pytest.approx(2 * pairs * 4 * 32 / row["ms"] / 1e6)
        assert row["speedup"] == pytest.approx(row["torch_ms"] / row["ms"])
        assert row["gbytes_per_s"] == pytest.approx(300 * 2 * 32 * 2 / row["ms"] / 1e6)


def test_page_bounds_runs(tmp_path):
    shape = ["--tokens", "320", "--head-dim", "32", "--heads", "4", "--kv-heads", "2", "--page-size", "16"]
    bounds, scores = run("page_bounds", tmp_path, *shape)["rows"]
    for row, values in ((bounds, 320), (scores, 2 * 20)):
        assert row["gbytes_per_s"] == pytest.approx(values * 2 * 32 * 2 / row["ms"] / 1e6)
        assert row["of_dense"] == pytest.approx(row["ms"] / row["dense_ms"])


@pytest.mark.skipif(sys.platform != "linux", reason="overflow needs Linux")
def test_placement_runs(tmp_path):
    shape = ["--tokens", "640", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"]
    rows = run("placement", tmp_path, *shape, "--selected", "128", "--reuse", "0", "1", "--disk-mbytes", "16")["rows"]
    assert [(row["what"], row["reuse"]) for row in rows] == [
        ("append", None), ("all", None), ("selected", 0.0), ("selected", 1.0),
    ]  # fmt: skip
    for row in rows:
        assert row["content_mbytes"] == pytest.approx(640 * 2 * 2 * 64 * 4 / 1e6)
        assert row["max_mbytes"] == pytest.approx(row["content_mbytes"] / 4)
        assert row["of_memory"] == pytest.approx(row["memory_ms"] / row["ms"])
        assert row["of_disk"] == pytest.approx(row["fetched_mbytes"] / row["ms"] / row["disk_gbytes"])


def test_linear_attention_runs(tmp_path):
    shape = ["--tokens", "128", "--heads", "2", "--key-dim", "16", "--value-dim", "8", "--op", "gla", "delta channel"]
    rows = run("linear_attention", tmp_path, *shape, "--pass", "forward", "backward", "step")["rows"]
    assert [(row["which"], row["op"]) for row in rows[:2]] == [("forward", "gla"), ("forward", "delta channel")]
    pairs, states = 64 * 65 // 2 * (16 + 8), 64 * 16 * 8
    for row, a_chunk in zip(rows, (pairs + 2 * states, 2 * pairs + 3 * states) * 2, strict=False):
        times = 2 * 2 * 2 * (2 if row["which"] == "backward" else 1)  # multiply and add, two heads, two chunks
        assert row["gflops"] == pytest.approx(times * a_chunk / row["ms"] / 1e6)
        assert row["speedup"] == pytest.approx(row["chunked_ms"] / row["ms"])
    for row in rows[4:]:
        assert row["gbytes_per_s"] == pytest.approx(2 * 4 * 128 * 2 * 16 * 8 / row["ms"] / 1e6)


def test_speculation_runs(tmp_path):
    shape = ["--layers", "1", "--hidden", "64", "--tokens", "400", "--long-tokens", "150", "--window", "32"]
    content = run("speculation", tmp_path, *shape, "--new-tokens", "20", "--texts", "phrases", "code", "--threads", "1")
    rows = content["rows"]
    assert [(row["method"], row["text"]) for row in rows] == [
        (method, text) for method in ("ngram", "self") for text in ("phrases", "code")
    ]
    assert [(row["tokens"], row["layers"]) for row in rows] == [(400, 1), (400, 3), (150, 1), (150, 3)]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["tokens_per_s"] / row["plain_tokens_per_s"])
        assert row["acceptance"] is None or row["acceptance"] == pytest.approx(row["accepted"] / row["drafted"])
    assert rows[0]["accepted"] > 0


def test_recurrent_runs(tmp_path):
    shape = ["--len", "70", "--dim", "24", "--states", "4", "8", "--dtype", "bf16", "--peer-len", "20"]
    content = run("recurrent", tmp_path, *shape)
    scans = [row for row in content["rows"] if row["kind"] == "selective_scan"]
    assert [(row["states"], row["layout"], row["pass"]) for row in scans] == list(
        itertools.product((4, 8), ("dim, len", "len, dim"), ("forward", "backward"))
    )
    for row in scans:
        assert row["melements_per_s"] == pytest.approx(24 * 70 / row["ms"] / 1e3)
        assert row["speedup_loop"] == pytest.approx(row["melements_per_s"] / row["loop_melements"])
    for row in content["rows"][8:]:
        bytes_moved = 2 * 24 * 70 * 2 if row["kind"] == "causal_conv1d" else 2 * 16 * 24 * row["states"] * 4
        assert row["gbytes_per_s"] == pytest.approx(bytes_moved / row["ms"] / 1e6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 0, 5, 100])
def test_only_allowed_pairs_count(causal, window):
    shape = Shape("forward", "fp32", 37, 8, batch=2, heads=3, kv_heads=3, causal=causal, window=window)
    distance = torch.arange(37)[:, None] - torch.arange(37)
    side = 37 if window is None else window
    visible = (distance <= side) & (distance >= (0 if causal else -side))
    assert shape.pairs() == visible.sum().item() * 3 * 2


@pytest.mark.parametrize("window", [None, 5])
def test_torch_is_asked_the_same(window):
    shape = Shape("forward", "fp32", 37, 8, batch=2, heads=4, kv_heads=2, window=window)
    q, k, v, _ = shape.inputs()
    for call in sdpa(shape).values():
        theirs = call(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        torch.testing.assert_close(shape.attention(q, k, v), theirs)


def test_packed_sequences_are_the_batch():
    shape = Shape("forward", "fp32", 37, 8, batch=2, packed=True, heads=4, kv_heads=2)
    q, k, v, _ = shape.inputs()
    packed = shape.attention(*(shape.ours(x) for x in (q, k, v)))
    assert torch.equal(packed.reshape(q.shape), lcore.attention(q, k, v, causal=True))


@pytest.mark.parametrize("wrong", [None, "out", "dq", "dk", "dv"])
def test_a_wrong_result_gets_no_time(wrong):
    q, k, v, dout = Shape("backward", "fp32", 37, 8, heads=4, kv_heads=2).inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = lcore.attention(*leaves, causal=True, return_lse=True)
    grads = torch.autograd.grad(out, leaves, dout)
    results = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    if wrong:
        results[wrong][0, -1, -1, 3] += 0.1
    checker = Checker(q.detach(), k.detach(), v.detach(), (37, 0))

    def check() -> None:
        checker.forward(results["out"])
        checker.backward(results["out"], lse.detach(), dout, (results["dq"], results["dk"], results["dv"]))

    if wrong is None:
        return check()
    with pytest.raises(AssertionError, match=f"{wrong} of .* is wrong"):
        check()


def test_what_flex_attention_cannot_do_is_a_reason_not_a_crash(monkeypatch):
    def refuses(shape: Shape) -> None:
        raise NotImplementedError("no compiler here\nand more")

    monkeypatch.setattr(torch_peers, "flex", refuses)
    shape = Shape("forward", "fp32", 37, 8, heads=2, kv_heads=2)
    row = measure(shape, Settings(PEAKS, flex=True, torch_seq=0, seconds=0))
    assert (row["flex_speedup"], row["flex_error"]) == (None, "NotImplementedError: no compiler here")
    assert row["torch_gflops"] is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark here")
def test_memory_of_a_forward_does_not_grow_with_the_square_of_the_length():
    ours = forward_bytes(Shape("forward", "bf16", 8192, 64, heads=2, kv_heads=2))
    assert ours is not None and ours < 8192 * 8192
    masked = forward_bytes(Shape("forward", "bf16", 4096, 64, heads=2, kv_heads=2, window=4096), peer=True)
    assert masked is not None and masked > 0  # the measurement sees what there is to see


def test_bf16_is_held_to_the_dot_product_peak_where_there_is_one():
    assert ceiling(PEAKS, "bf16") == ceiling(PEAKS, "fp32") == "fma"
    faster = PEAKS | {"dot_bf16_gflops": 190.0}
    assert ceiling(faster, "bf16") == "dot_bf16"
    assert ceiling(faster, "fp16") == "fma"


def test_the_published_set_has_the_pairs_that_ratios_need():
    shapes = full_set()
    assert len(set(shapes)) == len(shapes)
    assert {*window_pair(), *packed_pair()} <= set(shapes)


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"lcore\[bench\]"):
        plot.require()


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"kind": "attention", **Shape("forward", "bf16", 128, 64).fields(), "gflops": 50.0, "torch_gflops": None}
    longer = row | {"seq": 256, "torch_gflops": 30.0}
    content = {"machine": {"processor": "a processor"}, "peaks": PEAKS, "rows": [row, longer]}
    plot.draw_attention(content, str(tmp_path / "attention.png"))
    row = {"kind": "decode", "kv_format": "bf16", "tokens": 4096, "new_tokens": 1, "gbytes_per_s": 10.0}
    plot.draw_decode(content | {"rows": [row | {"speedup_packed": 2.0}]}, str(tmp_path / "decode.png"))
    for name in ("attention", "decode"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
