"""lcore.page_scores is never below a score in the page, in exact arithmetic, and not far above the formula."""

import math
import random
from fractions import Fraction

import pytest
import torch
from tolerance import assert_same_bits

import lcore
from lcore import reference

ops = torch.ops.lcore
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND_TYPES = (torch.float32, torch.bfloat16)
EPS = 2.0**-23


def problem(seq_q=1, pages=5, page_size=4, heads=4, kv_heads=2, batch=2, head_dim=24, dtype=torch.float32):
    q = torch.randn(batch, seq_q, heads, head_dim).to(dtype)
    return q, torch.randn(batch, pages * page_size, kv_heads, head_dim).to(dtype)


def check(q, bounds, **arguments):
    """Between the formula in float64 and that plus the rounding of its terms, all upward."""
    got = lcore.page_scores(q, bounds, **arguments)
    want = reference.page_scores(q.double(), bounds.double(), **arguments)
    sizes = {**arguments, "softmax_scale": abs(arguments.get("softmax_scale") or q.shape[-1] ** -0.5)}
    size = reference.page_scores(
        q.double().abs(), bounds.double().abs().amax(3, keepdim=True).expand_as(bounds), **sizes
    )
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == want.shape
    known = want.isfinite()
    assert torch.equal(got[~known].double(), want[~known])
    assert (got.double()[known] >= want[known] - 1e-15 * size[known]).all()
    assert (got.double()[known] <= want[known] + (q.shape[-1] + 4) * EPS * size[known]).all()
    return got


@pytest.mark.parametrize("bound_type", BOUND_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 8, 40, 128, 131, 512])
def test_values(head_dim, dtype, bound_type):
    q, k = problem(head_dim=head_dim, dtype=dtype, pages=9)
    for scale in (None, 0.7, -0.7, 0.0):
        check(q, lcore.page_bounds(k, 4, dtype=bound_type), softmax_scale=scale)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (12, 2), (7, 1), (80, 2)])
@pytest.mark.parametrize("seq_q", [1, 3, 21])
def test_the_largest_over_queries_and_heads(seq_q, heads, kv_heads, per_head):
    """256 pages are one piece of work, 16 rows one tile."""
    q, k = problem(seq_q, 300, 1, heads, kv_heads)
    bounds = lcore.page_bounds(k, 1)
    got = check(q, bounds, per_head=per_head)
    assert got.shape == (2, heads if per_head else kv_heads, 300)
    each = torch.stack([lcore.page_scores(q[:, i : i + 1], bounds, per_head=True) for i in range(seq_q)]).amax(0)
    assert_same_bits(got, each if per_head else each.unflatten(1, (kv_heads, -1)).amax(2))


def exact(x):
    return [Fraction(float(value)) for value in x.flatten().double()]


def hard_problems():
    """(name, q, page of keys) with a head_dim of 48, values whose products and sums do not fit float32."""
    rng = random.Random(1)
    for number in range(20):
        q = torch.tensor([rng.uniform(-3, 3) for _ in range(48)])
        k = torch.tensor([[rng.uniform(-3, 3) for _ in range(48)] for _ in range(5)])
        yield f"random {number}", q, k
        yield f"equal keys {number}", q, k[:1].expand(5, 48)
        yield f"cancelling {number}", q.abs(), torch.cat([k, -k], dim=1)[:1, 24:72]
        far = torch.tensor([2.0 ** rng.randint(-60, 60) for _ in range(48)])
        yield f"far apart {number}", q * far, k * far.flip(0)
        yield f"denormal products {number}", q * 1e-19, k * 1e-22
        yield f"denormal keys {number}", q, k * 1e-40
        yield f"halves {number}", q.bfloat16(), k.bfloat16()


