"""Speculation in the generation loop, on an exact double of the model: nothing but the number of steps may change."""

from types import SimpleNamespace

import pytest
from drafters import Guesses
from scripted_model import VOCAB, HistoryModel

from lcore.generation import Done, Generator, Ngram, SelfSpeculation, Token, loop
from lcore.generation.speculation import room_in_tail

HOT = {"temperature": 1.5, "top_k": 40, "top_p": 0.98, "min_p": 0.001}
PROMPT = [(7 * i * i + 3) % VOCAB for i in range(150)]
PROMPTS = [PROMPT[:1], PROMPT[:131], PROMPT[3:35], PROMPT[10:41], PROMPT[:63]]


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch):
    """Every step takes one tick, so that how much is drafted depends on what is accepted alone."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def by_row(events) -> list[list]:
    rows: dict[int, list] = {}
    for event in events:
        if isinstance(event, Token):
            rows.setdefault(event.row, []).append((event.id, event.text))
        elif isinstance(event, Done):
            rows[event.row].append(event.reason)
    return [rows[row] for row in sorted(rows)]


def ids_of(row: list) -> list[int]:
    return [entry[0] for entry in row if isinstance(entry, tuple)]


@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
def test_drafts_leave_the_last_place_of_a_page_free(page_size):
    for held in range(3 * page_size):
        room = room_in_tail(held, page_size)
        fed = held + 1 + room  # the next token may fill a page, the drafts behind it must not
        assert fed // page_size == (held + 1) // page_size
        assert (fed + 1) // page_size == (held + 1) // page_size + 1


@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("right", [0.0, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_every_row_gives_the_same_events(page_size, right, options):
    script = {45: 63}  # the end of text: rows end at different times
    plain = Generator(HistoryModel(script, eos=(63,), page_size=page_size))
    want = by_row(plain.stream(PROMPTS, max_new_tokens=40, seed=3, **options))
    guesses = Guesses([ids_of(row) for row in want], VOCAB, right)
    model = HistoryModel(script, eos=(63,), page_size=page_size)
    generator = Generator(model, speculate=guesses)
    events = list(generator.stream(PROMPTS, max_new_tokens=40, seed=3, **options))
    assert by_row(events) == want
    assert generator.cache.layers == plain.cache.layers
    drafted = sum(event.stats.drafted for event in events if isinstance(event, Done))
    accepted = sum(event.stats.accepted for event in events if isinstance(event, Done))
    assert {row[-1] for row in want} == {"eos", "length"}
    if page_size == 1:
        assert drafted == 0 and not guesses.asked
    else:
        assert drafted > 0
        assert (accepted == 0) if right == 0 else (accepted > 0)
        assert (accepted == drafted) == (right == 1)


@pytest.mark.parametrize("count", range(1, 14))
def test_a_text_of_any_length_ends_where_it_should(count):
    want = by_row(Generator(HistoryModel()).stream(PROMPT, max_new_tokens=20))[0]
    generator = Generator(HistoryModel(page_size=64), speculate=Guesses([ids_of(want)], VOCAB))
    *tokens, reason = by_row(generator.stream(PROMPT, max_new_tokens=count))[0]
    assert (tokens, reason) == (want[:count], "length")
    assert generator.cache.layers == [[PROMPT + ids_of(want)[:count]]] * 3


@pytest.mark.parametrize("place", range(2, 12))
@pytest.mark.parametrize("end", ["eos", "stop id", "stop string"])
def test_an_end_inside_an_accepted_run(place, end):
    script = {len(PROMPT) + i: 10 + i for i in range(12)}  # the text is "JKLMNOPQRSTU"
    text = [script[len(PROMPT) + i] for i in range(12)]
    options = {"stop_ids": 10 + place} if end == "stop id" else {}
    if end == "stop string":
        options = {"stop": "".join(chr(64 + 10 + place - 1 + i) for i in range(2))}
    eos = (10 + place,) if end == "eos" else ()
    want = by_row(Generator(HistoryModel(script, eos=eos)).stream(PROMPT, max_new_tokens=12, **options))
    model = HistoryModel(script, eos=eos, page_size=64)
    generator = Generator(model, speculate=Guesses([text], VOCAB))
    got = by_row(generator.stream(PROMPT, max_new_tokens=12, **options))
    assert got == want
    assert ids_of(got[0]) == text[: place + 1]
    assert generator.cache.layers == [[PROMPT + text[: place + 1]]] * 3
    if place >= 6:  # the two first steps draft nothing
        assert len(model.steps) < 1 + place


def test_right_drafts_save_steps():
    want = by_row(Generator(HistoryModel()).stream(PROMPT[:20], max_new_tokens=40))[0]
    model = HistoryModel(page_size=64)
    done = Generator(model, speculate=Guesses([ids_of(want)], VOCAB, most=8)).generate(PROMPT[:20], max_new_tokens=40)
    # Two tokens one by one, then at most nine a step; a page ends at 64 and at 128.
    assert len(model.steps) - 1 <= 2 + 7
    assert done.tokens == ids_of(want)
    assert done.stats.accepted == done.stats.drafted >= 40 - 2 - 7
    assert max(max(step) for step in model.steps[1:]) == 9


def test_wrong_drafts_are_given_up_but_tried_again():
    want = ids_of(by_row(Generator(HistoryModel()).stream(PROMPT[:1], max_new_tokens=600))[0])
    guesses = Guesses([want], VOCAB, right=0.0)
    model = HistoryModel(page_size=4096)
    done = Generator(model, speculate=guesses).generate(PROMPT[:1], max_new_tokens=600)
    assert done.tokens == want
    assert done.stats.accepted == 0 and done.stats.drafted < 360
    assert 20 < len(guesses.asked) < 360  # of 600 steps
    assert all(most == {0: 1} for most in guesses.asked[-5:])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_ctrl_c_leaves_a_cache_that_continues_exactly(step, layer):
    """Steps are counted from the first that writes; those from the third on draft."""
    prompts = [PROMPT[:70], PROMPT[:9]]
    want = by_row(Generator(HistoryModel()).stream(prompts, max_new_tokens=30, seed=2, **HOT))
    model = HistoryModel(page_size=64)
    generator = Generator(model, speculate=Guesses([ids_of(row) for row in want], VOCAB, right=0.8))
    written: list[list[int]] = [[], []]
    model.interrupt_at = (1 + step, layer)
    with pytest.raises(KeyboardInterrupt):
        for event in generator.stream(prompts, max_new_tokens=30, seed=2, **HOT):
            if isinstance(event, Token):
                written[event.row].append(event.id)
    held = generator.cache.seen().tolist()
    for row, prompt in enumerate(prompts):
        assert written[row] == ids_of(want[row])[: len(written[row])]
        assert held[row] == len(prompt) + len(written[row]) - 1
        for stored in generator.cache.layers:
            assert stored[row] == (prompt + written[row])[: held[row]]
    rest = [[tokens[-1]] for tokens in written]
    left = 30 - max(map(len, written))
    more = Generator(HistoryModel()).generate(rest, max_new_tokens=left, seed=2, cache=generator.cache, **HOT)
    for row, tokens in enumerate(written):
        assert tokens + more[row].tokens == ids_of(want[row])[: len(tokens) + left]


@pytest.mark.parametrize("count", range(1, 25))
def test_a_stream_closed_anywhere_leaves_what_was_given(count):
    prompts = [PROMPT[:70], PROMPT[:9]]
    want = by_row(Generator(HistoryModel()).stream(prompts, max_new_tokens=30))
    generator = Generator(
        HistoryModel(page_size=64), speculate=Guesses([ids_of(row) for row in want], VOCAB, right=0.9)
    )
    stream = generator.stream(prompts, max_new_tokens=30)
    given: list[list[int]] = [[], []]
    while sum(map(len, given)) < count:
        event = next(stream)
        if isinstance(event, Token):
            given[event.row].append(event.id)
    stream.close()
    for row, prompt in enumerate(prompts):
        known = prompt + given[row]
        held = int(generator.cache.seen()[row])
        assert held in (len(known), len(known) - 1)
        assert generator.cache.layers[2][row] == known[:held]


def test_an_error_while_tokens_are_chosen_takes_the_drafts_back(monkeypatch):
    want = ids_of(by_row(Generator(HistoryModel()).stream(PROMPT, max_new_tokens=30))[0])
    generator = Generator(HistoryModel(page_size=64), speculate=Guesses([want], VOCAB))
    place = len(PROMPT) + 9

    def sample(logits, sampling, seed, position):
        if position == place:
            raise FloatingPointError("broken")
        return int(logits.argmax())

    monkeypatch.setattr(loop, "sample", sample)
    written = []
    with pytest.raises(FloatingPointError):
        written.extend(e.id for e in generator.stream(PROMPT, max_new_tokens=30) if isinstance(e, Token))
    assert 2 < len(written) <= 9 and written == want[: len(written)]
    held = int(generator.cache.seen()[0])
    assert held in (len(PROMPT) + len(written), len(PROMPT) + len(written) - 1)
    assert generator.cache.layers == [[(PROMPT + written)[:held]]] * 3


def test_nothing_is_drafted_when_only_the_prompt_is_read():
    guesses = Guesses([[]], VOCAB)
    stats = Generator(HistoryModel(page_size=64), speculate=guesses).generate(PROMPT, max_new_tokens=0).stats
    assert (stats.drafted, stats.accepted, guesses.asked) == (0, 0, [])


@pytest.mark.parametrize(
    ("speculate", "error", "text"),
    [
        ("beam", ValueError, "lcore.Generator: speculate must be 'ngram', 'self' or None, got 'beam'"),
        (3, TypeError, "lcore.Generator: speculate must be 'ngram', 'self', None, or settings with .* got 3"),
        (Ngram, TypeError, "lcore.Generator: speculate must be .* or settings with .* such as Ngram"),
    ],
)
def test_what_is_no_way_to_speculate_is_refused(speculate, error, text):
    with pytest.raises(error, match=text):
        Generator(HistoryModel(), speculate=speculate)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Ngram(n_min=0), ValueError, "lcore.generation.Ngram: n_min must be an integer >= 1, got 0"),
        (lambda: Ngram(n_min=4, n_max=3), ValueError, r"n_max must be an integer in \[4, 64\], got 3"),
        (lambda: Ngram(n_max=65), ValueError, r"n_max must be an integer in \[2, 64\], got 65"),
        (lambda: Ngram(most=True), TypeError, "most must be an integer >= 1, got True"),
        (lambda: SelfSpeculation(window=0), ValueError, "lcore.generation.SelfSpeculation: window must be .* got 0"),
        (lambda: SelfSpeculation(from_tokens=-1), ValueError, "from_tokens must be an integer >= 0, got -1"),
        (lambda: SelfSpeculation(view=3), TypeError, "view must be callable or None, got 3"),
    ],
)
def test_settings_out_of_range_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
