"""A few new tokens against many keys, dense and paged: right, and to the bit the rows of a long prefill."""

import math

import pytest
import torch
from attention_cases import FLOATS, check_forward, everything, random_qkv
from cache_cases import DTYPE_OF, NAME_OF, Twins, random_kv
from tolerance import assert_same_bits

import lcore

DTYPES = tuple(NAME_OF)  # what a cache may hold; lcore.attention takes float64 too
NEW = (1, 2, 3, 4, 5, 7, 8, 16, 33, 64)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 16, 71)
HEAD_DIMS = ((64, 64), (128, 128), (80, 80), (40, 40), (59, 59), (256, 256), (192, 128), (64, 96), (128, 17))
PAGE_SIZES = (1, 16, 48, 64, 128)
SPAN = 4096  # keys between absolute multiples of this are reduced on their own
LONG = 2 * SPAN + 77
SEQ_K = (63, 64, 65, SPAN - 1, SPAN, SPAN + 1, LONG)
PREFILL = 200  # rows of what stands for a prefill: more than any kernel for few rows takes
THREADS = (1, 2, 3, 7)


def forward(q, k, v, **arguments):
    return lcore.attention(q, k, v, causal=True, **arguments, return_lse=True)


def filled(k, v, page_size, lengths=None, **options):
    """A cache that holds k and v, in pages of their dtype unless options say otherwise."""
    options = {"dtype": k.dtype, "kv_format": NAME_OF[k.dtype], "batch_size": k.shape[0], **options}
    cache = lcore.PagedCache(1, k.shape[2], k.shape[3], page_size=page_size, head_dim_v=v.shape[3], **options)
    cache.append(0, k, v, lengths=lengths)
    return cache


def check_rows(q, k, v, counts=NEW, page_sizes=(), **arguments):
    """The last n rows alone, dense and from pages, against the same rows among all of q."""
    out, lse = forward(q, k, v, **arguments)
    caches = {size: filled(k, v, size) for size in page_sizes}
    for n in counts:
        if n > q.shape[1]:
            continue
        some, some_lse = forward(q[:, -n:], k, v, **arguments)
        assert_same_bits(some, out[:, -n:], f"{n} rows")
        assert_same_bits(some_lse, lse[:, :, -n:], f"lse of {n} rows")
        for size, cache in caches.items():
            paged = cache.attend(0, q[:, -n:], **arguments)
            assert_same_bits(paged, out[:, -n:], f"{n} rows, pages of {size}")


def scores(name, heads):
    """Arguments by name, for two rows of a batch; causal goes without saying."""
    most = {**everything(heads, rows=2), "window_size": (SPAN + 50, -1)}
    del most["causal"]
    return {
        "window 0": {"window_size": (0, -1)},
        "window 1": {"window_size": (1, -1)},
        "window 63": {"window_size": (63, -1)},
        "window 64": {"window_size": (64, 7)},
        "window of a span": {"window_size": (SPAN, -1)},
        "softcap": {"softcap": 3.0},
        "scale": {"softmax_scale": -0.7},
        "sinks": {"sinks": torch.tensor([0.5, -math.inf, 30.0, -3.0, 0.0, 1.0])[:heads]},
        "alibi": {"alibi_slopes": torch.rand(heads)},
        "alibi by row": {"alibi_slopes": torch.rand(2, heads) * 0.01},
        "everything": most,
    }[name]


SCORES = ("window 0", "window 1", "window 63", "window 64", "window of a span", "softcap", "scale", "sinks", "alibi",
          "alibi by row", "everything")  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seq_k", SEQ_K)
