"""Selections over keys that are stored before RoPE: pages keep the positions that they have in the cache."""

import pytest
import torch
from cache_cases import DTYPE_OF, NAME_OF, Twins, random_kv
from placement_cases import Pair
from test_cache_ops import attend_arguments
from test_page_bounds import paged_arguments
from tolerance import assert_same_bits

import lcore
from lcore import reference, selection
from lcore.positions import RopeConfig, Rotation

ops = torch.ops.lcore
pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KV_HEADS, DIM = 6, 2, 32
LLAMA = Rotation.of(RopeConfig(), DIM)
PARTIAL = Rotation(torch.rand(9, generator=torch.Generator().manual_seed(1)), 1.2)
INTERLEAVED = Rotation(PARTIAL.inv_freq, 0.9, interleaved=True)


def quest(budget, **options):
    return selection.Quest(budget, **{"dense_layers": 0, **options})


def new_cache(kv_format="fp32", rope=LLAMA, page_size=16, dtype=None, **options):
    dtype = dtype or DTYPE_OF.get(kv_format, torch.float32)
    sizes = {"kv_format": kv_format, "page_size": page_size, "dtype": dtype, "rope": rope}
    return lcore.PagedCache(1, KV_HEADS, DIM, **sizes, **options)


def turned(x, first, rope):
    """x (batch, n, heads, dim) in float64 at positions first, first + 1, ..."""
    places = torch.arange(first, first + x.shape[1])
    options = {"attention_scaling": rope.attention_scaling, "interleaved": rope.interleaved}
    return reference.rope(x.double(), places, rope.frequencies, **options)


def stored(cache):
    """(1, tokens, kv_heads, dim) float64: keys as pages give them back."""
    fork = cache.fork()
    fork.rope = None
    layer = selection.LayerPages(fork._slots, 0, None, None)
    full = int(cache.lengths(0)[0, 0]) // cache.page_size
    return layer.keys(0, full).flatten(2, 3).transpose(1, 2).double()


@pytest.mark.parametrize("rope", [LLAMA, PARTIAL, INTERLEAVED], ids=["llama", "partial", "interleaved"])
@pytest.mark.parametrize(
    ("kv_format", "page_size"), [("fp32", 16), ("fp32", 5), ("bf16", 50), ("fp8", 32), ("int4", 64)]
)
def test_bounds_are_of_rotated_keys(kv_format, page_size, rope):
    cache = new_cache(kv_format, rope, page_size)
    cache.append(0, *(x.to(cache.dtype) for x in random_kv(1, 330, KV_HEADS, DIM)))
    k = turned(stored(cache), 0, rope)
    want = reference.page_bounds(k, page_size)
    got = cache.page_bounds(0, dtype=torch.float32).double()
    # Attention itself may round what it has rotated to bfloat16.
    torch.testing.assert_close(got, want, rtol=2**-8 if kv_format == "bf16" else 1e-6, atol=1e-6)
    outward = cache.page_bounds(0).double()
    assert (outward[..., 0, :] <= got[..., 0, :]).all() and (outward[..., 1, :] >= got[..., 1, :]).all()
    assert_same_bits(cache.page_bounds(0, 2, 4), cache.page_bounds(0)[:, :, 2:4].contiguous())


