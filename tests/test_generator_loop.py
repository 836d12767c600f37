"""The generation loop on an exact double of the model: order of work, batches, ends, interruption, bad input."""

import warnings

import pytest
import torch
from scripted_model import VOCAB, HistoryCache, HistoryModel

from lcore.generation import Done, Generator, Prefill, Token

HOT = {"temperature": 1.5, "top_k": 40, "top_p": 0.98, "min_p": 0.001}
PROMPT = [(7 * i * i + 3) % VOCAB for i in range(150)]


def tokens(generator: Generator, prompt, row: int = 0, **options) -> list[int]:
    return [e.id for e in generator.stream(prompt, **options) if isinstance(e, Token) and e.row == row]


@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 149, 150, 151, 4096])
def test_same_seed_same_text_for_every_chunk_size(chunk, options):
    whole = tokens(Generator(HistoryModel()), PROMPT, max_new_tokens=20, seed=5, **options)
    assert tokens(Generator(HistoryModel(), prefill_chunk=chunk), PROMPT, max_new_tokens=20, seed=5, **options) == whole
    assert len(set(whole)) > 5


def test_other_seeds_give_other_texts():
    texts = {tuple(tokens(Generator(HistoryModel()), PROMPT, max_new_tokens=12, seed=s, **HOT)) for s in range(5)}
    assert len(texts) == 5


@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [5, 32, 2048])
def test_a_batch_of_different_lengths_equals_single_runs(chunk, options):
    prompts = [PROMPT[:1], PROMPT[:150], PROMPT[3:35], PROMPT[10:43], PROMPT[:64]]
    script = {45: 63}  # the rows end at different times: 63 is the end of text
    batch = Generator(HistoryModel(script, eos=(63,)), prefill_chunk=chunk).generate(
        prompts, max_new_tokens=25, seed=3, **options
    )
    for row, prompt in enumerate(prompts):
        single = Generator(HistoryModel(script, eos=(63,))).generate(prompt, max_new_tokens=25, seed=3 + row, **options)
        assert batch[row].tokens == single.tokens
        assert batch[row].reason == single.reason
        assert batch[row].text == single.text
    assert {c.reason for c in batch} == {"eos", "length"}


def test_finished_rows_take_no_part():
    model = HistoryModel({4: 63, 20: 63}, eos=(63,))
    list(Generator(model).stream([PROMPT[:4], PROMPT[:15]], max_new_tokens=50))
    assert model.steps == [[4, 15], [1, 1], *[[1]] * 5]


def test_prompts_share_a_step_when_it_has_room():
    model = HistoryModel()
    list(Generator(model, prefill_chunk=32).stream([PROMPT[:n] for n in (70, 9, 32, 16, 1)], max_new_tokens=0))
    assert model.steps == [[32], [32], [32], [9, 16], [6, 1]]


def test_chunks_end_at_absolute_multiples():
    model = HistoryModel()
    generator = Generator(model, prefill_chunk=16)
    list(generator.stream(PROMPT[:21], max_new_tokens=0))
    list(generator.stream(PROMPT[21:60], max_new_tokens=0, cache=generator.cache))
    assert model.steps == [[16], [5], [11], [16], [12]]


def test_events_come_in_order_and_progress_is_monotone():
    events = list(Generator(HistoryModel(), prefill_chunk=32).stream([PROMPT, PROMPT[:40]], max_new_tokens=3))
    kinds = "".join(type(e).__name__[0] for e in events)
    assert kinds.rstrip("DT").strip("P") == ""
    prefills = [e for e in events if isinstance(e, Prefill)]
    done = [e.done for e in prefills]
    assert done == sorted(set(done)) and (done[0], done[-1]) == (0, 190)
    assert {e.total for e in prefills} == {190}
    assert prefills[0].eta is None and all(e.eta >= 0 for e in prefills[1:]) and prefills[-1].eta == 0
    assert sorted(e.row for e in events if isinstance(e, Done)) == [0, 1]
    assert [e.row for e in events if isinstance(e, Token)] == [0, 1] * 3


def test_the_cache_ends_where_the_text_ends():
    generator = Generator(HistoryModel())
    written = tokens(generator, PROMPT, max_new_tokens=9)
    assert generator.cache.layers == [[PROMPT + written]] * 3