def bound_of(q, k, bound_type, scale, flush):
    """The bound of one page of keys, computed by threads that take denormal numbers for 0, or not."""
    torch.set_flush_denormal(flush)
    try:
        bounds = lcore.page_bounds(k[None, :, None], k.shape[0], dtype=bound_type)
        return lcore.page_scores(q[None, None, None], bounds, softmax_scale=scale), bounds
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("scale", [1 / math.sqrt(48), 0.1, -0.3, 1.0])
@pytest.mark.parametrize("flush", [False, True])
def test_no_score_of_the_page_is_above_its_bound(flush, scale):
    """In exact fractions; rounding to nearest fails this."""
    lucky = True
    for name, q, k in hard_problems():
        for bound_type in BOUND_TYPES:
            bound, bounds = bound_of(q, k, bound_type, scale, flush)
            scores = [Fraction(scale) * sum(a * b for a, b in zip(exact(q), exact(key), strict=True)) for key in k]
            assert Fraction(bound.item()) >= max(scores), name
            nearest = reference.page_scores(q[None, None, None].float(), bounds.float(), softmax_scale=scale).item()
            lucky = lucky and (math.isinf(nearest) or Fraction(nearest) >= max(scores))
    assert not lucky, "the inputs are not hard"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound_type", BOUND_TYPES)
def test_what_is_not_known_must_be_read(bound_type, dtype):
    q, k = problem(2, dtype=dtype)
    want = lcore.page_scores(q, lcore.page_bounds(k, 4, dtype=bound_type))
    for value in (math.nan, math.inf, -math.inf):
        bad = k.clone()
        bad[1, 9, 0, 3] = value  # page 2
        got = lcore.page_scores(q, lcore.page_bounds(bad, 4, dtype=bound_type))
        scores = torch.einsum("bqhd,bkd->bqhk", q[:, :, :2].float(), bad[:, 8:12, 0].float())
        assert got[1, 0, 2] == math.inf or not (scores[1] > got[1, 0, 2] / q.shape[-1] ** -0.5).any()
        if math.isnan(value):
            assert got[1, 0, 2] == math.inf
        got[1, 0, 2] = want[1, 0, 2]
        assert_same_bits(got, want)
    none = q.clone()
    none[..., 3] = 0.0
    bad[1, 9, 0, 3] = math.inf  # times 0
    assert lcore.page_scores(none, lcore.page_bounds(bad, 4, dtype=bound_type))[1, 0, 2] == math.inf
    q[1, 1, 3, 3] = math.nan  # of the second kv head
    got = lcore.page_scores(q, lcore.page_bounds(k, 4, dtype=bound_type))
    assert got[1, 1].isposinf().all()
    got[1, 1] = want[1, 1]
    assert_same_bits(got, want)


def test_page_counts_and_lengths():
    q, k = problem(3, pages=6)
    bounds = lcore.page_bounds(k, 4)
    counts, lengths = torch.tensor([[6, 0], [2, 5]], dtype=torch.int32), torch.tensor([2, 3])
    for per_head in (False, True):
        want = check(q, bounds, page_counts=counts, lengths=lengths, per_head=per_head)
        poisoned, padded = bounds.clone(), q.clone()
        padded[0, 2] = math.nan
        for b in range(2):
            for h in range(2):
                poisoned[b, h, int(counts[b, h]) :] = math.nan
        got = lcore.page_scores(padded, poisoned, counts, lengths, per_head=per_head)
        assert_same_bits(got, want)
    assert lcore.page_scores(q, bounds, lengths=torch.tensor([0, 0])).isneginf().all()
    assert lcore.page_scores(q[:, :0], bounds).isneginf().all()
    assert lcore.page_scores(q, bounds[:, :, :0]).shape == (2, 2, 0)


def test_views_threads_and_batch(threads):
    q, k = problem(2, 700, 2, batch=3)
    room = torch.full((3, 2, 900, 2, 24), math.nan, dtype=torch.bfloat16)
    bounds = room[:, :, 100:800]
    bounds.copy_(lcore.page_bounds(k, 2))
    want = lcore.page_scores(q, bounds.contiguous())
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        assert_same_bits(lcore.page_scores(q, bounds), want)
    assert_same_bits(lcore.page_scores(q.transpose(1, 2).contiguous().transpose(1, 2), bounds), want)
    assert_same_bits(lcore.page_scores(q, bounds.transpose(3, 4).contiguous().transpose(3, 4)), want)
    for row in range(3):
        assert_same_bits(lcore.page_scores(q[row : row + 1], bounds[row : row + 1]), want[row : row + 1])


