"""lcore._runtime.PrefixIndex: whose pages hold the beginning of a text."""

import threading
import time
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lcore._runtime import PageAllocator, PrefixIndex

SIZE, WIDTH = 4, 3  # tokens and pages a run


def text(*runs: int) -> np.ndarray:
    """Tokens of a text whose runs differ in their last token only."""
    tokens = np.zeros((len(runs), SIZE), dtype=np.int32)
    tokens[:, -1] = runs
    return tokens


def pages(first: int, runs: int) -> np.ndarray:
    return np.arange(first, first + WIDTH * runs, dtype=np.int32).reshape(runs, WIDTH)


def matched(index: PrefixIndex, tokens: np.ndarray, name: bytes = b"a") -> list[int]:
    return [row[0] for row in index.match(name, tokens).tolist()]


@pytest.mark.parametrize("hash_bits", [64, 3, 0])
def test_finds_the_longest_known_beginning(hash_bits):
    index = PrefixIndex(hash_bits)
    assert index.insert(b"a", text(1, 2, 3), pages(0, 3)) == 0
    assert index.insert(b"a", text(1, 2, 4, 5), pages(100, 4)) == 2
    found = index.match(b"a", text(1, 2, 3, 9))
    assert found.dtype == np.int32 and found.tolist() == pages(0, 3).tolist()
    assert matched(index, text(1, 2, 4, 5)) == [0, 3, 106, 109], "what was known keeps its pages"
    assert matched(index, text(1, 2)) == [0, 3]
    assert matched(index, text(2, 1)) == matched(index, text(3)) == matched(index, text()) == []
    assert (index.nodes, index.pages) == (5, 15)
    assert (index.hits, index.misses) == (3 + 4 + 2, 1 + 2 + 1)


@pytest.mark.parametrize("hash_bits", [64, 0])
def test_the_same_run_elsewhere_is_another(hash_bits):
    index = PrefixIndex(hash_bits)
    index.insert(b"a", text(7, 7, 7), pages(0, 3))
    index.insert(b"a", text(8, 7), pages(30, 2))
    assert matched(index, text(7, 7, 7, 7)) == [0, 3, 6]
    assert matched(index, text(8, 7, 7)) == [30, 33]


def test_every_token_counts():
    index = PrefixIndex()
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    index.insert(b"a", tokens, pages(0, 2))
    for place in range(8):
        for other in (-1, 2**31 - 1, int(tokens.flat[place]) ^ (1 << 30)):
            changed = tokens.copy()
            changed.flat[place] = other
            assert len(index.match(b"a", changed)) == place // 4


@pytest.mark.parametrize("hash_bits", [64, 0])
def test_namespaces_do_not_mix(hash_bits):
    index = PrefixIndex(hash_bits)
    index.insert(b"a", text(1, 2), pages(0, 2))
    index.insert(b"a\0b", text(1), pages(10, 1))
    index.insert(b"", text(1, 3), pages(20, 2))
    assert matched(index, text(1, 2)) == [0, 3]
    assert matched(index, text(1, 2), b"a\0b") == [10]
    assert matched(index, text(1, 2), b"") == [20]
    assert matched(index, text(1, 2), b"b") == []
    assert sorted(index.clear(b"a")) == [0, 1, 2, 3, 4, 5]
    assert matched(index, text(1, 2)) == [] and matched(index, text(1, 3), b"") == [20, 23]
    assert index.clear(b"a").tolist() == index.clear(b"unknown").tolist() == []
    assert sorted(index.clear()) == [10, 11, 12, *range(20, 26)]
    assert (index.nodes, index.pages) == (0, 0)


def test_a_namespace_has_its_own_sizes_until_it_is_empty():
    index = PrefixIndex()
    index.insert(b"a", text(1), pages(0, 1))
    index.insert(b"b", np.ones((1, 64), dtype=np.int32), np.ones((1, 2), dtype=np.int32))
    assert index.pages == WIDTH + 2
    index.evict(WIDTH)
    index.insert(b"a", np.ones((2, 9), dtype=np.int32), np.ones((2, 1), dtype=np.int32))
    assert index.match(b"a", np.ones((3, 9), dtype=np.int32)).shape == (2, 1)


