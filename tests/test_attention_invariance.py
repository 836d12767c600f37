"""A row's bits depend on its query, its keys and nothing else: not on batch, threads, cuts, or the run."""

import itertools

import pytest
import torch
from attention_cases import FLOATS, everything, gradients, lcore_with_lse, random_packed, random_qkv
from tolerance import assert_same_bits

import lcore

THREADS = (1, 2, 3, 7)
SPAN = 4096  # keys between absolute multiples of this are reduced on their own


def forward(q, k, v, **arguments):
    return lcore.attention(q, k, v, **arguments, return_lse=True)


def backward(q, k, v, dout, dlse, **arguments):
    return list(gradients(lcore_with_lse, q, k, v, dout, dlse, arguments).values())


def assert_all_same(results):
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("dtype", FLOATS)
def test_twice_the_same(dtype):
    q, k, v = random_qkv(300, 333, batch=2, heads=6, kv_heads=2, dtype=dtype)
    arguments = everything(6)
    dout, dlse = torch.randn_like(q), torch.randn_like(forward(q, k, v)[1])
    assert_all_same([forward(q, k, v, **arguments) for _ in range(2)])
    assert_all_same([backward(q, k, v, dout, dlse, **arguments) for _ in range(2)])


@pytest.mark.parametrize(
    ("seq_q", "seq_k", "arguments"),
    [
        (700, 700, {"causal": True}),
        (1, 3 * SPAN + 100, {}),  # few rows, long keys: spans go to several workers
        (5, 2 * SPAN, {"causal": True, "window_size": (SPAN + 10, -1)}),
        (200, 2 * SPAN + 1, {"causal": True}),
    ],
)
def test_threads(seq_q, seq_k, arguments, threads):
    q, k, v = random_qkv(seq_q, seq_k, heads=3, head_dim=8)
    dout, dlse = torch.randn_like(q), torch.randn(1, 3, seq_q)
    results = []
    for n in THREADS:
        torch.set_num_threads(n)
        results.append([*forward(q, k, v, **arguments), *backward(q, k, v, dout, dlse, **arguments)])
    assert_all_same(results)


def test_threads_with_sinks_and_packed_sequences(threads):
    q, k, v, offsets = random_packed([100, 0, 1, 250], [120, 7, 5000, 250], heads=6, kv_heads=2, head_dim=8)
    arguments = {**everything(6, rows=4), **offsets}
    dout, dlse = torch.randn_like(q), torch.randn(6, q.shape[0])
    results = []
    for n in THREADS:
        torch.set_num_threads(n)
        results.append([*forward(q, k, v, **arguments), *backward(q, k, v, dout, dlse, **arguments)])
    assert_all_same(results)


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_rows_alone(dtype):
    q, k, v = random_qkv(150, 230, batch=5, heads=4, kv_heads=2, dtype=dtype)
    arguments = {**everything(4), "sinks": None}
    dout, dlse = torch.randn_like(q), torch.randn(5, 4, 150, dtype=forward(q, k, v)[1].dtype)
    together = [*forward(q, k, v, **arguments), *backward(q, k, v, dout, dlse, **arguments)]
    for row in range(5):
        part = slice(row, row + 1)
        one = [q[part], k[part], v[part]]
        alone = [*forward(*one, **arguments), *backward(*one, dout[part], dlse[part], **arguments)]
        for x, y in zip(alone, together, strict=True):
            assert_same_bits(x, y[part], f"row {row}")


def test_heads_alone():
    q, k, v = random_qkv(150, 230, heads=6, kv_heads=3)
    together = forward(q, k, v, causal=True)
    for head in range(3):
        queries = slice(2 * head, 2 * head + 2)
        one = forward(q[:, :, queries], k[:, :, head : head + 1], v[:, :, head : head + 1], causal=True)
        assert_same_bits(one[0], together[0][:, :, queries])
        assert_same_bits(one[1], together[1][:, queries])


def assert_cuts_do_not_matter(q, k, v, cuts, **arguments):
    """Every piece of queries sees the keys up to its last token, as a prompt read in pieces would."""
    seq_q, seq_k = q.shape[1], k.shape[1]
    whole_out, whole_lse = forward(q, k, v, causal=True, **arguments)
    for begin, end in itertools.pairwise([0, *cuts, seq_q]):
        seen = seq_k - seq_q + end
        out, lse = forward(q[:, begin:end], k[:, :seen], v[:, :seen], causal=True, **arguments)
        assert_same_bits(out, whole_out[:, begin:end], f"rows {begin}:{end}")
        assert_same_bits(lse, whole_lse[:, :, begin:end], f"lse of rows {begin}:{end}")


CUTS = {
    "single tokens": range(1, 400),
    "two": [1],
    "round a tile": [63, 64, 65, 127, 128, 129, 191, 192, 193],
    "odd": [7, 100, 101, 250, 333],
    "halves": [200],
}


@pytest.mark.parametrize("name", CUTS)
def test_any_cut_of_the_queries(name):
    q, k, v = random_qkv(400, 411, heads=3, head_dim=20)
    most = everything(3)
    del most["causal"]
    for arguments in ({}, {"window_size": (70, 0)}, most):
        assert_cuts_do_not_matter(q, k, v, CUTS[name], **arguments)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 64), (192, 128), (40, 300)])
def test_cuts_in_every_tile_shape(head_dim, head_dim_v, dtype):
    q, k, v = random_qkv(210, 210, heads=2, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    assert_cuts_do_not_matter(q, k, v, [1, 2, 50, 96, 97, 180])


@pytest.mark.parametrize("window", [(-1, -1), (4000, 0), (5000, 0)])
def test_cuts_across_the_border_of_a_span(window):
    """Pieces with few rows split their spans over workers, the whole does not: the merge order is the same."""
    q, k, v = random_qkv(300, SPAN + 150, heads=2, head_dim=8)
    border = 300 - 150
    cuts = [10, *range(border - 3, border + 4), 250, 299]
    assert_cuts_do_not_matter(q, k, v, cuts, window_size=window)


def test_a_token_against_a_long_cache_is_the_last_row_of_the_prompt(threads):
    q, k, v = random_qkv(2500, 2 * SPAN + 77, heads=2, head_dim=8)
    whole, _ = forward(q, k, v, causal=True)
    for n in THREADS:
        torch.set_num_threads(n)
        assert_same_bits(forward(q[:, -1:], k, v, causal=True)[0], whole[:, -1:])


def test_without_mask_any_rows_may_be_left_out():
    q, k, v = random_qkv(333, 300, heads=3)
    whole, _ = forward(q, k, v)
    for rows in (slice(0, 1), slice(5, 200), slice(192, 193), slice(100, None, 7)):
        assert_same_bits(forward(q[:, rows], k, v)[0], whole[:, rows])
