"""Tensors past 2^31 elements and pools past 2^32 bytes, in 16 GB.

Most of a long K and V is 0: memory that nobody has written, which costs nothing. A key of 0 has score 0 and a value of
0 adds to the denominator only, so N of them are one sink of ln N beside the few keys that are not 0: a small oracle.
"""

import math

import psutil
import pytest
import torch
from attention_cases import check_forward, gradients, lcore_with_lse, random_qkv
from cache_cases import NAME_OF, pool_of
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(psutil.virtual_memory().available < 16e9, reason="needs 16 GB of free memory"),
]

DIM = 128
KEYS = (1 << 24) + 1000  # x 128: more than 2^31 elements
# Round 2^31 elements and 2^31 bytes, at both ends, and between.
WRITTEN = torch.tensor([0, 1, 77, (1 << 23) - 1, 1 << 23, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, KEYS - 2, KEYS - 1])


def few_keys(count):
    """q of two heads, and k, v of `count` keys with logits round 20 to 40: e^20 outweighs 2^24 zeros."""
    q, k, v = random_qkv(1, count, head_dim=DIM, dtype=torch.bfloat16)
    q[..., 0] = 30
    k[..., 0] = torch.linspace(8, 15, count)[:, None].to(k.dtype)
    return q, k, v


def check_few(out, lse, q, k, v, zeros, **arguments):
    """Against the few keys and a sink for the zeros."""
    sinks = torch.full((q.shape[2],), math.log(zeros), dtype=torch.float64)
    want = reference.attention(q.double(), k.double(), v.double(), sinks=sinks, **arguments)
    working = reference.attention(q.float(), k.float(), v.float(), sinks=sinks.float(), **arguments)
    assert_close(out, want[0], working[0].to(out.dtype), "out")
    if lse is not None:
        assert_close(lse, want[1], working[1], "lse", slack_ulp=16)


def long_keys(k, v):
    """k and v at WRITTEN among zeros; V of one column, so that all gradients fit too."""
    long_k = torch.zeros(1, KEYS, 1, DIM, dtype=k.dtype)
    long_v = torch.zeros(1, KEYS, 1, v.shape[-1], dtype=v.dtype)
    long_k[:, WRITTEN], long_v[:, WRITTEN] = k, v
    assert long_k.numel() > 1 << 31
    return long_k, long_v


def test_keys_past_32_bits():
    q, k, v = few_keys(len(WRITTEN))
    long_k, long_v = long_keys(k, v)
    out, lse = lcore_with_lse(q, long_k, long_v)
    check_few(out, lse, q, k, v, KEYS - len(WRITTEN))
    # A window at the far end is what a short call sees; 4096 keeps the borders of its blocks where they were.
    end = slice((1 << 24) - 4096, None)
    rows = q.expand(1, 70, 2, DIM)
    arguments = {"causal": True, "window_size": (2000, 0), "alibi_slopes": torch.tensor([0.01, 0.001])}
    far = lcore_with_lse(rows, long_k, long_v, **arguments)
    near = check_forward(rows, long_k[:, end], long_v[:, end], **arguments)
    for x, y in zip(far, near, strict=True):
        assert_same_bits(x, y)


def test_gradients_of_keys_past_32_bits():
    q, k, v = few_keys(len(WRITTEN))
    v = v[..., :1].contiguous()
    long_k, long_v = long_keys(k, v)
    dout = torch.randn(1, 1, 2, 1).to(q.dtype)
    found = gradients(lcore_with_lse, q, long_k, long_v, dout, None, {})
    exact = {"sinks": torch.full((2,), math.log(KEYS - len(WRITTEN)), dtype=torch.float64)}
    want = gradients(reference.attention, *(x.double() for x in (q, k, v, dout)), torch.zeros(1, 2, 1), exact)
    same = {"sinks": exact["sinks"].float()}
    working = gradients(reference.attention, *(x.float() for x in (q, k, v, dout)), torch.zeros(1, 2, 1), same)
    found["k"], found["v"] = found["k"][:, WRITTEN], found["v"][:, WRITTEN]
    for name, x in found.items():
        assert x.any()
        assert_close(x, want[name], working[name].to(x.dtype), f"gradient of {name}", floor=1.0)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_strides_past_32_bits(dim):
    """Elements of one dimension lie 2^29 apart; the memory between them is never touched."""
    dense = random_qkv(*((5, 5) if dim == 1 else (2, 9)), batch=5, heads=5, kv_heads=5, head_dim=5, dtype=torch.float16)
    memory = torch.empty((1 << 31) + (1 << 13), dtype=torch.float16)
    views = []
    for i, x in enumerate(dense):
        strides = [0 if d == dim else stride for d, stride in enumerate(x.stride())]
        strides[dim] = 1 << 29
        views.append(memory[i << 11 :].as_strided(x.shape, strides).copy_(x))
    dout = torch.randn_like(dense[0])
    for x, y in zip(lcore_with_lse(*views, causal=True), lcore_with_lse(*dense, causal=True), strict=True):
        assert_same_bits(x, y)
    got = gradients(lcore_with_lse, *views, dout, None, {"causal": True})
    want = gradients(lcore_with_lse, *dense, dout, None, {"causal": True})
    for name, x in got.items():
        assert_same_bits(x, want[name], name)


