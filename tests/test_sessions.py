"""Caches that come back from a file: the same bytes, the same attention, the same future."""

import inspect
import json

import hypothesis.strategies as st
import pytest
import torch
from cache_cases import (
    NAME_OF,
    Twins,
    all_pages_are_free,
    allocator_of,
    assert_same_contents,
    inside,
    poison,
    pool_of,
    random_kv,
)
from hypothesis import HealthCheck, given, settings
from session_cases import filled_cache, header_of
from tolerance import assert_same_bits

import lcore
from lcore.cache import StoredSession
from lcore.cache.slots import Slots
from lcore.cache.stored_session import OPTIONS

FORMATS = ["fp32", "fp16", "bf16", ("bf16", "fp32")]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.session"


def there_and_back(cache: lcore.PagedCache, path, **options) -> lcore.PagedCache:
    cache.save(path)
    return lcore.PagedCache.load(path, **options)


def assert_same_future(a: lcore.PagedCache, b: lcore.PagedCache, new: int = 37) -> None:
    """Both hold the same, attend alike, and go on alike."""
    for step in (1, new):
        for layer in range(a.num_layers):
            assert_same_contents(a, b, layer)
            k, v = random_kv(a.batch_size, step, a.num_kv_heads, a.head_dim, a.head_dim_v, a.dtype)
            q = torch.randn(a.batch_size, step, 2 * a.num_kv_heads, a.head_dim).to(a.dtype)
            a.append(layer, k, v)
            b.append(layer, k, v)
            assert_same_bits(a.attend(layer, q), b.attend(layer, q))
    for layer in range(a.num_layers):
        assert_same_contents(a, b, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 64])
def test_round_trip(path, dtype, kv_format, length):
    cache = filled_cache(length, dtype=dtype, kv_format=kv_format, head_dim=12, head_dim_v=20)
    loaded = there_and_back(cache, path)
    for name in OPTIONS:
        assert getattr(loaded, name) == getattr(cache, name)
    assert loaded.lengths(1).tolist() == [[length, length]]
    assert loaded.seen().tolist() == [length]
    assert_same_future(cache, loaded)


@pytest.mark.parametrize("page_size", [1, 3, 256])
def test_ragged_rows_and_page_sizes(path, page_size):
    cache = filled_cache(300, 0, 7, 256, page_size=page_size, layers=3, kv_heads=1, head_dim=64)
    assert_same_future(cache, there_and_back(cache, path))


def test_layers_of_unequal_length(path):
    cache = filled_cache(20, 33)
    cache.append(1, *random_kv(2, 50, 2, 8))
    loaded = there_and_back(cache, path)
    assert loaded.lengths(0).tolist() != loaded.lengths(1).tolist() == cache.lengths(1).tolist()
    assert_same_contents(cache, loaded, 0)
    assert_same_contents(cache, loaded, 1)


def test_only_what_is_there_matters(path, tmp_path):
    """What stands in free pages and behind the tails' tokens is neither kept nor told by the file."""
    cache = filled_cache(40, 21)
    cache.save(path)
    fork = cache.fork()
    fork.append(0, *random_kv(2, 100, 2, 8))
    fork.close()
    poison(cache)
    cache.save(tmp_path / "b.session")
    assert path.read_bytes() == (tmp_path / "b.session").read_bytes()
    assert_same_future(cache, lcore.PagedCache.load(path))


