"""The cases that have broken other attention kernels: sizes, extreme scores, special values, threads, dirty memory."""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from attention_cases import FLOATS, HALVES, check_backward, check_forward, gradients, lcore_with_lse, random_qkv
from cache_cases import NAME_OF
from tolerance import assert_same_bits

import lcore

SPAN = 4096
MANY = 80_000  # sequences: more than 16 bits count


@pytest.mark.parametrize("head_dim", [32, 72, 96, 112, 160, 224])
@pytest.mark.parametrize("dtype", FLOATS)
def test_more_head_dims(head_dim, dtype):
    """With test_attention_forward.HEAD_DIMS, all that models in use have."""
    q, k, v = random_qkv(67, 131, head_dim=head_dim, dtype=dtype)
    check_forward(q, k, v, causal=True)
    check_forward(q[:, -2:], k, v, causal=True)
    check_backward(q, k, v, causal=True)


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window_size": (SPAN + 20, 3)}, {"window_size": (9, 0)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_over_several_spans_of_keys(dtype, arguments):
    check_backward(*random_qkv(5, 2 * SPAN + 77, heads=4, kv_heads=2, head_dim=8, dtype=dtype), **arguments)


@pytest.mark.parametrize("window", [(40, 10), (0, 0), (130, 0), (0, 257)])
def test_windows_that_skip_whole_blocks(window):
    check_forward(*random_qkv(900, 1000, head_dim=8), window_size=window)
    check_backward(*random_qkv(900, 1000, head_dim=8), window_size=window)
    check_backward(*random_qkv(1000, 700, head_dim=8), window_size=window, causal=True)


