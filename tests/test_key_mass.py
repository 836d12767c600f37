"""lcore.key_mass against its formula in float64: every mask, layout and size round the edges of its blocks."""

import math
import subprocess
import sys

import pytest
import torch
from attention_cases import FLOATS, GROUPS, everything, random_packed, random_qkv
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

# (queries, keys) on both sides of a tile of 48 rows and of blocks of 64, 128 and 256 keys.
SIZES = ((1, 1), (1, 255), (1, 256), (1, 257), (5, 64), (47, 63), (48, 65), (49, 127), (97, 129), (96, 513), (300, 771))
HEAD_DIMS = (1, 8, 40, 64, 111, 128, 192, 512)
REDUCTIONS = ("sum", "max")


def lse_of(q, k, **arguments):
    return lcore.attention(q, k, k, **arguments, return_lse=True)[1]


def check(q, k, lse=None, reduction="sum", **arguments):
    """The op against the formula with the same (rounded) q, k and lse; returns the mass."""
    lse = lse_of(q, k, **arguments) if lse is None else lse
    arguments = {name: x for name, x in arguments.items() if name != "sinks"}  # they are in the lse
    got = lcore.key_mass(q, k, lse, reduction=reduction, **arguments)
    want = reference.key_mass(q.double(), k.double(), lse.double(), reduction=reduction, **arguments)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    working = reference.key_mass(q.to(work), k.to(work), lse, reduction=reduction, **arguments)
    assert got.dtype == lse.dtype and got.is_contiguous()
    assert_close(got, want, working, reduction, slack_ulp=16 if work == torch.float32 else None)
    return got


def q_and_k(*sizes, **options):
    return random_qkv(*sizes, **options)[:2]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal", [False, True])