def test_a_continued_cache_equals_one_long_prompt():
    once = tokens(Generator(HistoryModel()), PROMPT, max_new_tokens=9, seed=1, **HOT)
    generator = Generator(HistoryModel(), prefill_chunk=32)
    assert [type(e) for e in generator.stream(PROMPT[:70], max_new_tokens=0)][-1] is Done
    fork = generator.cache.fork()
    assert tokens(generator, PROMPT[70:], max_new_tokens=9, seed=1, cache=fork, **HOT) == once
    assert generator.cache is fork


def test_a_written_text_is_continued_with_more_prompt():
    generator = Generator(HistoryModel())
    first = tokens(generator, PROMPT[:70], max_new_tokens=3)
    more = tokens(generator, [5, 6], max_new_tokens=4, cache=generator.cache)
    assert more == tokens(Generator(HistoryModel()), [*PROMPT[:70], *first, 5, 6], max_new_tokens=4)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1, 4, 6])
def test_ctrl_c_leaves_a_cache_that_continues_exactly(step, layer):
    """Steps 0 to 4 read the prompt (32 tokens each), later ones write."""
    model = HistoryModel()
    generator = Generator(model, prefill_chunk=32)
    expected = tokens(Generator(HistoryModel()), PROMPT, max_new_tokens=10, seed=2, **HOT)
    model.interrupt_at = (step, layer)
    written = []
    with pytest.raises(KeyboardInterrupt):
        written.extend(
            event.id for event in generator.stream(PROMPT, max_new_tokens=10, seed=2, **HOT) if isinstance(event, Token)
        )
    cache = generator.cache
    known = PROMPT + written
    held = int(cache.seen()[0])
    assert held == (32 * step if step < 5 else len(PROMPT) + step - 5)
    assert cache.layers == [[known[:held]]] * 3
    left = 10 - len(written)
    rest = known[held:]
    assert written + tokens(generator, rest, max_new_tokens=left, seed=2, cache=cache, **HOT) == expected


def test_ctrl_c_in_a_batch_keeps_what_each_row_has():
    model = HistoryModel()
    generator = Generator(model)
    stream = generator.stream([PROMPT[:5], PROMPT[:9]], max_new_tokens=10)
    while not (isinstance(event := next(stream), Token) and event.row == 1):
        pass
    model.interrupt_at = (len(model.steps), 1)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert generator.cache.layers == [[PROMPT[:5], PROMPT[:9]]] * 3


def test_a_stream_may_be_closed_early():
    generator = Generator(HistoryModel())
    stream = generator.stream(PROMPT, max_new_tokens=10)
    first = next(e for e in stream if isinstance(e, Token))
    stream.close()
    assert generator.cache.layers == [[PROMPT]] * 3
    assert (
        tokens(generator, [first.id], max_new_tokens=9, cache=generator.cache)
        == tokens(Generator(HistoryModel()), PROMPT, max_new_tokens=10)[1:]
    )


def test_stats_count_tokens_and_time():
    done = Generator(HistoryModel()).generate(PROMPT, max_new_tokens=7).stats
    assert (done.prompt_tokens, done.new_tokens) == (150, 7)
    assert done.prefill_seconds > 0 and done.decode_seconds > 0
    assert done.prefill_rate == pytest.approx(150 / done.prefill_seconds)
    assert done.decode_rate == pytest.approx(7 / done.decode_seconds)
    assert done.cache_bytes == 8 * 3 * 157
    assert done.peak_bytes > 1 << 20


def test_the_length_that_the_model_was_made_for_is_a_warning_once():
    generator = Generator(HistoryModel(limit=100))
    with pytest.warns(UserWarning, match=r"prompt \+ max_new_tokens is 160 tokens, the model was made for 100"):
        generator.stream(PROMPT, max_new_tokens=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.stream(PROMPT, max_new_tokens=10)
        Generator(HistoryModel(limit=160)).stream(PROMPT, max_new_tokens=10)


def test_a_cache_of_another_batch_size_is_refused():
    with pytest.raises(ValueError, match="prompt must have the cache's 2 rows, got 1"):
        Generator(HistoryModel()).stream(PROMPT, cache=HistoryCache(2))


def test_nothing_is_done_before_the_first_event_is_asked_for():
    model = HistoryModel()
    Generator(model).stream(torch.tensor(PROMPT))
    assert model.steps == []