def test_longest_lengths_of_one_with_empty_sequences():
    q, k, v = (x[0] for x in random_qkv(3, 3))
    cu = torch.tensor([0, 0, 1, 1, 2, 3, 3], dtype=torch.int32)
    offsets = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 1, "max_seqlen_k": 1}
    out, _ = check_forward(q, k, v, **offsets, causal=True)
    assert_same_bits(out, v.repeat_interleave(2, dim=1))
    check_backward(q, k, v, **offsets, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_many_short_sequences(dtype):
    q, k, v = random_qkv(2, 2, batch=MANY, heads=2, head_dim=2, dtype=dtype)
    dout = torch.randn_like(q)
    out, lse = check_forward(q, k, v, causal=True)
    dense = check_backward(q, k, v, causal=True, dout=dout, with_lse=False)
    cu = torch.arange(0, 2 * MANY + 1, 2, dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in (q, k, v, dout)]
    arguments = {"causal": True, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    packed_out, packed_lse = lcore_with_lse(*packed[:3], **arguments)
    assert_same_bits(packed_out, out.flatten(0, 1))
    assert_same_bits(packed_lse, lse.transpose(0, 1).flatten(1))
    for name, x in gradients(lcore_with_lse, *packed, None, arguments).items():
        assert_same_bits(x, dense[name].flatten(0, 1), name)


def test_very_many_heads():
    q, k, v = random_qkv(2, 3, heads=70_000, kv_heads=35_000, head_dim=2)
    check_forward(q, k, v, causal=True)
    check_backward(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_large_logits(dtype):
    """Logits to 1e4: almost every row is one-hot, and its gradient 0 but for rounding."""
    q, k, v = random_qkv(70, 150, dtype=dtype)
    check_backward(q * 100, k * 10, v, causal=True, softcap=30.0)
    found = gradients(lcore_with_lse, q * 100, k * 10, v, torch.randn_like(q), None, {"causal": True})
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("new", [1, 5, 64, 150])
def test_a_one_hot_row_copies_its_value(new, dtype):
    """One key stands 1e4 above all others; with GQA, in every block of keys."""
    _, k, v = random_qkv(new, SPAN + 150, heads=4, kv_heads=2, head_dim=16, dtype=dtype)
    k[..., 0] = -100
    q = torch.zeros(1, new, 4, 16, dtype=dtype)
    q[..., 0] = 100
    for key in (0, 127, 128, SPAN - 1, SPAN):
        one = k.clone()
        one[:, key, :, 0] = 100
        out, lse = lcore.attention(q, one, v, softmax_scale=1.0, causal=True, return_lse=True)
        assert_same_bits(out, v[:, key, None].repeat_interleave(2, dim=2).expand(1, new, 4, 16).contiguous())
        assert (lse == 1e4).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("new", [1, 64, 100])
def test_equal_logits(new, dtype):
    """Scores all 0, or all 1e4: the mean of the values, and the gradients of a mean."""
    _, k, v = random_qkv(new, 1000, heads=4, kv_heads=2, dtype=dtype)
    q = torch.zeros(1, new, 4, 16, dtype=dtype)
    check_forward(q, k, v)
    check_backward(q, k, v)
    q[..., 0], k[...] = 100, 100
    _, lse = check_forward(q, k, v, softmax_scale=1.0)
    assert (lse == torch.tensor(1e4 + math.log(1000), dtype=lse.dtype)).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("new", [1, 3, 70])
def test_sums_of_131072_keys(new, dtype):
    """16 bit sums would stop growing at 256 (bfloat16) or 2048."""
    keys = 1 << 17
    q, k, v = random_qkv(new, keys, heads=2, head_dim=8, dtype=dtype)
    if new < 70:
        check_forward(q, k, v + 1)
    out, lse = lcore.attention(torch.zeros_like(q), k, torch.ones_like(v), return_lse=True)
    assert (out == 1).all()
    assert (lse - math.log(keys)).abs().max() < 1e-5


def test_products_beyond_float16_inside_the_backward():
    """dP and delta are about 1e6, the largest float16 is 65504; all gradients fit."""
    q, k, v = random_qkv(130, 200, heads=4, kv_heads=2, head_dim=64, dtype=torch.float16)
    dout = torch.randn(130, 4, 64)[None].to(torch.float16) * 300
    found = check_backward(q * 1e-3, k * 1e-3, v * 300, dout=dout, causal=True)
    assert all(x.isfinite().all() and x.any() for x in found.values())


@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_of_minus_infinity(dtype):
    """Keys of -inf in the first blocks, in the middle, everywhere: weight 0, and a row of such scores is as empty."""
    q, k, v = random_qkv(70, 2 * SPAN + 10, heads=2, head_dim=8, dtype=dtype)
    q = q.abs()
    for keys in (slice(0, 130), slice(0, SPAN + 70), slice(100, 2 * SPAN), slice(0, None)):
        bad = k.clone()
        bad[:, keys] = -math.inf
        for rows in (slice(0, 1), slice(0, None)):
            check_forward(q[:, rows], bad, v)
    out, lse = lcore.attention(q, torch.full_like(k, -math.inf), v, return_lse=True)
    assert not out.any() and lse.isneginf().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("new", [1, 3, 64, 100])
def test_infinite_scores(new, dtype):
    """+inf makes a row NaN, as inf - inf does in the formula; a softcap makes it finite before that."""
    q, k, v = random_qkv(new, 150, dtype=dtype)
    k[0, 60, 0, 0] = math.inf
    q[..., 0] = q[..., 0].abs() + 1
    q[0, 0, 0, 0] = -1  # this row has -inf
    out, lse = check_forward(q, k, v)
    assert out[0, 0, 0].isfinite().all() and out[0, 0, 1].isnan().all() and lse[0, 1, 0].isnan()
    out, _ = check_forward(q, k, v, softcap=5.0)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_zero(dtype):
    """As an input it is 0: in q and k it changes no bit, in v not more than a sign."""
    q, k, v = random_qkv(70, 150, dtype=dtype)
    for x in (q, k, v):
        x[..., ::2] = 0.0
    want = lcore.attention(q, k, v, causal=True, return_lse=True)
    negative = [torch.where(x == 0, -0.0, x) for x in (q, k, v)]
    got = lcore.attention(*negative[:2], v, causal=True, return_lse=True)
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)
    assert torch.equal(lcore.attention(*negative, causal=True), want[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("new", [1, 70])
def test_denormal_values_are_values(new, dtype):
    """Powers of two below the smallest normal number, averaged over four equal keys, come out exact.

    bfloat16 is left out: its dot product instruction takes denormals, here below 1e-38, for 0.
    """
    small = torch.finfo(dtype).tiny / 8
    q, k = torch.zeros(1, new, 2, 16, dtype=dtype), torch.randn(1, 4, 1, 16).to(dtype)
    v = torch.full((1, 4, 1, 16), small, dtype=dtype)
    out = lcore.attention(q, k, v)
    assert (out == small).all() and small > 0
    check_forward(q, k * small, v)
    check_forward(q + small, k / torch.finfo(dtype).tiny, v)


@pytest.mark.parametrize("dtype", FLOATS)
def test_more_threads_than_work(dtype, threads):
    torch.set_num_threads(64)
    arguments = {"causal": True, "sinks": torch.zeros(2)}
    for shape in ((1, 1), (1, 0), (0, 1), (2, 1), (1, SPAN + 1), (300, 2)):
        q, k, v = random_qkv(*shape, head_dim=3, dtype=dtype)
        check_forward(q, k, v, **arguments)
        check_backward(q, k, v, **arguments)
    if dtype in NAME_OF:
        cache = lcore.PagedCache(1, 1, 3, dtype=dtype, kv_format=NAME_OF[dtype], page_size=1)
        q, k, v = random_qkv(3, 3, head_dim=3, dtype=dtype)
        cache.append(0, k, v)
        assert_same_bits(cache.attend(0, q), lcore.attention(q, k, v, causal=True))


def test_calls_from_several_threads_at_once():
    calls = [(random_qkv(n, m, heads=4, kv_heads=2), causal) for n, m, causal in
             ((200, 200, True), (1, SPAN + 50, False), (64, 333, True), (5, 9000, True))]  # fmt: skip
    want = [lcore.attention(*inputs, causal=causal) for inputs, causal in calls]
    failures = []

    def work(which):
        for _ in range(10):
            inputs, causal = calls[which]
            if not torch.equal(lcore.attention(*inputs, causal=causal), want[which]):
                failures.append(which)

    workers = [threading.Thread(target=work, args=(i % len(calls),)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


DIRTY_MEMORY = """
import torch
from attention_cases import FLOATS, check_backward, check_forward, everything, random_packed, random_qkv
from cache_cases import NAME_OF, Twins

assert torch.empty(100, dtype=torch.uint8)[50] == 0x7F, "memory is not dirty"
for dtype in FLOATS:
    for seq_q, dims in ((1, (40, 59)), (33, (17, 64)), (130, (80, 3))):
        sizes = {"heads": 6, "kv_heads": 2, "head_dim": dims[0], "head_dim_v": dims[1], "dtype": dtype}
        q, k, v = random_qkv(seq_q, 205, batch=2, **sizes)
        check_forward(q, k, v, **everything(6))
        check_backward(q, k, v, **everything(6))
        q, k, v, offsets = random_packed([seq_q, 0, 30], [90, 3, 10], 5, **sizes)
        check_forward(q, k, v, **offsets, causal=True)
        check_backward(q, k, v, **offsets, causal=True)
    if dtype in NAME_OF:
        twins = Twins(kv_heads=2, head_dim=40, head_dim_v=24, dtype=dtype, page_size=48)
        for new in (130, 1, 33):
            twins.append(new)
            twins.check(new, group=3)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc fills new memory with a byte of choice")
def test_dirty_memory():
    """Every byte that malloc hands out is 0x7F: 3e38 in float32, NaN in float16."""
    environment = {**os.environ, "MALLOC_PERTURB_": str(0x7F ^ 0xFF), "PYTHONPATH": str(Path(__file__).parent)}
    if environment.pop("LCORE_SANITIZE", None) == "on":
        pytest.skip("the sanitizer's malloc fills memory itself")
    done = subprocess.run(
        [sys.executable, "-c", DIRTY_MEMORY], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