def test_sizes(causal, dtype, reduction):
    for seq_q, seq_k in SIZES:
        q, k = q_and_k(seq_q, seq_k, batch=2, heads=6, kv_heads=2, dtype=dtype)
        check(q, k, causal=causal, reduction=reduction)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    for seq_q in (2, 70):
        q, k = q_and_k(seq_q, 140, heads=2, head_dim=head_dim, dtype=dtype)
        check(q, k, causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [*GROUPS, (4, 1), (12, 2), (24, 2)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_groups(heads, kv_heads, reduction):
    for seq_q in (1, 60):
        check(*q_and_k(seq_q, 200, heads=heads, kv_heads=kv_heads), causal=True, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("window", [(0, 0), (0, -1), (-1, 0), (5, 3), (200, 0), (-1, 130), (17, 1 << 40), (256, 256)])
def test_windows(window, reduction):
    for seq_q, seq_k in ((1, 300), (150, 150), (70, 600), (90, 20)):
        check(*q_and_k(seq_q, seq_k, heads=4), window_size=window, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seq_q", [1, 130])
def test_every_argument(seq_q, dtype, reduction):
    """ALiBi for each sequence, soft cap, window, scale, and sinks in the lse."""
    q, k = q_and_k(seq_q, 400, batch=3, heads=4, kv_heads=2, head_dim=24, dtype=dtype)
    check(q, k, reduction=reduction, **everything(4, rows=3))
    check(q, k, reduction=reduction, **everything(4))
    check(q, k, reduction=reduction, softmax_scale=-0.7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_sequences(dtype, reduction):
    """Also empty ones, and tokens behind the last, which have mass 0."""
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 24, "dtype": dtype}
    q, k, _, offsets = random_packed([70, 0, 30, 1, 5], [90, 3, 10, 300, 0], 2, **sizes)
    mass = check(q, k, reduction=reduction, **offsets, **everything(4, rows=5))
    assert mass.shape == (2, 405) and not mass[:, -2:].any() and not mass[:, 90:93].any()


def test_strides_are_read_in_place():
    q, k = q_and_k(60, 300, batch=2, heads=4, kv_heads=2)
    lse = lse_of(q, k)
    want = lcore.key_mass(q, k, lse)
    for layout in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.repeat(1, 1, 1, 2)[..., :16]):
        assert_same_bits(lcore.key_mass(layout(q), layout(k), lse), want)
    apart = lse.repeat_interleave(2, dim=-1)[..., ::2]
    assert not apart.is_contiguous()
    assert_same_bits(lcore.key_mass(q, k, apart), want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_mass_of_all_keys_is_the_number_of_queries_that_see_one(dtype):
    """Of each head: 70 of 100 causal queries stand at or behind the first of 70 keys."""
    q, k = q_and_k(100, 70, batch=2, heads=6, kv_heads=2, dtype=dtype)
    for arguments, seeing in (({}, 100), ({"causal": True}, 70), ({"window_size": (10, 4)}, 74)):
        mass = lcore.key_mass(q, k, lse_of(q, k, **arguments), **arguments)
        torch.testing.assert_close(mass.double().sum(-1), torch.full((2, 2), 3.0 * seeing).double(), rtol=1e-6, atol=0)


def test_a_window_of_queries_is_part_of_all():
    """SnapKV's and TOVA's: the last queries alone, with their part of the lse, and the rest, add up to all."""
    q, k = q_and_k(200, 333, heads=4, kv_heads=2, dtype=torch.float64)
    lse = lse_of(q, k, causal=True)
    whole = lcore.key_mass(q, k, lse, causal=True)
    for last in (1, 64, 199):
        late = lcore.key_mass(q[:, -last:], k, lse[..., -last:], causal=True)
        early = lcore.key_mass(q[:, :-last], k[:, :-last], lse[..., :-last], causal=True)
        torch.testing.assert_close(torch.nn.functional.pad(early, (0, last)) + late, whole)


def test_more_queries_than_a_float_can_count():
    """Every query sees the one key: 2^22 positions of 5 heads; adding 1 to 2^24 in float32 changes nothing."""
    positions, heads = 1 << 22, 5
    q, k = torch.zeros(1, 1, 1, 1).expand(1, positions, heads, 1), torch.ones(1, 1, 1, 1)
    lse = torch.zeros(1, heads, positions)
    assert lcore.key_mass(q, k, lse).item() == positions * heads
    assert lcore.key_mass(q, k, lse, reduction="max").item() == 1


@pytest.mark.parametrize("seq_q", [1, 90])
def test_an_lse_of_fewer_keys(seq_q):
    """Weights relative to the keys that the lse is of: greater than 1, and infinite, not garbage, past the range."""
    q, k = q_and_k(seq_q, 300, heads=4, dtype=torch.float32)
    for reduction in REDUCTIONS:
        check(q, k, lse_of(q, k[:, :7]), reduction=reduction)
        check(3 * q, 3 * k, torch.full((1, 4, seq_q), -40.0), reduction=reduction)
        far = lcore.key_mass(q, k, torch.full((1, 4, seq_q), -1000.0), reduction=reduction)
        assert far.isposinf().all()
        assert not lcore.key_mass(q, k, torch.full((1, 4, seq_q), 1000.0), reduction=reduction).any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_see(reduction):
    q, k = q_and_k(3, 5, heads=2)
    for rows, keys in ((0, 5), (3, 0), (0, 0)):
        mass = lcore.key_mass(q[:, :rows], k[:, :keys], torch.zeros(1, 2, rows), reduction=reduction)
        assert mass.shape == (1, 1, keys) and not mass.any()
    q[:, 1] = math.nan
    lse = torch.tensor([0.0, -math.inf, 0.0]).expand(1, 2, 3)
    assert_same_bits(
        lcore.key_mass(q, k, lse, reduction=reduction),
        lcore.key_mass(q[:, ::2], k, lse[..., ::2], reduction=reduction),
        "a query whose lse is -inf counts nowhere",
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_few_rows_have_the_bits_of_many(dtype):
    """Up to six rows read keys in another way than a tile does; rows of lse -inf make many of few."""
    q, k = q_and_k(40, 700, heads=3, head_dim=72, dtype=dtype)
    lse = lse_of(q, k, causal=True)
    for reduction in REDUCTIONS:
        few = lcore.key_mass(q[:, -2:], k, lse[..., -2:], causal=True, reduction=reduction)
        masked = torch.full_like(lse, -math.inf)
        masked[..., -2:] = lse[..., -2:]
        assert_same_bits(lcore.key_mass(q, k, masked, causal=True, reduction=reduction), few)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 9000), (700, 700), (64, 3000)])
def test_the_bits_do_not_depend_on_threads_or_on_the_batch(seq_q, seq_k, reduction, threads):
    q, k = q_and_k(seq_q, seq_k, batch=3, heads=4, kv_heads=2, head_dim=24)
    arguments = {**everything(4), "reduction": reduction}
    del arguments["sinks"]
    lse = lse_of(q, k, **{name: x for name, x in arguments.items() if name != "reduction"})
    want = lcore.key_mass(q, k, lse, **arguments)
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        assert_same_bits(lcore.key_mass(q, k, lse, **arguments), want, f"{n} threads")
    for row in range(3):
        one = (x[row : row + 1] for x in (q, k, lse))
        assert_same_bits(lcore.key_mass(*one, **arguments), want[row : row + 1], f"row {row}")


SCORES_OF_16K = """
import resource, torch, lcore
q = k = torch.randn(1, 1 << 14, 1, 8)
lse = torch.full((1, 1, 1 << 14), 10.0)
lcore.key_mass(q[:, :64], k, lse[..., :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lcore.key_mass(q, k, lse)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_square_of_the_length():
    done = subprocess.run([sys.executable, "-c", SCORES_OF_16K], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 10  # KB; the scores of one head would take a gigabyte
