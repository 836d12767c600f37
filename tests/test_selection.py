"""lcore.selection.Quest in a cache: the pages of the paper's rule, and a bound on what they leave out."""

import itertools

import pytest
import selection_oracles as oracle
import torch
from cache_cases import DTYPE_OF, Twins
from test_cache_memory import held_bytes
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference, selection
from lcore.reference.page_format import through_page

Quest = selection.Quest
pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KV_HEADS, DIM = 6, 2, 32


def quest(budget, **options):
    return Quest(budget, **{"dense_layers": 0, **options})


def filled(tokens, select, *, batch=1, kv_format="fp32", page_size=16, spread=1.0, lengths=None, **options):
    """A cache with one layer, and its keys and values as float64 as the cache holds them."""
    dtype = DTYPE_OF.get(kv_format, torch.float32)
    cache = lcore.PagedCache(
        1, KV_HEADS, DIM, batch_size=batch, dtype=dtype, kv_format=kv_format, page_size=page_size, select=select,
        **options,
    )  # fmt: skip
    k = (torch.randn(batch, tokens, KV_HEADS, DIM) * spread).to(dtype)
    v = torch.randn(batch, tokens, KV_HEADS, DIM).to(dtype)
    cache.append(0, k, v, lengths=lengths)
    full = tokens // page_size * page_size
    if kv_format not in DTYPE_OF:
        layout = cache._slots.layout
        k, v = k.double(), v.double()
        for x, form, value in ((k, layout.k.name, False), (v, layout.v.name, True)):
            for b, h, begin in itertools.product(range(batch), range(KV_HEADS), range(0, full, page_size)):
                page = slice(begin, begin + page_size)
                x[b, page, h] = through_page(x[b, page, h], form, value)
    return cache, k.double(), v.double()


def check(cache, q, k, v, budget, row=0, new=1, **options):
    """attend against attention over the oracle's keys, for one row of the batch."""
    size, group = cache.page_size, HEADS // KV_HEADS
    settings = {"sinks": cache.select.sinks, "recent": cache.select.recent}
    out = cache.attend(0, q, **options)
    dropped = cache.dropped_mass(0)
    for h in range(KV_HEADS):
        heads = slice(h * group, (h + 1) * group)
        own = q[row, :, heads].double()
        own_options = {name: x[heads] if name == "sinks" else x for name, x in options.items()}
        pages, _ = oracle.quest_pages(own, k[row, :, h], size, budget, **settings)
        read = oracle.tokens_of(pages, k.shape[1], size)
        keys, values = (x[row : row + 1, read, h : h + 1] for x in (k, v))
        want = reference.attention(q[row : row + 1, :, heads].double(), keys, values, causal=True, **own_options)[0]
        low = [x.to(q.dtype) for x in (keys, values)]
        working = reference.attention(q[row : row + 1, :, heads], *low, causal=True, **own_options)[0]
        # Factors of integer codes are 16-bit integers: 2^-16 of the largest q and k, over a head's channels.
        floor = 2.0**8 if cache._slots.layout.k.is_integer else 0.0
        assert_close(out[row : row + 1, :, heads], want, working, "out", slack_ulp=32, floor=floor)
        weights = oracle.weights(own, k[row, :, h], **own_options)
        unread = torch.ones(k.shape[1], dtype=torch.bool)
        unread[read] = False
        missed = weights[..., unread].sum(-1).transpose(0, 1)  # (group, new)
        assert (dropped[row, heads].double() >= missed).all()
    return out, dropped


@pytest.mark.parametrize("budget", [2, 5, 11, 18])
@pytest.mark.parametrize("tokens", [304, 305, 319, 320])
def test_reads_the_best_pages(tokens, budget):
    cache, k, v = filled(tokens, quest(budget))
    _, dropped = check(cache, torch.randn(1, 1, HEADS, DIM), k, v, budget)
    assert dropped.shape == (1, HEADS, 1) and (dropped > 0).any() == (budget < tokens // 16)


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "fp16", "fp8", "int8", "int4", "int2"])
def test_formats_are_read_as_they_are_stored(kv_format):
    cache, k, v = filled(400, quest(6), kv_format=kv_format)
    check(cache, torch.randn(1, 1, HEADS, DIM).to(cache.dtype), k, v, 6)


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"sinks": torch.randn(HEADS)}])
def test_softcap_and_sinks(options):
    cache, k, v = filled(400, quest(6))
    check(cache, torch.randn(1, 1, HEADS, DIM), k, v, 6, **options)