def test_the_caller_rounds_as_before(threads):
    """On every thread of the pool."""
    torch.set_num_threads(4)
    x = torch.rand(1 << 20)
    q, k = problem(1, 3000, 1, 8, 8)
    bounds = lcore.page_bounds(k, 1)
    before = (x / 3, x.sum(), 0.1 + 0.2)
    lcore.page_scores(q, bounds)
    after = (x / 3, x.sum(), 0.1 + 0.2)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_and_no_gradient(dtype):
    q, k = problem(2, dtype=dtype)
    bounds = lcore.page_bounds(k, 4, dtype=torch.float32)
    leaves = (q.requires_grad_(), bounds.requires_grad_())
    torch.library.opcheck(ops.page_scores.default, leaves)
    rest = (torch.tensor([[5, 0], [2, 5]], dtype=torch.int32), torch.tensor([2, 0]), 0.3, True)
    torch.library.opcheck(ops.page_scores.default, (*leaves, *rest))
    for scores in (lcore.page_scores(*leaves), ops.page_scores(*leaves)):
        assert not scores.requires_grad and scores.grad_fn is None
    meta = lcore.page_scores(q.to("meta"), bounds.to("meta"), per_head=True)
    assert meta.shape == (2, 4, 5) and meta.dtype == torch.float32


Q, K = problem()
BOUNDS = lcore.page_bounds(K, 4)
INT = torch.zeros(2, 2, dtype=torch.int32)
NAMES = r"\(batch, kv_heads, pages, 2, head_dim\) = \(2, \*, \*, 2, 24\)"
ERRORS = [
    ({"q": Q.double()}, TypeError, "q must have dtype float32 or float16 or bfloat16, got float64"),
    ({"q": Q[0]}, ValueError, r"q must have shape \(batch, seq_q, heads, head_dim\)"),
    ({"bounds": BOUNDS.half()}, TypeError, "bounds must have dtype bfloat16 or float32, got float16"),
    ({"bounds": BOUNDS[..., :8]}, ValueError, f"bounds must have shape {NAMES}"),
    ({"bounds": BOUNDS[:, :, :, :1]}, ValueError, f"bounds must have shape {NAMES}"),
    ({"q": Q[:, :, :3]}, ValueError, "q must have heads a multiple of kv_heads 2, got 3"),
    ({"page_counts": INT.long()}, TypeError, "page_counts must have dtype int32, got int64"),
    ({"page_counts": INT[:1]}, ValueError, r"page_counts must have shape \(batch, kv_heads\) = \(2, 2\), got \(1, 2\)"),
    ({"lengths": INT[0]}, TypeError, "lengths must have dtype int64, got int32"),
    ({"lengths": torch.tensor([2, 0])}, ValueError, r"lengths must lie in \[0, 1\], got \[2, 0\]"),
    ({"softmax_scale": math.inf}, ValueError, "softmax_scale must be a finite number, got inf"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[case[-1][:50] for case in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=rf"lcore\.page_scores: {message}"):
        lcore.page_scores(**{"q": Q, "bounds": BOUNDS, **change})


DIRECT = [
    ({"q": Q.double()}, "q must have dtype"),
    ({"q": Q[:1]}, "bounds must have shape"),
    ({"bounds": BOUNDS.half()}, "bounds must have dtype"),
    ({"bounds": BOUNDS[:, :, :, :1]}, "bounds must have shape"),
    ({"bounds": BOUNDS.repeat(1, 1, 1, 1, 2)[..., ::2]}, "a page's bounds must be contiguous"),
    ({"page_counts": INT[:1]}, "page_counts must be"),
    ({"lengths": torch.tensor([2, 0])}, r"lengths must lie in \[0, 1\], got 2"),
]


@pytest.mark.parametrize(("change", "message"), DIRECT, ids=[message for _, message in DIRECT])
def test_a_direct_call_of_the_op_cannot_read_outside_its_tensors(change, message):
    with pytest.raises(RuntimeError, match=rf"lcore\.page_scores: {message}"):
        ops.page_scores(**{"q": Q, "bounds": BOUNDS, **change})
