"""lcore._runtime.PageAllocator: which pages are free, and who holds the others."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcore._runtime import OutOfPages, PageAllocator


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_allocates_the_lowest_free_ids():
    pages = PageAllocator(200)
    first = pages.allocate(130)
    assert first.dtype == np.int32
    assert first.tolist() == list(range(130))
    assert pages.release(ids(128, 3, 64, 63)) == 4
    assert pages.allocate(6).tolist() == [3, 63, 64, 128, 130, 131]
    assert (pages.free_count, pages.num_pages) == (68, 200)


def test_ids_outlive_the_allocator():
    taken = PageAllocator(5).allocate(5)
    assert taken.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65])
def test_takes_every_page_and_no_more(size):
    pages = PageAllocator(size)
    assert pages.allocate(size).tolist() == list(range(size))
    assert pages.allocate(0).tolist() == []
    with pytest.raises(OutOfPages, match="1 pages needed, 0 free"):
        pages.allocate(1)
    assert issubclass(OutOfPages, MemoryError)


def test_too_many_changes_nothing():
    pages = PageAllocator(4)
    pages.allocate(1)
    with pytest.raises(OutOfPages, match="4 pages needed, 3 free"):
        pages.allocate(4)
    assert pages.free_count == 3
    assert pages.allocate(3).tolist() == [1, 2, 3]


def test_a_page_is_free_when_nobody_holds_it():
    pages = PageAllocator(3)
    held = pages.allocate(2)
    pages.retain(held)
    pages.retain(ids(1))
    assert [pages.refcount(i) for i in range(3)] == [2, 3, 0]
    assert pages.release(held) == 0
    assert pages.release(held) == 1
    assert pages.refcount(1) == 1
    assert pages.allocate(2).tolist() == [0, 2]


def test_an_id_may_come_twice_in_a_call():
    pages = PageAllocator(2)
    pages.allocate(1)
    pages.retain(ids(0, 0))
    assert pages.refcount(0) == 3
    assert pages.release(ids(0, 0, 0)) == 1
    assert pages.free_count == 2


@pytest.mark.parametrize("wrong", [(0, 1, 2), (1, 0, 0), (0, -1), (0, 3), (0, 2**31 - 1)])
def test_releasing_what_nobody_holds_changes_nothing(wrong):
    pages = PageAllocator(3)
    pages.allocate(2)
    with pytest.raises(ValueError, match=f"ids must be pages in use, got {wrong[-1]}"):
        pages.release(ids(*wrong))
    assert [pages.refcount(i) for i in range(3)] == [1, 1, 0]
    assert pages.free_count == 1


def test_retaining_a_free_page_changes_nothing():
    pages = PageAllocator(3)
    pages.allocate(1)
    with pytest.raises(ValueError, match="ids must be pages in use, got 1"):
        pages.retain(ids(0, 1))
    assert pages.refcount(0) == 1


def test_grows_behind_the_last_page():
    pages = PageAllocator(0)
    pages.grow(1)
    assert pages.allocate(1).tolist() == [0]
    pages.grow(130)
    assert pages.num_pages == 130
    assert pages.allocate(129).tolist() == list(range(1, 130))
    pages.grow(130)
    assert pages.free_count == 0


@pytest.mark.parametrize("size", [9, -1, 2**31, 2**62])
def test_refuses_to_shrink_or_to_leave_int32(size):
    pages = PageAllocator(10)
    with pytest.raises(ValueError, match=rf"num_pages must lie in \[10, 2\^31\), got {size}"):
        pages.grow(size)
    assert (pages.num_pages, pages.free_count) == (10, 10)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_pages must lie in"):
        PageAllocator(-1)
    pages = PageAllocator(2)
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        pages.allocate(-1)
    with pytest.raises(ValueError, match=r"id must lie in \[0, 2\), got 2"):
        pages.refcount(2)
    with pytest.raises(TypeError):
        pages.release(np.zeros((1, 1), dtype=np.int32))
    with pytest.raises(TypeError):
        pages.release(np.zeros(4, dtype=np.float32))
    with pytest.raises(TypeError):
        pages.allocate("one")


STEPS = st.lists(
    st.tuples(st.sampled_from(["allocate", "retain", "release", "grow"]), st.integers(0, 2**16)), max_size=60
)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 150), STEPS)
def test_random_calls_against_a_dictionary(size, steps):
    pages, held = PageAllocator(size), {}
    for step, number in steps:
        free = sorted(set(range(size)) - set(held))
        # Every third page in use, from a place that the number says: runs, gaps and single pages.
        some = sorted(held)[number % 3 :: 3]
        if step == "allocate":
            count = number % 80
            if count > len(free):
                with pytest.raises(OutOfPages):
                    pages.allocate(count)
            else:
                assert pages.allocate(count).tolist() == free[:count]
                held.update(dict.fromkeys(free[:count], 1))
        elif step == "retain":
            pages.retain(ids(*some))
            held.update({i: held[i] + 1 for i in some})
        elif step == "release":
            assert pages.release(ids(*some)) == sum(held[i] == 1 for i in some)
            held = {i: n - (i in some) for i, n in held.items() if n > (i in some)}
        else:
            size += number % 70
            pages.grow(size)
        assert (pages.num_pages, pages.free_count) == (size, size - len(held))
    assert [pages.refcount(i) for i in range(size)] == [held.get(i, 0) for i in range(size)]


def test_threads_never_share_a_page():
    pages = PageAllocator(400)
    owners = np.zeros(400, dtype=np.int64)
    clashes: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(300):
            taken = pages.allocate(int(random.integers(1, 80)))
            clashes.extend(taken[owners[taken] != 0].tolist())
            owners[taken] = seed
            pages.retain(taken)
            clashes.extend(taken[owners[taken] != seed].tolist())
            owners[taken] = 0
            pages.release(taken)
            pages.release(taken)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert pages.free_count == 400


def test_pack_moves_the_highest_pages_to_the_lowest_free_ids():
    pages = PageAllocator(200)
    pages.allocate(180)
    pages.retain(ids(179))
    free = [0, 5, 64, 65, *range(70, 170)]
    pages.release(ids(*free))
    before = [pages.refcount(i) for i in range(200)]
    packed = pages.packed()
    used = [i for i in range(180) if i not in free]
    assert packed.dtype == np.int32 and sorted(packed[used]) == list(range(76))
    assert (packed[free] == -1).all() and (packed[180:] == -1).all()
    assert all(packed[i] == i for i in used if i < 76)
    assert packed[[170, 171, 179]].tolist() == [0, 5, 75]
    pages.pack()
    assert (pages.num_pages, pages.free_count) == (76, 0)
    assert all(pages.refcount(int(packed[i])) == before[i] for i in used)
    pages.grow(300)
    assert pages.allocate(2).tolist() == [76, 77]
    assert pages.release(ids(3)) == 1 and pages.allocate(1).tolist() == [3]


@pytest.mark.parametrize("held", [0, 1, 64, 130])
def test_pack_of_what_is_full_or_empty(held):
    pages = PageAllocator(130)
    pages.allocate(held)
    pages.pack()
    assert (pages.num_pages, pages.free_count) == (held, 0)
    pages.pack()
    pages.grow(130)
    assert pages.allocate(130 - held).tolist() == list(range(held, 130))


def test_refcounts():
    pages = PageAllocator(4)
    held = pages.allocate(3)
    pages.retain(ids(1, 1))
    assert pages.refcounts(ids(2, 1, 0, 1)).tolist() == [1, 3, 1, 3]
    for bad in (3, 4, -1):
        with pytest.raises(ValueError, match=f"ids must be pages in use, got {bad}"):
            pages.refcounts(ids(0, bad))
    assert pages.refcounts(held[:0]).tolist() == []