def test_pages_are_renumbered_and_only_used_ones_are_kept(path):
    """The pages of a fork stand anywhere in the pool; those of other caches stay out of the file."""
    cache = filled_cache(64)
    fork = cache.fork()
    fork.crop(20)
    cache.append(0, *random_kv(1, 200, 2, 8))
    fork.append(0, *random_kv(1, 100, 2, 8))
    fork.append(1, *random_kv(1, 100, 2, 8))
    ids = inside(fork)[0][..., : 120 // 16].flatten()
    assert (ids.diff() != 1).any()
    loaded = there_and_back(fork, path)
    assert loaded.stats()["pages"] == fork.stats()["pages"] == allocator_of(loaded).num_pages < pool_of(cache).shape[0]
    assert loaded.stats()["free_pages"] == 0
    assert_same_future(fork, loaded)


def share_first_page(cache: lcore.PagedCache) -> None:
    """Makes both rows of a cache name the same first page in each layer and head, as prefix reuse does."""
    slots = cache._slots
    table = slots.table.numpy()
    allocator_of(cache).retain(table[:, 0, :, 0].flatten())
    allocator_of(cache).release(table[:, 1, :, 0].flatten())
    table[:, 1, :, 0] = table[:, 0, :, 0]


def test_pages_shared_by_rows_are_stored_and_counted_once(path):
    cache = filled_cache(40, 40)
    share_first_page(cache)
    loaded = there_and_back(cache, path)
    assert header_of(path)[0]["pages"]["shape"][0] == 2 * 2 * (2 + 1) == pool_of(loaded).shape[0]
    assert_same_contents(cache, loaded)
    shared = int(inside(loaded)[0][0, 0, 0])
    assert shared == inside(loaded)[0][1, 0, 0] and allocator_of(loaded).refcount(shared) == 2
    allocator = allocator_of(loaded)
    loaded.crop(torch.tensor([40, 0]))
    assert allocator.refcount(shared) == 1
    loaded.close()
    assert all_pages_are_free(allocator)


def test_a_loaded_cache_forks_crops_and_gives_its_pages_back(path):
    loaded = there_and_back(filled_cache(50, 70), path)
    allocator = allocator_of(loaded)
    fork = loaded.fork()
    fork.crop(17)
    loaded.close()
    assert fork.lengths(0).tolist() == [[17, 17], [17, 17]]
    fork.close()
    assert all_pages_are_free(allocator)


def test_tokens_and_metadata_come_back(path):
    cache = filled_cache(*range(1, 13))
    tokens = [torch.arange(n, dtype=torch.int32 if n % 2 else torch.int64) + n for n in range(1, 13)]
    cache.save(path, tokens=tokens, metadata={"model": "é", "": "empty"})
    with StoredSession(path) as stored:
        assert stored.metadata == {"model": "é", "": "empty"}
        assert [row.tolist() for row in stored.tokens] == [row.tolist() for row in tokens]
        assert all(row.dtype == torch.int64 for row in stored.tokens)
        assert_same_contents(stored.load(), cache)
    cache.save(path)
    with StoredSession(path) as stored:
        assert stored.tokens is None and stored.metadata == {}


def test_max_bytes_is_honoured(path):
    cache = filled_cache(100)
    exact = there_and_back(cache, path).stats()["bytes"]
    loaded = lcore.PagedCache.load(path, max_bytes=exact)
    assert loaded.stats()["bytes"] == exact and loaded.max_bytes == exact
    with pytest.raises(MemoryError, match=f"max_bytes={exact:,} would fit"):
        lcore.PagedCache.load(path, max_bytes=exact - 1)
    with pytest.raises(MemoryError, match=f"max_bytes={exact:,}"):
        loaded.append(0, *random_kv(1, 100, 2, 8))


def test_a_file_fills_only_an_empty_cache_of_its_settings(path):
    cache = filled_cache(40)
    cache.save(path)
    with StoredSession(path) as stored:
        with pytest.raises(ValueError, match="cache must hold no tokens"):
            stored.fill(cache)
        other = lcore.PagedCache(2, 2, 8, dtype=torch.float32, kv_format=("fp32", "bf16"), page_size=16)
        with pytest.raises(ValueError, match=r"cache.kv_format must be \['fp32', 'fp32'\] .*, got \['fp32', 'bf16'\]"):
            stored.fill(other)
        fork = cache.fork()
        fork.crop(0)
        cache.crop(30)
        stored.fill(fork)  # between the pages of another cache
        loaded = stored.load()
    assert_same_contents(fork, loaded)
    cache.close()
    assert_same_future(fork, loaded)
    assert loaded.stats()["pages"] == fork.stats()["pages"]


def test_every_argument_of_a_cache_is_accounted_for():
    """A new one must be kept in the file, unless it is the loader's choice or has only one value yet."""
    chosen_by_the_loader = {"device", "max_bytes", "overflow", "select"}
    single = {"rotate", "policy"}
    assert set(inspect.signature(lcore.PagedCache).parameters) == {*OPTIONS, *chosen_by_the_loader, *single}


def test_whatever_else_the_slots_know_is_kept(path, monkeypatch):
    """A tensor or array that is added to Slots is in the file without a line of code; its absence is refused."""
    plain = filled_cache(20)
    plain.save(path)
    begin = Slots.__init__

    def extended(self, *args, **options):
        begin(self, *args, **options)
        self.count = torch.zeros(self.lengths.shape[:2], dtype=torch.int64)
        self.mark = torch.ones(self.lengths.shape[1], dtype=torch.bool).numpy()

    monkeypatch.setattr(Slots, "__init__", extended)
    with pytest.raises(
        ValueError, match="have the tensors count, intact, lengths, mark, seen, table, tail_k, tail_v, thinned, got"
    ):
        lcore.PagedCache.load(path)
    cache = filled_cache(20)
    cache._slots.count += 5
    cache._slots.mark[0] = False
    loaded = there_and_back(cache, path)
    assert loaded._slots.count.tolist() == [[5], [5]] and loaded._slots.mark.tolist() == [False]
    assert json.loads(header_of(path)[0]["__metadata__"]["settings"])["page.bytes"] == cache.stats()["page_bytes"]


STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "crop", "fork", "save"]), st.integers(0, 30)), min_size=1, max_size=8
)


@given(steps=STEPS, rows=st.integers(1, 3), page_size=st.sampled_from([1, 3, 16]), kv_format=st.sampled_from(FORMATS))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_steps_with_saves_between(path, steps, rows, page_size, kv_format):
    """After every save the loaded cache goes on in the place of the one that was saved, beside the model."""
    twins = Twins(2, 2, 8, batch_size=rows, page_size=page_size, dtype=torch.bfloat16, kv_format=kv_format)
    for step, n in steps:
        if step == "append":
            twins.append(n, torch.randint(n + 1, (rows,)))
        elif step == "crop":
            twins.crop(n)
        elif step == "fork":
            twins = twins.fork()
        else:
            twins.cache = there_and_back(twins.cache, path)
        twins.check_lengths()
        for layer in range(2):
            twins.check(min(3, int(twins.cache.lengths(layer).min())), 2, None, layer)
    allocator = allocator_of(twins.cache)
    twins.cache.close()
    assert all_pages_are_free(allocator)


@pytest.mark.slow
def test_a_gigabyte_comes_back_in_seconds(path):
    """Counted in bytes: pages are read into the pool itself, so that loading needs no second copy of them."""
    cache = lcore.PagedCache(8, 8, 128)
    cache.reserve(1 << 15)
    k = torch.randn(1, 1 << 15, 8, 128).bfloat16()
    for layer in range(8):
        cache.append(layer, k, k)
    loaded = there_and_back(cache, path)
    assert loaded.stats()["bytes"] == cache.stats()["bytes"] > 1 << 30
    assert torch.equal(pool_of(loaded), pool_of(cache)) and NAME_OF[cache.dtype] == "bf16"
