"""lcore.select_pages: the largest scores of each kv head, and the weight of the others."""

import pytest
import torch
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

ops = torch.ops.lcore


def problem(pages=37, heads=4, kv_heads=2, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, pages, generator=generator) * 5
    ranked = torch.randint(0, pages + 1, (batch, kv_heads), generator=generator, dtype=torch.int32)
    read = (ranked * torch.rand(batch, kv_heads, generator=generator)).int()
    return scores, ranked, read


def check(scores, ranked, read, **arguments):
    pages, unread = lcore.select_pages(scores, ranked, read, **arguments)
    want, weight = reference.select_pages(scores.double(), ranked, read, **arguments)
    _, working = reference.select_pages(scores, ranked, read, **arguments)
    assert torch.equal(pages, want) and pages.dtype == torch.int32 and unread.dtype == torch.float32
    assert_close(unread, weight, working, "unread", slack_ulp=16)
    return pages, unread


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 16, 17, 63, 64, 65, 257, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1)])
def test_values(pages, heads, kv_heads):
    for seed in range(3):
        check(*problem(pages, heads, kv_heads, seed=seed))


@pytest.mark.parametrize("sinks", [0, 1, 3, 5])
def test_sinks_come_first(sinks):
    scores, ranked, read = problem(40)
    scores[..., :5] = -50
    pages, _ = check(scores, ranked.fill_(30), read.fill_(5), sinks=sinks)
    assert (pages[..., : min(sinks, 5)] == torch.arange(min(sinks, 5))).all()


def test_equal_scores_are_taken_in_order():
    scores = torch.zeros(1, 2, 50)
    pages, unread = check(scores, torch.full((1, 1), 50, dtype=torch.int32), torch.full((1, 1), 20, dtype=torch.int32))
    assert pages[0, 0].tolist() == list(range(20))
    assert unread[0].tolist() == pytest.approx([3.4011974] * 2)


def test_all_none_and_what_is_behind():
    scores, ranked, read = problem(20)
    scores[..., 12:] = torch.nan
    pages, unread = check(scores, ranked.fill_(12), read.fill_(12))
    assert (unread == -torch.inf).all() and (pages == torch.arange(12)).all()
    pages, unread = check(scores, ranked, read.zero_(), width=3)
    assert (pages == -1).all() and unread.isfinite().all()
    pages, unread = lcore.select_pages(scores, ranked.zero_(), read)
    assert pages.shape == (2, 2, 0) and (unread == -torch.inf).all()


def test_infinities_and_nan():
    scores, ranked, read = problem(20)
    scores[0, 0, 3], scores[0, 1, 4], scores[1, 2, 5] = torch.nan, torch.inf, -torch.inf
    pages, unread = check(scores, ranked.fill_(20), read.fill_(2))
    assert pages[0, 0].tolist() == [3, 4]
    _, unread = check(scores, ranked, read.fill_(1))
    assert unread[0, 1] == torch.inf and unread[0, 0].isfinite()


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_batch_or_threads(threads):
    scores, ranked, read = problem(300, batch=5)
    whole = lcore.select_pages(scores, ranked, read)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for b in range(5):
            rows = slice(b, b + 1)
            pages, unread = lcore.select_pages(scores[rows], ranked[rows], read[rows], width=whole[0].shape[2])
            assert torch.equal(pages, whole[0][rows])
            assert_same_bits(unread, whole[1][rows])
    finally:
        torch.set_num_threads(before)


def test_opcheck_and_compile():
    scores, ranked, read = problem()
    torch.library.opcheck(ops.select_pages.default, (scores.requires_grad_(), ranked, read, 1, int(read.max())))
    compiled = torch.compile(lambda *x: lcore.select_pages(*x, width=37), fullgraph=True, backend="aot_eager")
    pages, unread = compiled(scores.detach(), ranked, read)
    want = lcore.select_pages(scores, ranked, read, width=37)
    assert torch.equal(pages, want[0]) and torch.equal(unread, want[1]) and not want[1].requires_grad


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scores": torch.zeros(2, 4, 37, dtype=torch.float64)}, TypeError, "scores must have dtype"),
        ({"scores": torch.zeros(2, 37)}, ValueError, "scores must have shape"),
        ({"ranked": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, "a multiple of kv_heads 3, got 4"),
        ({"ranked": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "ranked must have dtype"),
        ({"ranked": torch.full((2, 2), 38, dtype=torch.int32)}, ValueError, "0 <= read <= ranked <= 37"),
        ({"read": torch.full((2, 2), 38, dtype=torch.int32)}, ValueError, "0 <= read <= ranked <= 37"),
        ({"read": torch.full((2, 2), -1, dtype=torch.int32)}, ValueError, "0 <= read <= ranked <= 37"),
        ({"sinks": -1}, ValueError, "sinks must be >= 0"),
        ({"width": 0}, ValueError, "width must be >="),
    ],
)
def test_errors(change, error, text):
    scores, ranked, read = problem()
    arguments = {"scores": scores, "ranked": ranked, "read": read, **change}
    with pytest.raises(error, match=r"lcore\.select_pages: .*" + text):
        lcore.select_pages(**arguments)


def test_a_direct_call_cannot_read_outside():
    scores, ranked, read = problem()
    many, some = torch.full_like(ranked, 99), torch.full_like(ranked, 20)
    for bad in ((scores, many, read, 0, 40), (scores, some, some, 0, 3)):
        with pytest.raises(RuntimeError, match="select_pages"):
            ops.select_pages(*bad)
