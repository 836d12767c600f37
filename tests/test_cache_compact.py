"""torch.ops.lcore.cache_compact_ and PagedCache.evict: what is kept, moved together, bit for bit."""

import hypothesis.strategies as st
import pytest
import torch
from cache_cases import (
    DTYPE_OF,
    NAME_OF,
    Twins,
    allocator_of,
    assert_same_contents,
    inside,
    poison,
    pool_of,
    random_kv,
)
from hypothesis import given, settings

import lcore

ops = torch.ops.lcore


def op_arguments(held=40, keep=None, page_size=16, dim=8, dtype=torch.float32, k_format=None, v_format=None):
    """(2, 2) slots of `held` random tokens in pages and tails; `keep` of each slot stay, where they are."""
    k_format, v_format = k_format or NAME_OF[dtype], v_format or NAME_OF[dtype]
    keep = [[0, 3, 17, 33], [], list(range(held)), [held - 1]] if keep is None else keep
    width = held // page_size + 1
    sides = [-(-page_size * dim * DTYPE_OF[name].itemsize // 64) * 64 for name in (k_format, v_format)]
    pages = [torch.randn(4 * width, side // DTYPE_OF[name].itemsize).to(DTYPE_OF[name])
             for side, name in zip(sides, (k_format, v_format), strict=True)]  # fmt: skip
    table = torch.randperm(4 * width).int().view(2, 2, width)
    return {
        "pool": torch.cat([side.view(torch.uint8) for side in pages], dim=1).contiguous(),
        "page_table": table,
        "kv_lengths": torch.full((2, 2), held, dtype=torch.int32),
        "tail_k": torch.randn(2, 2, page_size, dim).to(dtype),
        "tail_v": torch.randn(2, 2, page_size, dim).to(dtype),
        "new_table": table.clone(),
        "keep": torch.tensor([token for slot in keep for token in slot], dtype=torch.int32),
        "offsets": torch.tensor([0, *(len(x) for x in keep)]).cumsum(0),
        "k_format": k_format,
        "v_format": v_format,
        "page_size": page_size,
    }


def rows_of(arguments, slot, side):
    """The tokens of a slot in float64: those in pages, then those of the tail."""
    size, dim = arguments["page_size"], arguments["tail_k"].shape[-1]
    dtypes = [DTYPE_OF[arguments[name]] for name in ("k_format", "v_format")]
    begin = -(-size * dim * dtypes[0].itemsize // 64) * 64 if side else 0
    length = int(arguments["kv_lengths"].flatten()[slot])
    ids = arguments["page_table"].flatten(0, 1)[slot, : length // size].long()
    codes = arguments["pool"][ids][:, begin : begin + size * dim * dtypes[side].itemsize].contiguous()
    tail = arguments[("tail_k", "tail_v")[side]].flatten(0, 1)[slot, : length % size]
    return torch.cat([codes.view(dtypes[side]).double().view(-1, dim), tail.double()])


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("k_format", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_stays_is_what_a_gather_gives(dtype, k_format, page_size):
    held = 3 * page_size + page_size // 2
    masks = [torch.rand(held) < share for share in (0.9, 0.5, 0.02, 1.0)]
    keep = [mask.nonzero().flatten().tolist() for mask in masks]
    arguments = op_arguments(held, keep, page_size, dtype=dtype, k_format=k_format, v_format="fp32")
    before = [[rows_of(arguments, slot, side) for side in (0, 1)] for slot in range(4)]
    ops.cache_compact_(**arguments)
    assert arguments["kv_lengths"].flatten().tolist() == [len(x) for x in keep]
    for slot in range(4):
        for side, page_dtype in enumerate((DTYPE_OF[k_format], torch.float32)):
            want = before[slot][side][keep[slot]]
            paged = len(keep[slot]) // page_size * page_size
            was_paged = torch.tensor(keep[slot], dtype=torch.int64)[:, None] < held // page_size * page_size
            # Rounded only where a token changes its type: into a page, or out of one.
            want[:paged] = torch.where(was_paged[:paged], want[:paged], want[:paged].to(page_dtype).double())
            want[paged:] = torch.where(was_paged[paged:], want[paged:].to(dtype).double(), want[paged:])
            assert torch.equal(rows_of(arguments, slot, side), want), (slot, side)


def test_opcheck():
    torch.library.opcheck(ops.cache_compact_.default, tuple(op_arguments().values()))
    torch.library.opcheck(ops.cache_compact_.default, tuple(op_arguments(dtype=torch.bfloat16).values()))


def test_a_finite_number_stays_finite_and_is_the_same_in_a_page_again():
    k = torch.full((1, 32, 1, 4), 65504.0).half()
    k[0, 1::2] = torch.inf
    cache = lcore.PagedCache(1, 1, 4, dtype=torch.float16, kv_format="bf16", page_size=16)
    cache.append(0, k, k)
    assert (k[0, 0].bfloat16() == 65536).all()
    cache.evict(0, torch.arange(32)[None, None] >= 20)
    tail = inside(cache)[2][0, 0, :12]
    assert torch.equal(tail, k[0, 20:, 0])
    cache.append(0, k[:, :4], k[:, :4])
    page = inside(cache)[0][0, 0, 0].item()
    assert torch.equal(pool_of(cache)[page, :128].view(torch.bfloat16).view(16, 4), k[0, :16, 0].bfloat16())


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_evict_then_append_then_attend(page_size):
    twins = Twins(layers=2, batch_size=2, page_size=page_size, kv_heads=3)
    twins.append(150, torch.tensor([150, 90]))
    for share in (0.0, 0.3, 0.9):
        twins.evict(share, layer=1)
        twins.append(40, torch.tensor([7, 40]))
        twins.check_lengths()
        for layer in range(2):
            twins.check(40, 2, torch.tensor([7, 40]), layer)
    poison(twins.cache)
    twins.check(7, layer=1)


def test_shared_pages_are_never_written_and_untouched_ones_stay_shared():
    root = Twins(page_size=16, batch_size=2)
    root.append(100)
    fork = root.fork()
    pages = pool_of(root.cache).clone()
    shared = inside(root.cache)[0][..., :6].clone()
    keep = torch.ones(2, 2, 100, dtype=torch.bool)
    keep[0, 0, 40] = keep[1, 1, 3] = keep[1, 1, 98] = False
    for held in (fork.cache, fork.model):
        held.evict(0, keep)
    assert torch.equal(pool_of(root.cache)[: len(pages)], pages)
    table = inside(fork.cache)[0][..., :6]
    kept = table == shared
    assert kept[0, 0].tolist() == [True, True, False, False, False, False]
    assert kept[0, 1].all() and kept[1, 0].all() and not kept[1, 1].any()
    assert [allocator_of(root.cache).refcount(int(page)) for page in shared[0, 0]] == [2, 2, 1, 1, 1, 1]
    root.check(20)
    fork.check(1)
    root.cache.close()
    before = fork.cache.stats()["free_pages"]
    fork.cache.evict(0, torch.rand(2, 2, 100) > 0.5)
    assert fork.cache.stats()["free_pages"] > before


def test_pages_are_copied_only_when_others_hold_them():
    twins = Twins(page_size=16)
    twins.append(100)
    pages = allocator_of(twins.cache).num_pages
    table = inside(twins.cache)[0].clone()
    twins.evict(0.5)
    assert allocator_of(twins.cache).num_pages == pages
    full = int(twins.cache.lengths(0).min()) // 16
    assert torch.equal(inside(twins.cache)[0][..., :full], table[..., :full])


def test_no_room_for_copies_changes_nothing():
    root = Twins(page_size=16, max_bytes=60_000)
    root.append(100)
    fork = root.fork()
    reserved = root.cache._slots.pool
    while reserved.allocator.free_count:
        reserved.allocator.allocate(1)
    reserved.max_bytes = reserved.member_bytes + reserved.data.nbytes
    before = [x.clone() for x in inside(fork.cache)]
    with pytest.raises(MemoryError, match=r"^lcore\.PagedCache\.evict: max_bytes=.* are needed for \d+ pages"):
        fork.evict(0.5)
    for a, b in zip(before, inside(fork.cache), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    fork.check(5)
    root.cache.close()
    fork.evict(0.5)
    fork.check(0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), page_size=st.sampled_from([1, 3, 16]), seed=st.integers(0, 2**31))
def test_any_mask(data, page_size, seed):
    torch.manual_seed(seed)
    twins = Twins(kv_heads=2, head_dim=5, page_size=page_size, kv_format="bf16")
    other = twins.fork() if data.draw(st.booleans()) else None
    for _ in range(3):
        twins.append(data.draw(st.integers(0, 40)))
        if data.draw(st.booleans()):
            other = twins.fork()
        twins.evict(data.draw(st.floats(0, 1)))
    twins.check_lengths()
    twins.append(1)
    twins.check(1, 2)
    if other is not None:
        other.check_lengths()
        other.append(1)
        other.check(1)
    poison(*(t.cache for t in (twins, other) if t is not None))
    twins.check(1)


def test_crop_after_eviction():
    twins = Twins(page_size=16, layers=2)
    twins.append(60)
    keep = torch.ones(1, 2, 60, dtype=torch.bool)
    keep[0, 1, 20:30] = False
    for held in (twins.cache, twins.model):
        held.evict(1, keep)
    twins.append(10)
    with pytest.raises(ValueError, match=r"^lcore\.PagedCache\.crop: n must be 0 or >= \[30\], where a policy"):
        twins.cache.crop(29)
    twins.check_lengths()
    for n in (70, 64, 30):
        twins.crop(n)
        twins.check_lengths()
        assert twins.cache.seen(1).item() == n and twins.cache.lengths(1).tolist() == [[n, n - 10]]
    twins.append(20)
    twins.check(20, layer=1)
    twins.crop(0)
    fresh = Twins(page_size=16, layers=2)
    k, v = random_kv(1, 40, 2, 16)
    for cache in (twins.cache, fresh.cache):
        cache.append(1, k, v)
        cache.crop(17)  # nothing has been evicted from this text
    assert_same_contents(twins.cache, fresh.cache, 1)


def test_distances_and_queries_that_eviction_has_lost():
    twins = Twins(page_size=16)
    twins.append(60)
    q = torch.randn(1, 5, 2, 16)
    twins.cache.attend(0, q, window_size=(8, 0))
    keep = torch.ones(1, 2, 60, dtype=torch.bool)
    keep[..., 57] = False
    twins.cache.evict(0, keep)
    with pytest.raises(ValueError, match=r"window_size must not be given once the layer has evicted .*\(8, 0\)"):
        twins.cache.attend(0, q[:, :1], window_size=(8, 0))
    with pytest.raises(ValueError, match="alibi_slopes must not be given once"):
        twins.cache.attend(0, q[:, :1], alibi_slopes=torch.ones(2))
    with pytest.raises(ValueError, match=r"q must have at most \[2\] rows, the tokens seen since .* got 5"):
        twins.cache.attend(0, q)
    twins.cache.attend(0, q[:, :2])


def ids(*values):
    return lambda x: torch.tensor(values, dtype=x.dtype)


BAD = [
    ("keep", ids(0, 3, 3, 33, *range(40), 39), "rise"),
    ("keep", ids(0, 3, 17, 33, *range(40), 40), "tokens that it holds, got 40"),
    ("keep", ids(-1, 3, 17, 33, *range(40), 39), "tokens that it holds, got -1"),
    ("keep", lambda x: x.long(), "keep must be int32"),
    ("keep", lambda x: x[:-1], "from 0 to the number"),
    ("offsets", ids(0, 4, 4, 44), "entries"),
    ("offsets", ids(0, 4, 3, 44, 45), "must not fall"),
    ("offsets", ids(0, 4, 99, 44, 45), "must not fall"),
    ("offsets", ids(1, 4, 4, 44, 45), "from 0"),
    ("offsets", lambda x: x.int(), "offsets int64"),
    ("new_table", lambda x: x[..., :1], "."),
    ("new_table", lambda x: x[..., :1].contiguous(), "wide enough"),
    ("new_table", lambda x: x - 99, "ids of the pool"),
    ("new_table", lambda x: x + 99, "ids of the pool"),
    ("new_table", lambda x: x[:1], "batch, kv_heads"),
    ("new_table", lambda x: x.long(), "int32"),
    ("page_table", lambda x: x + 99, "ids of the pool"),
    ("kv_lengths", lambda x: x + 1000, "kv_lengths"),
    ("tail_k", lambda x: x.double(), "dtype"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_arguments_are_errors_and_write_nothing(name, change, message):
    arguments = op_arguments()
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        ops.cache_compact_(**{**arguments, name: change(arguments[name])})
    for key, x in before.items():
        assert torch.equal(arguments[key], x)


def test_bad_masks_are_errors():
    twins = Twins(page_size=16)
    twins.append(20)
    with pytest.raises(ValueError, match=r"keep must have shape \(batch, kv_heads, tokens\) = \(1, 2, 20\), got"):
        twins.cache.evict(0, torch.ones(1, 2, 19, dtype=torch.bool))
    with pytest.raises(TypeError, match="keep must have dtype bool, got int64"):
        twins.cache.evict(0, torch.ones(1, 2, 20, dtype=torch.int64))
    with pytest.raises(ValueError, match="layer must be an integer in"):
        twins.cache.evict(1, torch.ones(1, 2, 20, dtype=torch.bool))