def test_evicts_leaves_the_longest_unused_first():
    index = PrefixIndex()
    index.insert(b"a", text(1, 2, 3), pages(0, 3))
    index.insert(b"a", text(1, 4), pages(50, 2))
    index.insert(b"b", text(1), pages(90, 1))
    matched(index, text(1, 2, 3))  # the first text is used again
    assert index.evict(1).tolist() == [53, 54, 55]
    assert index.evict(WIDTH + 1).tolist() == [90, 91, 92, 6, 7, 8], "whole runs, until there are enough"
    assert index.evict(0).tolist() == []
    assert matched(index, text(1, 2, 3)) == [0, 3]
    assert index.evict(1000).tolist() == [3, 4, 5, 0, 1, 2]
    assert (index.nodes, index.evictions) == (0, 5)


def test_a_beginning_that_is_used_outlives_its_continuations():
    index = PrefixIndex()
    index.insert(b"a", text(1, 2), pages(0, 2))
    index.insert(b"a", text(5), pages(20, 1))
    matched(index, text(1, 9))
    assert index.evict(2 * WIDTH).tolist() == [3, 4, 5, 20, 21, 22]
    assert matched(index, text(1)) == [0]


def test_with_an_allocator_only_what_nobody_else_holds_is_evicted():
    index, allocator = PrefixIndex(), PageAllocator(20)
    held = allocator.allocate(12).reshape(4, WIDTH)
    index.insert(b"a", text(1, 2), held[:2])
    index.insert(b"a", text(3), held[2:3])
    index.insert(b"a", text(4), held[3:])
    allocator.retain(held[1, 1:2])  # one page of the longest unused leaf
    assert index.evict(2 * WIDTH, allocator).tolist() == held[2:].ravel().tolist()
    assert index.evict(WIDTH, allocator).tolist() == []
    allocator.release(held[1, 1:2])
    assert index.evict(100, allocator).tolist() == [*held[1], *held[0]]


@pytest.mark.parametrize(
    ("tokens", "held", "error"),
    [
        (text(1), pages(0, 2), r"pages must have shape \(1, >= 1\), got \(2, 3\)"),
        (text(1), pages(0, 1)[:, :0], r"pages must have shape \(1, >= 1\), got \(1, 0\)"),
        (text(1)[:, :0], pages(0, 1), r"tokens must have shape \(\*, >= 1\), got \(1, 0\)"),
        (text(1), pages(-2, 1), r"pages must be >= 0, or -1 for none, got -2"),
        (text(1), pages(-1, 1) * 0 - 1, r"pages must be at least one in each row"),
        (text(1)[:, :3].copy(), pages(0, 1), r"must have 4 and 3 columns, got \(1, 3\) and \(1, 3\)"),
        (text(1), pages(0, 1)[:, :2].copy(), r"must have 4 and 3 columns, got \(1, 4\) and \(1, 2\)"),
    ],
)
def test_wrong_shapes_change_nothing(tokens, held, error):
    index = PrefixIndex()
    index.insert(b"a", text(9), pages(0, 1))
    with pytest.raises(ValueError, match=error):
        index.insert(b"a", tokens, held)
    assert (index.nodes, index.pages) == (1, 3) and matched(index, text(9)) == [0]


def test_wrong_arguments():
    index = PrefixIndex()
    index.insert(b"a", text(1), pages(0, 1))
    with pytest.raises(ValueError, match=r"tokens must have shape \(\*, 4\), got \(2, 3\)"):
        index.match(b"a", np.zeros((2, 3), dtype=np.int32))
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        index.evict(-1)
    for bits in (-1, 65):
        with pytest.raises(ValueError, match=rf"hash_bits must lie in \[0, 64\], got {bits}"):
            PrefixIndex(bits)
    for name, tokens in [("a", text(1)), (b"a", text(1).astype(np.int64)), (b"a", text(1)[0]), (b"a", text(1)[:, ::2])]:
        with pytest.raises(TypeError):
            index.match(name, tokens)
    assert matched(index, text(1)) == [0]


