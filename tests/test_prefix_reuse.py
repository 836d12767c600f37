"""The generator reads a text once: what it feeds to the model, on an exact double that knows every token it was fed."""

import threading

import hypothesis.strategies as st
import pytest
import torch
from cache_cases import all_pages_are_free, allocator_of
from hypothesis import given, settings
from scripted_model import VOCAB, HistoryModel, PagedHistoryModel, stored_tokens

import lcore
from lcore.generation import Done, Generator, Prefill, Token

PAGE = PagedHistoryModel.page_size
DOCUMENT = [(7 * i * i + 3) % VOCAB for i in range(150)]
QUESTIONS = [[1, 2, 3], [1, 9, 9, 9, 30], [60]]
HOT = {"temperature": 1.5, "top_k": 40, "seed": 3}


def fed(model: HistoryModel) -> list[list[int]]:
    """Steps since the last call of this."""
    steps, model.steps = model.steps, []
    return steps


def fresh(prompt: list[int], **options) -> list[int]:
    return Generator(HistoryModel()).generate(prompt, **options).tokens


def test_a_second_question_about_a_document_starts_at_once():
    model = PagedHistoryModel()
    generator = Generator(model, prefill_chunk=64)
    first = generator.generate(DOCUMENT + QUESTIONS[0], max_new_tokens=4, **HOT)
    assert first.stats.reused_tokens == 0
    assert fed(model) == [[64], [64], [25], *[[1]] * 4]
    whole = len(DOCUMENT) // PAGE * PAGE
    for question in QUESTIONS[1:]:
        prompt = DOCUMENT + question
        events = list(generator.stream(prompt, max_new_tokens=4, **HOT))
        assert fed(model) == [[len(prompt) - whole], *[[1]] * 4]
        assert [e.id for e in events if isinstance(e, Token)] == fresh(prompt, max_new_tokens=4, **HOT)
        assert [(e.done, e.total) for e in events if isinstance(e, Prefill)] == [
            (0, len(prompt) - whole),
            (len(prompt) - whole, len(prompt) - whole),
        ]
        stats = next(e.stats for e in events if isinstance(e, Done))
        assert (stats.reused_tokens, stats.prompt_tokens) == (whole, len(prompt))
        assert stats.prefill_rate == pytest.approx((len(prompt) - whole) / stats.prefill_seconds)


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 1])
def test_the_last_token_is_always_read(length):
    model = PagedHistoryModel()
    generator = Generator(model)
    for _ in range(2):
        fed(model)
        completion = generator.generate(DOCUMENT[:length], max_new_tokens=1)
        assert completion.tokens == fresh(DOCUMENT[:length], max_new_tokens=1)
    assert completion.stats.reused_tokens == (length - 1) // PAGE * PAGE
    assert fed(model)[0] == [length - completion.stats.reused_tokens]


def test_chunks_go_on_at_absolute_multiples():
    model = PagedHistoryModel()
    generator = Generator(model, prefill_chunk=20)
    generator.generate(DOCUMENT[:50], max_new_tokens=0)
    fed(model)
    generator.generate(DOCUMENT, max_new_tokens=0)
    assert fed(model) == [[60 - 48], [20], [20], [20], [20], [10]]


def test_each_row_is_matched_on_its_own():
    model = PagedHistoryModel()
    generator = Generator(model, prefill_chunk=64)
    generator.generate([DOCUMENT, DOCUMENT[5:60]], max_new_tokens=0)
    prompts = [DOCUMENT[:100], [9, *DOCUMENT], DOCUMENT[5:60] + [4] * 7, DOCUMENT[:3]]
    batch = generator.generate(prompts, max_new_tokens=6, **HOT)
    assert [row.stats.reused_tokens for row in batch] == [96, 0, 48, 0]
    for row, prompt in enumerate(prompts):
        expected = fresh(prompt, max_new_tokens=6, **{**HOT, "seed": 3 + row})
        assert batch[row].tokens == expected
        assert [stored_tokens(generator.cache, layer)[row] for layer in range(3)] == [prompt + expected] * 3


