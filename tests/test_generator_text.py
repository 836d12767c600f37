"""Incremental detokenization and stop strings, over byte tokens: the hardest vocabulary for both."""

import random

import pytest

from lcore.generation.text import LONGEST_WAIT, REPLACEMENT, Detokenizer, TextStream

TEXTS = [
    "plain ascii\n",
    "naïve café — ½ €",
    "日本語のテキスト",
    "👩‍👩‍👧 family 🇫🇷",
    "e\u0301 combining",
    "",
    "a" + REPLACEMENT + "b",
]


def decode_bytes(ids: list[int]) -> str:
    """A byte-level tokenizer: each maximal broken sequence is one replacement character."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_fallback(ids: list[int]) -> str:
    """A byte-fallback tokenizer: a run of bytes that is not all valid is one replacement character for every byte."""
    try:
        return bytes(ids).decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(i) if i < 128 else REPLACEMENT for i in ids)


def pieces(stream: TextStream, ids: bytes | list[int]) -> tuple[list[str], bool]:
    out = []
    for token in ids:
        text, stopped = stream.push(token)
        out.append(text)
        if stopped:
            return out, True
    text, stopped = stream.flush()
    return [*out, text], stopped


@pytest.mark.parametrize("decode", [decode_bytes, decode_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(decode, text):
    out, _ = pieces(TextStream(decode), text.encode())
    assert "".join(out) == text
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in out)


def test_a_character_is_given_with_its_last_byte():
    out, _ = pieces(TextStream(decode_bytes), "é€a".encode())
    assert out == ["", "é", "", "", "€", "a", ""]


def test_tokens_that_always_end_inside_a_character():
    """Multi-byte tokens cut after the first byte of the next character: no token boundary is a character boundary."""
    data = "日本語文字列".encode()
    tokens = [data[:1], *(data[i : i + 3] for i in range(1, len(data), 3))]
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace"))
    out, _ = pieces(stream, list(range(len(tokens))))
    assert out == ["", *"日本語文字列", ""]


def test_broken_bytes_at_the_end_come_out_as_replacement():
    out, _ = pieces(TextStream(decode_bytes), "ab€".encode()[:-1])
    assert "".join(out) == "ab" + REPLACEMENT


def test_endless_broken_bytes_cost_a_bounded_window():
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    out, _ = pieces(TextStream(decode), [0xFF] * 1000)
    assert "".join(out) == REPLACEMENT * 1000
    assert longest <= 2 * LONGEST_WAIT


def test_long_text_is_decoded_in_short_windows():
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    pieces(TextStream(decode), "größer ".encode() * 500)
    assert longest <= 8


def test_the_prompt_decides_how_the_first_token_reads():
    """Decoders that drop a leading space (SentencePiece) must not drop it in the middle of a text."""

    def decode(ids: list[int]) -> str:
        return "".join(["▁Hello", "▁world", "!"][i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert Detokenizer(decode).push(1) == "world"
    assert Detokenizer(decode, context=[0]).push(1) == " world"


def test_a_prompt_that_ends_inside_a_character_is_completed():
    euro = list("€".encode())
    stream = Detokenizer(decode_bytes, context=euro[:2])
    assert stream.push(euro[2]) == "€"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_stop_strings_across_token_borders(size):
    text = "one two STOP three"
    tokens = [text[i : i + size] for i in range(0, len(text), size)]
    stream = TextStream(lambda ids: "".join(tokens[i] for i in ids), stop=["STOP"])
    out, stopped = pieces(stream, list(range(len(tokens))))
    assert stopped
    assert "".join(out) == "one two "


def test_text_that_may_become_a_stop_string_is_held_back():
    stream = TextStream(decode_bytes, stop=["END.", "NO"])
    out = [stream.push(i)[0] for i in b"a EN ENDE NN"]
    assert out == ["a", " ", "", "", "EN ", "", "", "", "END", "E ", "", "N"]
    assert stream.flush() == ("N", False)


def test_the_first_stop_string_to_be_complete_wins():
    stream = TextStream(decode_bytes, stop=["abc", "b"])
    assert pieces(stream, b"xabc") == (["x", "", "a"], True)


def test_overlapping_beginnings():
    stream = TextStream(decode_bytes, stop=["aab"])
    out, stopped = pieces(stream, b"aaaab")
    assert (stopped, "".join(out)) == (True, "aa")


def test_a_stop_string_completed_by_the_flush():
    stream = TextStream(decode_bytes, stop=["x" + REPLACEMENT])
    out, stopped = pieces(stream, b"ax\xe2")
    assert (stopped, "".join(out)) == (True, "a")


def test_random_text_with_random_stops_is_the_cut_text():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("abé") for _ in range(30))
        stops = ["".join(rng.choice("abé") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        out, stopped = pieces(TextStream(decode_bytes, stop=stops), text.encode())
        # the stop whose last character comes first; of those the longest, which begins first
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        assert stopped == bool(ends)
        assert "".join(out) == (text[: min(ends)[1]] if ends else text)


def test_without_a_decoder_there_is_no_text():
    stream = TextStream(None)
    assert stream.push(3) == ("", False)
    assert stream.flush() == ("", False)