@pytest.mark.parametrize("new", [2, 17, 40])
def test_several_tokens_share_their_pages(new):
    cache, k, v = filled(400, quest(9, prefill=True))
    check(cache, torch.randn(1, new, HEADS, DIM), k, v, 9, new=new)
    cache.select = quest(9)
    cache.attend(0, torch.randn(1, new, HEADS, DIM))
    assert not cache.dropped_mass(0).any()


def test_rows_do_not_see_each_other():
    lengths = torch.tensor([400, 33, 250, 0])
    cache, k, v = filled(400, quest(5), batch=4, lengths=lengths)
    q = torch.randn(4, 1, HEADS, DIM)
    counts = torch.tensor([1, 1, 1, 0])
    out = cache.attend(0, q, lengths=counts)
    dropped = cache.dropped_mass(0)
    assert not out[3].any() and not dropped[3].any() and not dropped[1].any() and (dropped[0] > 0).any()
    for row, n in enumerate([400, 33, 250]):
        alone = lcore.PagedCache(1, KV_HEADS, DIM, dtype=torch.float32, kv_format="fp32", page_size=16, select=quest(5))
        alone.append(0, k[row : row + 1, :n].float(), v[row : row + 1, :n].float())
        assert_same_bits(alone.attend(0, q[row : row + 1]), out[row : row + 1])
        assert_same_bits(alone.dropped_mass(0), dropped[row : row + 1])


