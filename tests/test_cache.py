"""lcore.PagedCache: what it holds and what it attends to, to the bit where formats allow it."""

import itertools

import pytest
import torch
from cache_cases import DTYPE_OF, NAME_OF, Twins, assert_same_contents, inside, poison, pool_of, random_kv
from tolerance import assert_same_bits

import lcore

DTYPES = tuple(NAME_OF)
PAGE_SIZES = (1, 16, 48, 64, 256)


def new_cache(page_size=16, dtype=torch.float32, kv_heads=2, head_dim=16, batch=1, layers=1, **options):
    options.setdefault("kv_format", NAME_OF[dtype])
    return lcore.PagedCache(layers, kv_heads, head_dim, batch_size=batch, dtype=dtype, page_size=page_size, **options)


def read(cache, q, k, v, chunks, **arguments):
    """Appends and attends chunk by chunk."""
    parts = []
    for q_part, k_part, v_part in zip(q.split(chunks, 1), k.split(chunks, 1), v.split(chunks, 1), strict=True):
        cache.append(0, k_part, v_part)
        parts.append(cache.attend(0, q_part, **arguments))
    return torch.cat(parts, dim=1)


def chunkings(tokens, page_size):
    """All at once; one by one; up to each page border, over it, on to the middle of the next page."""
    cuts = sorted(
        {
            min(tokens, max(0, page * page_size + offset))
            for page in range(tokens // page_size + 2)
            for offset in (-1, 0, 1, page_size // 2)
        }
    )
    yield [tokens]
    if tokens <= 150:
        yield [1] * tokens
    yield [b - a for a, b in itertools.pairwise(sorted({0, *cuts, tokens})) if b > a]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_chunks_change_no_bit(page_size, dtype):
    tokens = 2 * page_size + 7 if page_size < 256 else 300
    k, v = random_kv(2, tokens, 2, 24, 40, dtype)
    q = torch.randn(2, tokens, 6, 24).to(dtype)
    want = lcore.attention(q, k, v, causal=True)
    first = None
    for chunks in chunkings(tokens, page_size):
        cache = new_cache(page_size, dtype, head_dim=24, head_dim_v=40, batch=2)
        assert_same_bits(read(cache, q, k, v, chunks), want, f"chunks {chunks[:5]}")
        first = first or cache
        assert_same_contents(cache, first)


@pytest.mark.parametrize("formats", itertools.product(DTYPE_OF, DTYPE_OF), ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_no_bit_of_other_formats(dtype, formats):
    k, v = random_kv(1, 40, 1, 16, dtype=dtype)
    q = torch.randn(1, 40, 3, 16).to(dtype)
    first = None
    for chunks in ([1] * 40, [16, 24], [15, 1, 1, 23], [40]):
        cache = new_cache(16, dtype, kv_heads=1, kv_format=formats)
        read(cache, q, k, v, chunks)
        first = first or cache
        assert_same_contents(cache, first)
        # One slot: the same ids too, lowest first, and so, codes filling whole cache lines, the same pool.
        assert inside(cache)[0][0, 0, :2].tolist() == [0, 1]
        assert torch.equal(pool_of(cache)[:2], pool_of(first)[:2])
        assert cache.kv_format == formats


def test_a_page_is_k_then_v_each_from_a_multiple_of_64_bytes():
    k, v = random_kv(1, 3, 1, 5, 7)
    cache = new_cache(3, kv_heads=1, head_dim=5, head_dim_v=7, kv_format=("fp32", "bf16"))
    cache.append(0, k, v)
    page = pool_of(cache)[0]
    assert page.shape == (128,)
    assert torch.equal(page[:60].view(torch.float32), k.flatten())
    assert torch.equal(page[64 : 64 + 42].view(torch.bfloat16), v.flatten().bfloat16())
    # fp32 keys, 2 x 5 x 4 = 40 bytes a token pair; padding counts.
    assert cache.stats()["bits_per_value"] == pytest.approx(8 * 128 / 36)


@pytest.mark.parametrize("formats", itertools.product(DTYPE_OF, DTYPE_OF), ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_in_every_format(dtype, formats):
    twins = Twins(kv_heads=1, head_dim=24, head_dim_v=40, dtype=dtype, kv_format=formats, page_size=16)
    for new in (33, 1, 14, 1):
        twins.append(new)
        twins.check(new, group=3)


def test_half_precision_pages_keep_tokens_to_the_formats_error():
    k, v = random_kv(1, 64, 1, 32, dtype=torch.bfloat16)
    cache = new_cache(64, torch.bfloat16, kv_heads=1, head_dim=32, kv_format="fp16")
    cache.append(0, k, v)
    held = pool_of(cache)[0, : 64 * 32 * 2].view(torch.float16).view(64, 32).float()
    error = (held - k[0, :, 0].float()).abs()
    assert (error <= 2.0**-25).all(), "a bfloat16 in fp16's normal range is exact; below, half of fp16's smallest step"


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (8, 59), (80, 128), (128, 64), (512, 512)])
def test_head_sizes_and_groups(head_dim, head_dim_v, group):
    twins = Twins(kv_heads=2, head_dim=head_dim, head_dim_v=head_dim_v, page_size=16, batch_size=2)
    for new in (1, 18, 3):
        twins.append(new)
        twins.check(new, group)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_few_tokens(page_size):
    twins = Twins(page_size=page_size, batch_size=2)
    assert twins.cache.attend(0, torch.randn(2, 0, 4, 16)).shape == (2, 0, 4, 16)
    twins.append(0)
    twins.check_lengths()
    twins.append(1)
    twins.check(1, group=2)
    twins.append(0)
    twins.check(1)
    twins.check(0)
    twins.check_lengths()
    twins.append(page_size)
    twins.check(page_size)
    twins.check(page_size + 1)
    twins.check_lengths()


@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_right_padded_rows(page_size):
    twins = Twins(page_size=page_size, batch_size=4, dtype=torch.bfloat16)
    for rows in ([30, 0, 16, 1], [0, 0, 0, 0], [1, 2, 30, 15], [5, 5, 5, 5]):
        lengths = torch.tensor(rows)
        twins.append(30, lengths)
        twins.check(30, 2, lengths)
        twins.check(30, 1, lengths.int())
        twins.check_lengths()
    one = torch.ones(4, dtype=torch.int64)
    twins.append(1, one)
    twins.check(1, 2, one)


def test_rows_do_not_see_their_neighbours():
    k, v = random_kv(3, 40, 2, 16)
    q = torch.randn(3, 40, 4, 16)
    lengths = torch.tensor([40, 7, 17])
    cache = new_cache(batch=3)
    cache.append(0, k, v, lengths=lengths)
    together = cache.attend(0, q, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = new_cache()
        alone.append(0, k[b : b + 1, :n], v[b : b + 1, :n])
        assert_same_bits(together[b, :n], alone.attend(0, q[b : b + 1, :n])[0])


def test_any_strides():
    k, v = random_kv(2, 40, 2, 16)
    q = torch.randn(2, 40, 4, 16)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    steps = [torch.stack([x, x], dim=-1).flatten(-2)[..., ::2] for x in (q, k, v)]
    packed = torch.cat([q, k, v], dim=2).split([4, 2, 2], dim=2)
    want = None
    for inputs in ((q, k, v), views, steps, packed):
        cache = new_cache(batch=2)
        out = read(cache, *inputs, [7, 33])
        want = out if want is None else want
        assert_same_bits(out, want)
    one = k[:, :1].expand(2, 40, 2, 16)
    expanded, copied = new_cache(batch=2), new_cache(batch=2)
    expanded.append(0, one, one[..., :1].expand(2, 40, 2, 16))
    copied.append(0, one.contiguous(), one[..., :1].repeat(1, 1, 1, 16))
    assert_same_contents(expanded, copied)


ARGUMENTS = (
    {"window_size": (0, 0)},
    {"window_size": (20, -1)},
    {"window_size": (70, 5)},
    {"softcap": 3.0},
    {"softmax_scale": 0.7},
    {"sinks": torch.tensor([0.5, -1.0, 3.0, -torch.inf])},
    {"alibi_slopes": torch.tensor([0.1, 0.5, 0.0, 1.0])},
    {"alibi_slopes": torch.tensor([[0.1, 0.5, 0.0, 1.0], [0.3, 0.2, 0.1, 0.0]])},
    {"window_size": (33, -1), "softcap": 5.0, "softmax_scale": 0.3, "sinks": torch.zeros(4),
     "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
)  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_attention(dtype, arguments):
    k, v = random_kv(2, 90, 2, 16, dtype=dtype)
    q = torch.randn(2, 90, 4, 16).to(dtype)
    want = lcore.attention(q, k, v, causal=True, **arguments)
    for chunks in ([90], [47, 1, 1, 41]):
        assert_same_bits(read(new_cache(16, dtype, batch=2), q, k, v, chunks, **arguments), want)


def test_what_is_not_held_is_not_read():
    k, v = random_kv(2, 75, 2, 16)
    q = torch.randn(2, 75, 4, 16)
    want = lcore.attention(q, k, v, causal=True)
    cache = new_cache(batch=2)
    cache.reserve(200)
    parts = []
    for start, end in itertools.pairwise((0, 5, 16, 31, 50, 75)):
        poison(cache)
        cache.append(0, k[:, start:end], v[:, start:end])
        poison(cache)
        parts.append(cache.attend(0, q[:, start:end]))
    assert_same_bits(torch.cat(parts, dim=1), want)
    poison(cache)
    cache.crop(20)
    poison(cache)
    cache.append(0, k[:, 20:75], v[:, 20:75])
    assert_same_bits(cache.attend(0, q[:, 20:75]), want[:, 20:75])


def test_nan_and_inf_that_are_held_are_kept():
    for dtype in DTYPES:
        k, v = random_kv(1, 17, 1, 4, dtype=dtype)
        v[0, 3, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
        cache = new_cache(16, dtype, kv_heads=1, head_dim=4)
        cache.append(0, k, v)
        held = pool_of(cache)[0, -16 * 4 * dtype.itemsize :].view(dtype).view(16, 4)
        assert_same_bits(held, v[0, :16, 0])
        out = cache.attend(0, torch.ones(1, 1, 1, 4, dtype=dtype))[0, 0, 0]
        assert out[0].isposinf() and out[1].isneginf() and out[2].isnan() and out[3].isfinite()


def test_threads_change_no_bit(threads):
    k, v = random_kv(2, 200, 2, 64)
    q = torch.randn(2, 200, 4, 64)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        cache = new_cache(head_dim=64, batch=2)
        results.append((read(cache, q, k, v, [150, 49, 1]), cache))
    for out, cache in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_contents(cache, results[0][1])


def test_inference_mode_and_out_of_it():
    k, v = random_kv(1, 40, 2, 16)
    q = torch.randn(1, 40, 4, 16)
    want = lcore.attention(q, k, v, causal=True)
    with torch.inference_mode():
        cache = new_cache()
        inside_mode = read(cache, q[:, :25], k[:, :25], v[:, :25], [20, 5])
        other = cache.fork()
    cache.append(0, k[:, 25:], v[:, 25:])
    assert_same_bits(torch.cat([inside_mode, cache.attend(0, q[:, 25:])], dim=1), want)
    cache.crop(3)
    with torch.inference_mode():
        other.append(0, k[:, 25:], v[:, 25:])
        assert_same_bits(other.attend(0, q[:, 25:]), want[:, 25:])
    del cache, other


def test_inputs_that_require_gradients_are_only_read():
    k, v = (x.requires_grad_() for x in random_kv(1, 20, 2, 16))
    cache = new_cache()
    cache.append(0, k, v)
    out = cache.attend(0, torch.randn(1, 20, 2, 16, requires_grad=True))
    assert not out.requires_grad
