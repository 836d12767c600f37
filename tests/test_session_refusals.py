"""Arguments, settings and contents of session files that are refused, before anything has changed."""

import pytest
import torch
from cache_cases import all_pages_are_free, allocator_of, assert_same_contents, random_kv
from session_cases import filled_cache, header_of

import lcore
from lcore.cache import StoredSession
from lcore.cache.session_file import write_session
from lcore.cache.stored_session import settings, slot_tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.session"


def test_an_entry_of_metadata_that_differs_is_named(path):
    cache = filled_cache(3)
    cache.save(path, metadata={"model": "a", "rope": "1"})
    assert_same_contents(lcore.PagedCache.load(path, metadata={"rope": "1"}), cache)
    with pytest.raises(ValueError, match=r"^lcore.PagedCache.load: metadata.rope must be '1' as in .*, got '2'$"):
        lcore.PagedCache.load(path, metadata={"model": "a", "rope": "2"})
    with pytest.raises(ValueError, match=r"metadata.x must be None as in the session file .*, got 'y'"):
        lcore.PagedCache.load(path, metadata={"x": "y"})


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (ValueError, r"tokens must have an entry for each of the 2 rows, got 1", {"tokens": [torch.arange(3)]}),
        (ValueError, r"tokens\[1\] must have the \[5\] tokens that the layers saw, got 4",
         {"tokens": [torch.arange(3), torch.arange(4)]}),
        (ValueError, r"tokens\[0\] must have shape", {"tokens": [torch.zeros(1, 3).long(), torch.arange(5)]}),
        (TypeError, r"tokens\[0\] must have dtype int64 or int32", {"tokens": [torch.zeros(3), torch.arange(5)]}),
        (TypeError, r"tokens\[0\] must be a torch.Tensor, got list", {"tokens": [[1, 2, 3], torch.arange(5)]}),
        (TypeError, r"metadata must hold strings, got \('a', 1\)", {"metadata": {"a": 1}}),
    ],
)  # fmt: skip
def test_bad_arguments_leave_no_file(path, error, text, options):
    with pytest.raises(error, match=r"^lcore\.PagedCache\.save: " + text):
        filled_cache(3, 5).save(path, **options)
    assert not list(path.parent.iterdir())


def test_a_closed_cache_and_a_folder(path):
    cache = filled_cache(3)
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        cache.save(path)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="none"):
        cache.save(path / "none" / "a")
    cache.close()
    with pytest.raises(ValueError, match=r"PagedCache.save: the cache must be open, got a closed one"):
        cache.save(path / "a")


def test_a_damaged_page_gives_the_room_back(path):
    filled_cache(40).save(path)
    data = bytearray(path.read_bytes())
    data[header_of(path)[1] + 1] ^= 1
    path.write_bytes(data)
    cache = lcore.PagedCache(2, 2, 8, dtype=torch.float32, kv_format="fp32", page_size=16)
    with StoredSession(path) as stored, pytest.raises(ValueError, match="page 0 of 8 is damaged"):
        stored.fill(cache)
    assert all_pages_are_free(allocator_of(cache)) and cache.stats()["tokens"] == 0
    cache.append(0, *random_kv(1, 40, 2, 8))


@pytest.mark.parametrize("value", [-1, 2**31 - 1])
def test_lengths_that_cannot_be(path, value, monkeypatch):
    cache = filled_cache(40)
    copies = {"lengths": torch.full_like(cache._slots.lengths, value)}
    monkeypatch.setattr("lcore.cache.sessions._copies", lambda slots: {**_tensors(slots), **copies})
    cache.save(path)
    with pytest.raises(ValueError, match="name a page for every full one"):
        lcore.PagedCache.load(path)


def _tensors(slots):
    return {name: tensor.clone() for name, tensor in slot_tensors(slots).items()}


@pytest.mark.parametrize(("entry", "text"), [(99, "name each of its pages"), (-1, "name each"), (1, "name each")])
def test_a_table_that_names_other_pages(path, entry, text, monkeypatch):
    cache = filled_cache(40)

    def wrong(name, path, strings, pool, ids, tensors, using):
        tensors["table"][0, 0, 0, 0] = entry
        write_session(name, path, strings, pool, ids, tensors, using)

    monkeypatch.setattr("lcore.cache.sessions.write_session", wrong)
    cache.save(path)
    with pytest.raises(ValueError, match=text):
        lcore.PagedCache.load(path)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("num_layers", 3, r"have lengths int32 \(3, 1, 2\)"),
        ("batch_size", 0, "batch_size must be an integer >= 1"),
        ("dtype", "int8", "dtype must be float32"),
        ("dtype", "nothing", "nothing"),
        ("kv_format", ["int3", "fp32"], "int3"),
        ("page_size", 32, "cache.page.page_size must be 16"),
        ("head_dim", "8", "head_dim"),
    ],
)
def test_settings_that_do_not_fit(path, name, value, text, monkeypatch):
    monkeypatch.setattr("lcore.cache.sessions.settings", lambda cache: {**settings(cache), name: value})
    filled_cache(40).save(path)
    with pytest.raises(ValueError, match=text):
        lcore.PagedCache.load(path)