def test_expanded_keys_past_32_bits():
    """70,000 rows of a batch share their keys: as tokens of one row they are the same."""
    q, k, v = random_qkv(70_000, 2000, heads=1, dtype=torch.bfloat16)
    rows = 70_000
    expanded = [x.expand(rows, *x.shape[1:]) for x in (k, v)]
    assert expanded[0].numel() > 1 << 31
    out, lse = lcore_with_lse(q.transpose(0, 1), *expanded)
    want_out, want_lse = lcore_with_lse(q, k, v)
    assert_same_bits(out[:, 0], want_out[0])
    assert_same_bits(lse[:, 0, 0], want_lse[0, 0])


def test_outputs_past_32_bits():
    """out has 2^31 + 51,200 elements; rows without a mask may be computed alone."""
    rows = (1 << 22) + 100
    q, k, v = random_qkv(rows, 3, heads=1, head_dim=1, head_dim_v=512, dtype=torch.bfloat16)
    out = lcore.attention(q, k, v)
    assert out.numel() > 1 << 31
    for part in (
        slice(0, 50),
        slice((1 << 21) - 50, (1 << 21) + 50),
        slice((1 << 22) - 50, (1 << 22) + 50),
        slice(-50, rows),
    ):
        alone, _ = check_forward(q[:, part], k, v)
        assert_same_bits(out[:, part], alone)


def test_packed_outputs_past_32_bits():
    """The last of three sequences begins behind 2^31 elements."""
    rows = (1 << 22) + 300
    q, k, v = random_qkv(rows, 9, heads=1, head_dim=1, head_dim_v=512, dtype=torch.bfloat16)
    cu_q = torch.tensor([0, 100, (1 << 22) + 50, rows], dtype=torch.int32)
    cu_k = torch.tensor([0, 2, 5, 9], dtype=torch.int32)
    out = lcore.attention(q[0], k[0], v[0], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for part, keys in ((slice(0, 100), slice(0, 2)), (slice((1 << 22) + 50, rows), slice(5, 9))):
        alone, _ = check_forward(q[:, part], k[:, keys], v[:, keys])
        assert_same_bits(out[part], alone[0])


def test_more_tiles_of_rows_than_16_bits_count():
    """26 million tokens that see themselves and their left neighbour."""
    tokens = 26_000_000
    q, k, v = random_qkv(tokens, tokens, heads=1, head_dim=1)
    out = lcore.attention(q, k, v, window_size=(1, 0))
    for part in torch.arange(tokens).split(5_000_000):
        left = (part - 1).clamp(min=0)
        at, before, own = (x[0, i, 0, 0].double() for x, i in ((q, part), (k, left), (k, part)))
        weight = torch.sigmoid(at * (before - own))  # of the left neighbour
        weight[part == 0] = 0
        want = weight * v[0, left, 0, 0].double() + (1 - weight) * v[0, part, 0, 0].double()
        assert (out[0, part, 0, 0] - want).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pools_past_32_bits(dtype):
    """Pages behind 2^32 bytes of a pool; tokens in the first and last of them, in the middle and in the tail."""
    page, chunk = 64, 1 << 20
    tokens = 8 * chunk + chunk // 2 + 10
    written = torch.tensor(
        [0, chunk - 1, (1 << 22) - 1, 1 << 22, (1 << 23) - 1, 1 << 23, 8 * chunk + 5, tokens - 11, tokens - 1]
    )
    q, k, v = (x.to(dtype) for x in few_keys(len(written)))
    cache = lcore.PagedCache(1, 1, DIM, dtype=dtype, kv_format=NAME_OF[dtype], page_size=page)
    cache.reserve(tokens)
    for start in range(0, tokens, chunk):
        new = min(chunk, tokens - start)
        parts = [torch.zeros(1, new, 1, DIM, dtype=dtype) for _ in "kv"]
        here = (written >= start) & (written < start + new)
        for part, x in zip(parts, (k, v), strict=True):
            part[:, written[here] - start] = x[:, here]
        cache.append(0, *parts)
    assert pool_of(cache).nbytes > 1 << 32
    check_few(cache.attend(0, q), None, q, k, v, tokens - len(written))
    cache.crop(tokens - 1)  # the last written token is gone, the pages are as they were
    check_few(cache.attend(0, q), None, q, k[:, :-1], v[:, :-1], tokens - len(written))
    rows = q.expand(1, 5, 2, DIM)
    want = cache.attend(0, rows, window_size=(3000, -1))
    short = lcore.PagedCache(1, 1, DIM, dtype=dtype, kv_format=NAME_OF[dtype], page_size=page)
    near = slice(4096 * (tokens // 4096 - 1), tokens - 1)
    assert near.stop - near.start > 3005
    parts = [torch.zeros(1, near.stop - near.start, 1, DIM, dtype=dtype) for _ in "kv"]
    here = (written >= near.start) & (written < near.stop)
    for part, x in zip(parts, (k, v), strict=True):
        part[:, written[here] - near.start] = x[:, here]
    short.append(0, *parts)
    assert_same_bits(short.attend(0, rows, window_size=(3000, -1)), want)