def test_written_tokens_are_kept_too():
    model = PagedHistoryModel()
    generator = Generator(model)
    turn = DOCUMENT[:21] + generator.generate(DOCUMENT[:21], max_new_tokens=30).tokens
    fed(model)
    assert generator.generate([*turn, 5, 6], max_new_tokens=3).tokens == fresh([*turn, 5, 6], max_new_tokens=3)
    assert fed(model)[0] == [53 - 51 // PAGE * PAGE]


def test_a_continued_cache_neither_takes_nor_leaves_pages():
    model = PagedHistoryModel()
    generator = Generator(model)
    generator.generate(DOCUMENT, max_new_tokens=0)
    held = generator.prefixes.stats()
    more = generator.generate(DOCUMENT, max_new_tokens=2, cache=generator.cache.fork())
    assert more.stats.reused_tokens == 0
    assert more.tokens == fresh(DOCUMENT * 2, max_new_tokens=2)
    assert generator.prefixes.stats()["runs"] == held["runs"] == len(DOCUMENT) // PAGE


def test_a_document_is_known_before_its_first_answer_has_ended():
    model = PagedHistoryModel()
    generator = Generator(model)
    slow = generator.stream(DOCUMENT, max_new_tokens=50)
    while not isinstance(next(slow), Token):
        pass
    fed(model)
    assert generator.generate([*DOCUMENT, 5], max_new_tokens=1).tokens == fresh([*DOCUMENT, 5], max_new_tokens=1)
    assert fed(model)[0] == [7]
    slow.close()


def test_a_cropped_row_leaves_no_more_pages():
    generator = Generator(PagedHistoryModel())
    stream = generator.stream([DOCUMENT[:20], DOCUMENT[5:25]], max_new_tokens=40)
    while not isinstance(next(stream), Token):
        pass
    generator.cache.crop(torch.tensor([17, 100]))
    assert generator.prefixes.stats()["runs"] == 4
    junk = torch.full((2, 3, 1, 1), 7.0)
    for layer in range(3):  # the row is as long as it was, with other tokens in it
        generator.cache.append(layer, junk, junk, lengths=torch.tensor([3, 0]))
    list(stream)
    # Only the second row adds the pages of what it wrote: 20 + 40 tokens are 7 pages, 2 of which were there.
    assert generator.prefixes.stats()["runs"] == 4 + 5


@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupted_prompt_leaves_nothing(step):
    model = PagedHistoryModel()
    generator = Generator(model, prefill_chunk=100)
    model.interrupt_at = (step, 1)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(DOCUMENT, max_new_tokens=1)
    assert generator.prefixes.stats()["runs"] == 0
    assert generator.generate(DOCUMENT, max_new_tokens=5).tokens == fresh(DOCUMENT, max_new_tokens=5)


def test_off_means_off():
    model = PagedHistoryModel()
    generator = Generator(model, prefix_reuse=False)
    for _ in range(2):
        fed(model)
        generator.generate(DOCUMENT, max_new_tokens=0)
        assert fed(model) == [[150]]
    assert generator.prefixes is None


def test_what_is_no_paged_cache_is_left_alone():
    model = HistoryModel()
    generator = Generator(model)
    for _ in range(2):
        fed(model)
        generator.generate(DOCUMENT, max_new_tokens=0)
        assert fed(model) == [[150]]


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_what_is_neither_a_bool_nor_a_prefix_cache(value):
    with pytest.raises(TypeError, match=r"^lcore\.Generator: prefix_reuse must be a bool or a PrefixCache, got "):
        Generator(HistoryModel(), prefix_reuse=value)


def test_two_generators_share():
    model, prefixes = PagedHistoryModel(), lcore.PrefixCache()
    Generator(model, prefix_reuse=prefixes).generate(DOCUMENT, max_new_tokens=0)
    fed(model)
    other = Generator(model, prefill_chunk=13, prefix_reuse=prefixes)
    assert other.generate([*DOCUMENT, 3], max_new_tokens=4).tokens == fresh([*DOCUMENT, 3], max_new_tokens=4)
    assert fed(model)[0] == [7]
    Generator(model).generate(DOCUMENT, max_new_tokens=0)
    assert fed(model) == [[150]], "another generator has an index of its own"


def test_nothing_is_left_when_everything_is_closed():
    prefixes = lcore.PrefixCache()
    generators = [Generator(PagedHistoryModel(), prefix_reuse=prefixes) for _ in range(2)]
    for question in QUESTIONS:
        for generator in generators:
            generator.generate([DOCUMENT + question, question], max_new_tokens=20)
    allocator = allocator_of(generators[0].cache)
    fork = generators[0].cache.fork()
    for generator in generators:
        generator.cache.close()
    prefixes.clear()
    assert allocator.num_pages - allocator.free_count == fork.stats()["pages"]
    fork.close()
    assert all_pages_are_free(allocator)


def test_threads_that_ask_about_the_same_and_other_documents():
    prefixes, failures, reused = lcore.PrefixCache(), [], []
    prompts = [[*DOCUMENT[i : i + 90 + 7 * j], j] for i in (0, 11) for j in range(4)]
    expected = [fresh(prompt, max_new_tokens=12) for prompt in prompts]

    def work(seed: int) -> None:
        generator = Generator(PagedHistoryModel(), prefill_chunk=32, prefix_reuse=prefixes)
        try:
            for step in range(24):
                at = (seed * 5 + step * (seed + 1)) % len(prompts)
                completion = generator.generate(prompts[at], max_new_tokens=12)
                failures.extend([] if completion.tokens == expected[at] else [(seed, step)])
                reused.append(completion.stats.reused_tokens)
                if step % 9 == seed:
                    (prefixes.clear, prefixes.renew)[step % 2]()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sum(n > 80 for n in reused) > 20


CALLS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=3),
        st.sampled_from([0, 1, 20]),
        st.sampled_from([5, 16, 64]),
        st.booleans(),
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(CALLS, st.sampled_from([None, 4_000, 20_000]))
def test_any_order_of_prompts_gives_the_texts_of_fresh_caches(calls, max_bytes):
    """Prompts are beginnings of four texts with common beginnings, so that they meet in the index."""
    texts = [DOCUMENT, DOCUMENT[:24] + DOCUMENT[40:], DOCUMENT[:24] + DOCUMENT[41:], DOCUMENT[9:]]
    prefixes, caches = lcore.PrefixCache(max_bytes), []
    for rows, new, chunk, keep in calls:
        generator = Generator(PagedHistoryModel(), prefill_chunk=chunk, prefix_reuse=prefixes)
        prompts = [texts[which][:length] for which, length in rows]
        try:
            completions = generator.generate(prompts, max_new_tokens=new)
        except MemoryError:
            caches.clear()
            continue
        held = [prompt + row.tokens for prompt, row in zip(prompts, completions, strict=True)]
        assert [row.tokens for row in completions] == [fresh(prompt, max_new_tokens=new) for prompt in prompts]
        assert [stored_tokens(generator.cache, layer) for layer in range(3)] == [held] * 3
        caches += [(generator.cache, held)] if keep else []
        for cache, tokens in caches:
            assert stored_tokens(cache, 1) == tokens, "what others do changes nothing"