class IndexMachine(RuleBasedStateMachine):
    """Beside a dictionary from paths to [pages, time of last use]; the allocator counts the index's references."""

    @initialize(hash_bits=st.sampled_from([64, 2, 0]))
    def begin(self, hash_bits):
        self.index, self.allocator = PrefixIndex(hash_bits), PageAllocator(0)
        self.known, self.clock, self.evicted = {}, 0, 0
        self.live = []  # pages that a cache holds besides

    names = st.sampled_from([b"a", b"b"])
    texts = st.lists(st.integers(0, 1), max_size=6)

    def path(self, name, runs):
        return [(name, *runs[: i + 1]) for i in range(len(runs))]

    def use(self, paths):
        self.clock += 1
        for path in paths:
            self.known[path][1] = self.clock

    @rule(name=names, runs=texts)
    def match(self, name, runs):
        found = self.index.match(name, text(*runs))
        paths = [p for p in self.path(name, runs) if p in self.known]
        assert [tuple(row) for row in found.tolist()] == [self.known[p][0] for p in paths]
        self.use(paths)

    @rule(name=names, runs=texts, keep=st.booleans())
    def insert(self, name, runs, keep):
        """As a cache that read a text does: it keeps its own references, or closes."""
        self.allocator.grow(self.allocator.num_pages + WIDTH * len(runs))
        mine = self.allocator.allocate(WIDTH * len(runs))
        rows = mine.reshape(-1, WIDTH)
        paths = self.path(name, runs)
        known = self.index.insert(name, text(*runs), rows)
        assert known == sum(p in self.known for p in paths)
        self.allocator.retain(rows[known:].ravel())
        for path, row in list(zip(paths, rows.tolist(), strict=True))[known:]:
            self.known[path] = [tuple(row), 0]
        self.use(paths)
        if keep:
            self.live.append(mine)
        else:
            self.allocator.release(mine)

    @rule(count=st.integers(0, 20), only_idle=st.booleans())
    def evict(self, count, only_idle):
        taken = self.index.evict(count, self.allocator if only_idle else None)
        busy = {page for held in self.live for page in held.tolist()} if only_idle else set()
        expected: list[int] = []
        while len(expected) < count:
            leaves = [
                path
                for path, (held, _) in self.known.items()
                if busy.isdisjoint(held) and not any(p[:-1] == path for p in self.known)
            ]
            if not leaves:
                break
            expected += self.known.pop(min(leaves, key=lambda path: self.known[path][1]))[0]
            self.evicted += 1
        assert taken.tolist() == expected
        self.allocator.release(taken)

    @rule(name=st.sampled_from([b"a", b"b", None]))
    def clear(self, name):
        gone = [path for path in self.known if name in (None, path[0])]
        taken = self.index.clear(name) if name is not None else self.index.clear()
        assert sorted(taken.tolist()) == sorted(page for path in gone for page in self.known.pop(path)[0])
        self.allocator.release(taken)

    @rule()
    def close_a_cache(self):
        if self.live:
            self.allocator.release(self.live.pop(0))

    @invariant()
    def every_page_has_its_references(self):
        if not hasattr(self, "index"):
            return
        assert (self.index.nodes, self.index.pages) == (len(self.known), WIDTH * len(self.known))
        assert self.index.evictions == self.evicted
        counts = Counter(page for held, _ in self.known.values() for page in held)
        counts.update(page for held in self.live for page in held.tolist())
        assert [self.allocator.refcount(i) for i in range(self.allocator.num_pages)] == [
            counts[i] for i in range(self.allocator.num_pages)
        ]


IndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestAnyOrder = IndexMachine.TestCase


def test_threads():
    index, allocator, lock = PrefixIndex(), PageAllocator(3000), threading.Lock()
    failures: list[object] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(300):
                runs = random.integers(0, 2, random.integers(1, 9)).tolist()
                held = index.match(b"a", text(*runs))
                failures.extend([] if len(held) <= len(runs) and held.shape[1:] in ((WIDTH,), (0,)) else [held.shape])
                with lock:  # as the pool's lock: references follow the index
                    mine = allocator.allocate(WIDTH * len(runs)).reshape(-1, WIDTH)
                    known = index.insert(b"a", text(*runs), mine)
                    allocator.release(mine[:known].ravel())
                    allocator.release(index.evict(int(random.integers(0, 9)), allocator))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert allocator.num_pages - allocator.free_count == index.pages
    allocator.release(index.clear())
    assert allocator.free_count == allocator.num_pages


def test_four_million_tokens_take_no_time():
    runs = 65536
    index, tokens = PrefixIndex(), np.random.default_rng(0).integers(0, 1000, (runs, 64), dtype=np.int32)
    held = np.arange(runs * 8, dtype=np.int32).reshape(runs, 8)
    begin = time.perf_counter()
    index.insert(b"a", tokens, held)
    assert len(index.match(b"a", tokens)) == runs
    assert len(index.evict(runs * 8)) == runs * 8
    assert time.perf_counter() - begin < 5, "a third of a second; work that grows with the square would be minutes"