def test_values(seq_k, dtype):
    q, k, v = random_qkv(64, seq_k, heads=3, head_dim=16, head_dim_v=24, dtype=dtype)
    for n in NEW:
        check_forward(q[:, :n], k, v, causal=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seq_k", SEQ_K)
def test_rows_of_a_prefill(seq_k, dtype):
    q, k, v = random_qkv(min(PREFILL, seq_k), seq_k, heads=4, kv_heads=2, head_dim=24, dtype=dtype)
    check_rows(q, k, v, page_sizes=(64,) if dtype in DTYPES else ())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_rows_of_a_whole_prompt(dtype):
    q, k, v = random_qkv(SPAN + 70, SPAN + 70, heads=2, head_dim=8, dtype=dtype)
    check_rows(q, k, v, page_sizes=(48,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dtype):
    """Rows are packed by kv head: group x tokens of them, on both sides of what kernels for few rows take."""
    q, k, v = random_qkv(PREFILL, 333, heads=2 * group, kv_heads=2, head_dim=16, dtype=dtype)
    check_rows(q, k, v, page_sizes=(16,) if dtype in DTYPES else ())
    check_forward(q[:, -3:], k, v, causal=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIMS)
def test_head_dims(head_dim, head_dim_v, dtype):
    for group, seq_k in ((1, 333), (4, 129), (3, SPAN + 30)):
        q, k, v = random_qkv(100, seq_k, heads=group, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
        check_rows(q, k, v, (1, 2, 5, 8, 64), (64,) if dtype in DTYPES else ())
        check_forward(q[:, -2:], k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCORES)
def test_scores(name, dtype):
    heads = 6
    for seq_k in (150, SPAN + 100):
        q, k, v = random_qkv(PREFILL - 60, seq_k, batch=2, heads=heads, kv_heads=2, head_dim=16, dtype=dtype)
        arguments = scores(name, heads)
        check_rows(q, k, v, (1, 2, 3, 8, 33), (16, 64), **arguments)
        check_forward(q[:, -1:], k, v, causal=True, **arguments)
        check_forward(q[:, -7:], k, v, causal=True, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_lengths_round_the_pages(page_size, dtype):
    for pages in (1, 3):
        for held in sorted({pages * page_size + i for i in (-1, 0, 1)} - {0}):
            q, k, v = random_qkv(held, held, batch=2, heads=6, kv_heads=2, head_dim=16, dtype=dtype)
            check_rows(q, k, v, (1, 2, 4, 64), (page_size,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_long_caches_in_pages_of_every_size(page_size, dtype):
    q, k, v = random_qkv(PREFILL, LONG, heads=4, kv_heads=2, head_dim=16, head_dim_v=40, dtype=dtype)
    check_rows(q, k, v, page_sizes=(page_size,))
    check_rows(q, k, v, (1, 5), (page_size,), window_size=(SPAN + 5, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 48, 64])
def test_rows_of_different_lengths(page_size, dtype):
    """Each row of a batch has the bits it has alone, whatever its length, and is as it is from dense keys."""
    held = [LONG, 1, 64, 65, 0, SPAN, 127]
    lengths = torch.tensor(held)
    k, v = random_kv(len(held), LONG, 2, 16, 24, dtype)
    cache = filled(k, v, page_size, lengths)
    for new in (1, 3, 16):
        counts = lengths.clamp(max=new)
        q = torch.randn(len(held), new, 6, 16).to(dtype)
        arguments = scores("everything", 6) | {"alibi_slopes": torch.rand(len(held), 6)}
        out = cache.attend(0, q, lengths=counts, **arguments)
        for b, n in enumerate(counts.tolist()):
            row = {**arguments, "alibi_slopes": arguments["alibi_slopes"][b]}
            one = slice(b, b + 1)
            alone, _ = forward(q[one, :n], k[one, : held[b]], v[one, : held[b]], **row)
            assert_same_bits(out[one, :n], alone, f"row {b} of {held[b]} tokens")
            assert not out[b, n:].any()


@pytest.mark.parametrize("formats", [(a, b) for a in DTYPE_OF for b in DTYPE_OF], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_of_every_format(dtype, formats):
    """Right to the formula over the stored values; few rows have the bits of many."""
    twins = Twins(kv_heads=2, head_dim=40, head_dim_v=24, dtype=dtype, kv_format=formats, page_size=48, batch_size=2)
    twins.append(SPAN + 77, torch.tensor([SPAN + 77, 150]))
    for new in (1, 2, 7):
        twins.check(new, group=3)
        twins.check(new, group=3, **scores("everything", 6))
    q = torch.randn(2, 130, 6, 40).to(dtype)
    many = twins.cache.attend(0, q)
    for new in (1, 2, 5, 8, 64):
        assert_same_bits(twins.cache.attend(0, q[:, -new:]), many[:, -new:], f"{new} rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 5, 64])
def test_threads(new, dtype, threads):
    q, k, v = random_qkv(new, LONG, batch=2, heads=6, kv_heads=2, head_dim=16, dtype=dtype)
    lengths = torch.tensor([LONG, 100])
    cache = filled(k, v, 64, lengths)
    results = []
    for n in THREADS:
        torch.set_num_threads(n)
        dense = forward(q, k, v, window_size=(SPAN + 9, -1), sinks=torch.zeros(6))
        results.append([*forward(q, k, v), *dense, cache.attend(0, q)])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_in_a_longer_buffer_with_heads_first(dtype):
    """As other libraries keep their caches: (batch, heads, longest, dim), and q, k, v of the step in one tensor."""
    q, k, v = random_qkv(5, 200, batch=2, heads=6, kv_heads=2, head_dim=24, dtype=dtype)
    buffers = [torch.full((2, 2, 300, 24), math.nan, dtype=dtype) for _ in "kv"]
    views = [b[:, :, :200].transpose(1, 2).copy_(x) for b, x in zip(buffers, (k, v), strict=True)]
    packed = torch.cat([q, q], dim=2)[:, :, :6]
    for n in (1, 2, 5):
        want = forward(q[:, -n:], k, v)
        for got in (forward(packed[:, -n:], *views), forward(q[:, -n:].transpose(1, 2).clone().transpose(1, 2), k, v)):
            for x, y in zip(got, want, strict=True):
                assert_same_bits(x, y)


def test_a_token_at_a_time_from_nothing():
    """Every length from 1 on, one token after the other, gives the prompt's rows."""
    for dtype in DTYPES:
        q, k, v = random_qkv(140, 140, batch=2, heads=4, kv_heads=2, head_dim=16, dtype=dtype)
        out, _ = forward(q, k, v)
        cache = filled(k[:, :0], v[:, :0], 16)
        for i in range(140):
            cache.append(0, k[:, i : i + 1], v[:, i : i + 1])
            assert_same_bits(cache.attend(0, q[:, i : i + 1]), out[:, i : i + 1], f"token {i}")
            some, _ = forward(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1])
            assert_same_bits(some, out[:, i : i + 1], f"token {i}, dense")