@pytest.mark.parametrize("mass", [0.5, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_a_mass_budget_is_kept(mass, spread):
    """Pages of one topic each, so that bounds are tight enough to leave pages out."""
    cache, k, v = filled(16, quest(mass), spread=0.0)
    topics = torch.randn(40, 1, KV_HEADS, DIM) * spread
    k = (topics + 0.1 * torch.randn(40, 16, KV_HEADS, DIM)).flatten(0, 1)[None]
    v = torch.randn(1, 640, KV_HEADS, DIM)
    cache.crop(0)
    cache.append(0, k, v)
    q = torch.randn(1, 1, HEADS, DIM) * 2
    out, lse = cache.attend(0, q, return_lse=True)
    dropped = cache.dropped_mass(0)
    assert (dropped <= mass).all()
    want, full = lcore.attention(q, k, v, causal=True, return_lse=True)
    missed = -torch.expm1((lse - full).double())
    assert (missed <= dropped + 1e-6).all()
    difference = (out - want).double().norm(dim=-1) / v.norm(dim=-1).max()
    assert (difference <= 2 * dropped.transpose(1, 2) + 1e-5).all()
    if spread == 3.0 and mass == 0.5:
        assert (dropped > 0).any()


def test_everything_is_read_by_a_large_budget():
    cache, k, v = filled(400, quest(25))
    q = torch.randn(1, 1, HEADS, DIM)
    want = lcore.attention(q, k.float(), v.float(), causal=True)
    torch.testing.assert_close(cache.attend(0, q), want, rtol=1e-5, atol=1e-6)
    assert not cache.dropped_mass(0).any() and cache.stats()["dropped_mass"] == 0


def test_rotated_keys_are_scored_with_rotated_queries():
    k, v = torch.randn(1, 400, KV_HEADS, DIM), torch.randn(1, 400, KV_HEADS, DIM)
    cache = lcore.PagedCache(
        1, KV_HEADS, DIM, dtype=torch.float32, kv_format="fp32", page_size=16, rotate=True, select=quest(6)
    )
    cache.append(0, k, v)
    q = torch.randn(1, 1, HEADS, DIM)
    _, lse = cache.attend(0, q, return_lse=True)
    _, full = lcore.attention(q, k, v, causal=True, return_lse=True)
    missed = -torch.expm1((lse - full).double())
    assert (missed > 0).any() and (missed <= cache.dropped_mass(0) + 1e-6).all()


def test_windows_and_first_layers_read_everything():
    cache = lcore.PagedCache(3, KV_HEADS, DIM, dtype=torch.float32, kv_format="fp32", page_size=16, select=Quest(3))
    k, v = torch.randn(1, 200, KV_HEADS, DIM), torch.randn(1, 200, KV_HEADS, DIM)
    q = torch.randn(1, 1, HEADS, DIM)
    for layer in range(3):
        cache.append(layer, k, v)
        cache.attend(layer, q)
    assert not cache.dropped_mass(1).any() and cache.dropped_mass(2).any()
    windowed = cache.attend(2, q, window_size=(150, 0))
    torch.testing.assert_close(windowed, lcore.attention(q, k, v, causal=True, window_size=(150, 0)))


def test_summaries_follow_the_cache():
    """Appended, cropped, forked and evicted tokens: the pages are those of a cache made afresh."""
    twins = Twins(head_dim=DIM, kv_heads=KV_HEADS, page_size=16, select=quest(4))
    q = torch.randn(1, 1, HEADS, DIM)

    def same(cache):
        fresh = cache.fork()
        fresh._slots.forget_index()
        assert_same_bits(cache.attend(0, q), fresh.attend(0, q))
        assert cache.stats()["bytes"] == held_bytes(cache)

    for step in range(6):
        twins.append(47)
        same(twins.cache)
        twins.crop(int(twins.cache.seen()[0]) - 20 * (step % 3))
        twins.append(30)
        same(twins.cache)
        fork = twins.fork()
        fork.append(40)
        same(fork.cache)
        twins.evict(0.2)
        twins.append(1)
        same(twins.cache)
        fork.cache.close()
    twins.check_lengths()


def test_the_index_counts_against_max_bytes():
    cache, *_ = filled(400, None)
    limit = int(cache.stats()["bytes"])
    cache, *_ = filled(400, quest(4), max_bytes=limit)
    before = cache.stats()
    with pytest.raises(MemoryError, match=r"lcore\.PagedCache\.attend: max_bytes=.* for what the selection knows"):
        cache.attend(0, torch.randn(1, 1, HEADS, DIM))
    assert cache.stats() == before
    cache.select = None
    cache.attend(0, torch.randn(1, 1, HEADS, DIM))


def test_a_cache_can_change_its_selection():
    cache, k, v = filled(400, quest(5))
    check(cache, torch.randn(1, 1, HEADS, DIM), k, v, 5)
    cache.select = selection.InfLLM(6, recent=2, sinks=1)
    assert cache.stats()["index_bytes"] == 0
    cache.attend(0, torch.randn(1, 1, HEADS, DIM))
    cache.select = quest(7)
    check(cache, torch.randn(1, 1, HEADS, DIM), k, v, 7)
    with pytest.raises(TypeError, match="select must be"):
        cache.select = 7
    assert cache.stats()["bytes"] == held_bytes(cache)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Quest(0), ValueError, "Quest: budget must be an integer >= 1, or a fraction"),
        (lambda: Quest(1.5), ValueError, "budget"),
        (lambda: Quest("much"), TypeError, "budget"),
        (lambda: Quest(1), ValueError, r"budget must be >= sinks \+ recent = 2"),
        (lambda: Quest(8, sinks=-1), ValueError, "sinks must be an integer >= 0"),
        (lambda: Quest(8, prefill=1), TypeError, "prefill must be a bool"),
        (lambda: lcore.selection.InfLLM(0.5), TypeError, "InfLLM: budget must be an integer >= 1"),
        (lambda: lcore.selection.parse_selection("best:budget=3"), ValueError, "select must be one of infllm, quest"),
        (lambda: lcore.selection.parse_selection("quest:pages=3"), ValueError, "a setting of quest must be one of"),
        (lambda: lcore.selection.parse_selection("quest"), ValueError, "as in quest:budget=32"),
        (lambda: lcore.PagedCache(1, 1, 8, select="quest"), TypeError, "select must be an lcore.selection.Selection"),
        (lambda: lcore.PagedCache(1, 1, 8).dropped_mass(0), ValueError, "select must be one whose scores are bounds"),
        (lambda: lcore.PagedCache(1, 1, 8, select=Quest(8)).dropped_mass(0), ValueError, "must have been attended to"),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_from_text():
    select = lcore.selection.parse_selection("Quest:budget=0.01,dense_layers=0")
    assert isinstance(select, Quest) and select.budget == 0.01 and select.dense_layers == 0
    assert repr(select).startswith("Quest(budget=0.01, sinks=1")