def test_a_nan_is_in_both_channels_of_its_pair():
    cache = new_cache()
    k, v = random_kv(1, 48, KV_HEADS, DIM)
    k[0, 20, 1, 3] = torch.nan
    cache.append(0, k, v)
    bounds = cache.page_bounds(0)
    assert bounds[0, 1, 1, :, [3, 3 + DIM // 2]].isnan().all() and int(bounds.isnan().sum()) == 4


@pytest.mark.parametrize("select", [quest(5), quest(0.3), selection.InfLLM(5, recent=2, sinks=1, local_tokens=32)])
@pytest.mark.parametrize("rope", [LLAMA, INTERLEAVED], ids=["llama", "interleaved"])
def test_it_reads_what_a_cache_after_rope_reads(select, rope):
    before, after = (new_cache(rope=x, select=select) for x in (rope, None))
    at = {"inv_freq": rope.frequencies, "interleaved": rope.interleaved, "attention_scaling": rope.attention_scaling}
    for new in (300, 1, 90, 1, 1):
        first = int(before.seen()[0])
        k, v = random_kv(1, new, KV_HEADS, DIM)
        q = torch.randn(1, new, HEADS, DIM)
        places = torch.arange(first, first + new)
        before.append(0, k, v)
        after.append(0, lcore.rope(k, places, **at), v)
        got, lse = before.attend(0, q, return_lse=True)
        want, want_lse = after.attend(0, lcore.rope(q, places, **at), return_lse=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
        if select.certified:
            torch.testing.assert_close(before.dropped_mass(0), after.dropped_mass(0), rtol=1e-3, atol=1e-6)
    assert len(before._slots.index.summaries[0][0, 0]) > 5


@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "bf16", "fp8", "int8", "int4", "int2", ("int4", "bf16")])
@pytest.mark.parametrize("dtype", NAME_OF)
def test_the_mass_that_is_missing_is_not_above_the_bound(dtype, kv_format):
    """Over pages of one topic each: bounds near the keys, and far from the mean."""
    cache = new_cache(kv_format, dtype=dtype, select=quest(4))
    topics = 3 * torch.randn(20, 1, KV_HEADS, DIM)
    k = (topics + 0.1 * torch.randn(20, 16, KV_HEADS, DIM)).flatten(0, 1)[None].to(dtype)
    cache.append(0, k, torch.randn(1, 320, KV_HEADS, DIM).to(dtype))
    for _ in range(8):
        q = torch.randn(1, 1, HEADS, DIM).to(dtype)
        _, lse = cache.attend(0, q, return_lse=True)
        scores = torch.einsum(
            "bihd,bjhd->bhij",
            turned(q, 319, LLAMA),
            turned(stored(cache), 0, LLAMA).repeat_interleave(HEADS // KV_HEADS, 2),
        )
        full = (scores / DIM**0.5).logsumexp(-1)
        missed = -torch.expm1(lse.double() - full)
        # A kernel that rounds rotated keys and queries to bfloat16 has its own scores: 2^-8 of them.
        slack = 1e-5 if dtype != torch.bfloat16 or kv_format != "bf16" else 0.05
        assert (missed <= cache.dropped_mass(0) + slack).all()
        assert (cache.dropped_mass(0) > 0).any()


def test_heads_of_unequal_length_have_places_of_their_own():
    twins = Twins(head_dim=DIM, kv_heads=KV_HEADS, page_size=16, rope=PARTIAL, select=quest(4))
    twins.append(400)
    for share in (0.0, 0.3, 0.5):
        if share:
            twins.evict(share)
        twins.append(17)
        q = torch.randn(1, 1, HEADS, DIM)
        got = twins.cache.attend(0, q)
        fresh = twins.cache.fork()
        fresh._slots.forget_index()
        assert_same_bits(fresh.attend(0, q), got)
        _, lse = twins.cache.attend(0, q, return_lse=True)
        whole = twins.cache.fork()
        whole.select = None
        _, full = whole.attend(0, q, return_lse=True)
        assert (-torch.expm1((lse - full).double()) <= twins.cache.dropped_mass(0) + 1e-5).all()
    twins.cache.select = quest(100)
    twins.check(1, group=3)


@pytest.mark.parametrize("kv_format", ["bf16", "int4"])
def test_prompts_are_selected_from_too(kv_format):
    cache = new_cache(kv_format, select=quest(6, prefill=True))
    every = new_cache(kv_format)
    k, v = (x.to(cache.dtype) for x in random_kv(1, 400, KV_HEADS, DIM))
    for one in (cache, every):
        one.append(0, k, v)
    q = torch.randn(1, 40, HEADS, DIM).to(cache.dtype)
    got, lse = cache.attend(0, q, return_lse=True)
    _, full = every.attend(0, q, return_lse=True)
    missed = -torch.expm1((lse - full).double())
    assert (missed > 0).any() and (missed <= cache.dropped_mass(0) + 1e-5).all()
    cache.select = quest(25, prefill=True)
    assert_same_bits(cache.attend(0, q), every.attend(0, q))
    assert got.isfinite().all()


def test_pages_on_a_disk_are_read_part_by_part():
    rope = Rotation.of(RopeConfig(), 64)
    pair = Pair(1, 4, 64, hot=8 * 16384, dtype=torch.bfloat16, kv_format="bf16", page_size=64, rope=rope,
                select=quest(6))  # fmt: skip
    pair.step(2000)
    for _ in range(3):
        pair.step(1)


@pytest.mark.parametrize("places", [[5, 6, 9], [0, 1, 2]])
def test_places_in_a_direct_call(places):
    """Keys of the pages given stand where those of their places would: over zeros in between, which weigh nothing."""
    rope = {"inv_freq": torch.rand(3), "attention_scaling": 1.5, "interleaved": True}
    arguments = attend_arguments(held=40)
    arguments["pool"].view(torch.float32).normal_()
    given = torch.tensor(places, dtype=torch.int32).expand(2, 2, 3).contiguous()
    torch.library.opcheck(ops.attention_paged.default, tuple(arguments.values()), {**rope, "places": given})
    _, lse = ops.attention_paged(**arguments, **rope, places=given)
    pages = arguments["pool"][arguments["page_table"][..., :2].long()].view(torch.float32)
    k = torch.cat([pages[..., : 16 * 8].unflatten(-1, (16, 8)).flatten(2, 3), arguments["tail_k"][:, :, :8]], 2)
    at = (torch.tensor(places)[:, None] * 16 + torch.arange(16)).flatten()[:40]
    k = reference.rope(k.transpose(1, 2).double(), at, **rope).repeat_interleave(2, 2)
    q = reference.rope(arguments["q"].double(), at[-3:], **rope)
    scores = 0.3 * torch.einsum("bihd,bjhd->bhij", q, k)
    scores.masked_fill_(torch.arange(40) > 37 + torch.arange(3)[:, None], -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x: x[..., :2].contiguous(), "an entry for every full page and one for the tail"),
        (lambda x: x - 9, "places must be >= 0"),
        (lambda x: x.long(), "places must be contiguous int32"),
        (lambda x: x[:1], "places must be contiguous int32 of shape"),
    ],
)
def test_wrong_places_are_refused(change, error):
    places = torch.arange(3, dtype=torch.int32).expand(2, 2, 3).contiguous()
    with pytest.raises(RuntimeError, match=error):
        ops.attention_paged(**attend_arguments(held=40), inv_freq=torch.rand(3), places=change(places))


def test_bounds_in_a_direct_call():
    rope = {"inv_freq": torch.rand(3), "attention_scaling": 1.5, "interleaved": True}
    torch.library.opcheck(ops.page_bounds_paged.default, tuple(paged_arguments().values()), rope)


def test_pages_must_be_whole_vectors():
    for make in (
        lambda: new_cache(page_size=24, select=quest(5)),
        lambda: setattr(new_cache(page_size=24), "select", quest(5)),
    ):
        with pytest.raises(ValueError, match="page_size must be a multiple of 16 for a selection with rope"):
            make()
