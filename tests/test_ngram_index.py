"""lcore._runtime.NgramIndex: matches and proposals against a search of the whole text."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcore._runtime import NgramIndex


def index_of(tokens, n_min=1, n_max=4) -> NgramIndex:
    index = NgramIndex(n_min, n_max)
    index.extend(np.array(tokens, dtype=np.int64))
    return index


def brute_match(tokens: list[int], n_min: int, n_max: int) -> tuple[int, int]:
    for n in range(n_max, n_min - 1, -1):
        for end in range(len(tokens) - 2, n - 2, -1):
            if tokens[end + 1 - n : end + 1] == tokens[len(tokens) - n :]:
                return n, end
    return 0, -1


def brute_proposal(tokens: list[int], n_min: int, n_max: int, count: int) -> list[int]:
    length, end = brute_match(tokens, n_min, n_max)
    if length == 0:
        return []
    text = list(tokens)
    for i in range(count):
        text.append(text[end + 1 + i])
    return text[len(tokens) :]


# Few different tokens, and blocks that are written again: without both there would hardly be a match.
ids = st.integers(0, 3) | st.sampled_from([2**31 - 1, 2**31 - 2, 65535, 65536])
blocks = st.lists(st.lists(ids, max_size=8), min_size=1, max_size=5)
actions = st.lists(st.tuples(st.sampled_from(["extend", "again", "truncate"]), st.integers(0, 1000)), max_size=25)


@settings(max_examples=300, deadline=None)
@given(blocks, actions, st.integers(1, 3), st.integers(0, 3))
def test_equals_a_search_of_the_whole_text(blocks, actions, n_min, more):
    n_max = n_min + more
    index, text = NgramIndex(n_min, n_max), []
    for action, number in actions:
        if action == "truncate":
            text = text[: number % (len(text) + 1)]
            index.truncate(len(text))
        else:
            new = blocks[number % len(blocks)] if action == "extend" else text[number % (len(text) + 1) :]
            index.extend(np.array(new, dtype=np.int64))
            text = text + new
        assert len(index) == len(text)
        assert index.match() == brute_match(text, n_min, n_max)
        for count in (0, 1, 7):
            assert index.propose(count) == brute_proposal(text, n_min, n_max, count)


@pytest.mark.parametrize("alphabet", [2, 50, 100_000])
def test_after_many_steps_back_and_forth_it_is_the_index_of_the_text(alphabet):
    """Long enough that the tables grow several times, before and after tokens have been taken back."""
    random = np.random.default_rng(alphabet)
    index, text = NgramIndex(1, 5), np.zeros(0, dtype=np.int64)
    for _ in range(300):
        new = random.integers(0, alphabet, random.integers(0, 60))
        index.extend(new)
        text = np.concatenate([text, new])
        keep = len(text) - random.integers(0, 50) if random.random() < 0.8 else random.integers(0, len(text) + 1)
        text = text[: max(0, keep)]
        index.truncate(len(text))
        assert index.match() == index_of(text, 1, 5).match()
    tokens = text.tolist()
    assert index.match() == brute_match(tokens, 1, 5)
    while tokens:  # and every state on the way back is right too
        tokens = tokens[:-7]
        index.truncate(len(tokens))
        assert index.match() == brute_match(tokens, 1, 5)


def test_the_longest_match_wins_and_of_its_places_the_latest():
    #        0  1  2  3  4  5  6  7  8  9 10
    text = [1, 2, 3, 7, 1, 2, 3, 8, 3, 2, 3]
    assert index_of(text, 1, 3).match() == (2, 6)
    assert index_of(text, 1, 3).propose(3) == [8, 3, 2]
    assert index_of([*text, 8], 1, 3).match() == (3, 7)
    assert index_of(text, 1, 1).match() == (1, 8)
    assert index_of(text, 3, 3).match() == (0, -1)
    assert index_of(text, 3, 3).propose(5) == []


def test_a_loop_is_proposed_for_as_long_as_asked():
    assert index_of([9, 5, 5, 5]).propose(6) == [5] * 6
    assert index_of([9, 1, 2, 3, 1, 2, 3, 1]).propose(8) == [2, 3, 1, 2, 3, 1, 2, 3]


def test_nothing_occurs_before_itself():
    assert index_of([]).match() == (0, -1)
    assert index_of([4]).match() == (0, -1)
    assert index_of([4, 4]).match() == (1, 0)
    index = index_of([4, 4])
    index.truncate(0)
    assert (len(index), index.match(), index.propose(3)) == (0, (0, -1), [])


@pytest.mark.parametrize(("n_min", "n_max"), [(0, 3), (3, 2), (1, 65), (-1, 1)])
def test_lengths_out_of_range_are_refused(n_min, n_max):
    with pytest.raises(ValueError, match=f"1 <= n_min <= n_max <= 64, got {n_min} and {n_max}"):
        NgramIndex(n_min, n_max)


def test_bad_calls_change_nothing():
    index = index_of([1, 2, 1])
    for wrong in (-1, 2**31):
        with pytest.raises(ValueError, match=rf"tokens must lie in \[0, 2\^31\), got {wrong}"):
            index.extend(np.array([5, wrong]))
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=rf"size must lie in \[0, 3\], got {wrong}"):
            index.truncate(wrong)
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        index.propose(-1)
    for wrong in (np.zeros(2, dtype=np.int32), np.zeros((1, 2), dtype=np.int64), np.zeros(4, dtype=np.int64)[::2]):
        with pytest.raises(TypeError):
            index.extend(wrong)
    assert (len(index), index.match()) == (3, (1, 0))


def seconds_per_token(tokens: np.ndarray) -> float:
    index = NgramIndex(1, 4)
    begin = time.perf_counter()
    index.extend(tokens)
    return (time.perf_counter() - begin) / len(tokens)


@pytest.mark.parametrize("text", ["one token", "random"])
def test_a_token_costs_the_same_in_a_long_text(text):
    """Searching the text would make 64 times the length 64 times as dear; caches that no longer fit make it a few."""
    size = 1 << 12
    tokens = np.zeros(64 * size, dtype=np.int64)
    if text == "random":
        tokens = np.random.default_rng(0).integers(0, 50_000, 64 * size)
    short = min(seconds_per_token(tokens[:size]) for _ in range(5))
    assert min(seconds_per_token(tokens) for _ in range(3)) < 20 * short
