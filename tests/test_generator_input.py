"""Every kind of prompt and of end, and what bad arguments say."""

import numpy as np
import pytest
import torch
from scripted_model import VOCAB, HistoryModel

from lcore.generation import Generator

A, B, C, D = 1, 2, 3, 4  # their texts


def generate(prompt, script=None, eos=(), **options):
    return Generator(HistoryModel(script, eos=eos)).generate(prompt, **options)


def written(*ids: int) -> dict[int, int]:
    """A script that writes ids after the two tokens that the prompt [9, 9] has."""
    return dict(enumerate(ids, start=2))


def test_text_ids_and_tensors_are_the_same_prompt():
    text = generate("XYZ", max_new_tokens=5)
    ids = [1, *(ord(c) - 64 for c in "XYZ")]  # text begins with the begin-of-text token
    for prompt in (ids, tuple(ids), list(np.array(ids)), torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
        assert generate(prompt, max_new_tokens=5).tokens == text.tokens
    assert text.text == "".join(chr(64 + i) for i in text.tokens)


def test_messages_go_through_the_chat_template():
    generator = Generator(HistoryModel())
    generator.generate([{"role": "user", "content": "HI"}], max_new_tokens=0)
    want = generator.model.tokenizer.encode("[user]HI[assistant]", add_special_tokens=False)
    assert generator.cache.layers[0] == [want]


def test_text_that_continues_a_cache_has_no_begin_token():
    generator = Generator(HistoryModel())
    generator.generate("AB", max_new_tokens=0)
    generator.generate("CD", max_new_tokens=0, cache=generator.cache)
    assert generator.cache.layers[0] == [[1, A, B, C, D]]


def test_batches_of_every_kind():
    message = {"role": "user", "content": "HI"}
    for batch in (["AB", "C"], [[1, 2], [3]], [[message], [message, message]], torch.tensor([[1, 2], [3, 4]])):
        assert [len(c.tokens) for c in generate(batch, max_new_tokens=2)] == [2, 2]
    assert len(generate(["AB"], max_new_tokens=2)) == 1


def test_end_of_text_is_reported_and_has_no_text():
    done = generate([9, 9], written(A, B, 63, C), eos=(62, 63))
    assert (done.text, done.tokens, done.reason) == ("AB", [A, B, 63], "eos")


def test_stop_ids_end_the_text():
    done = generate([9, 9], written(A, B, C), stop_ids=[C, 60])
    assert done.tokens == generate([9, 9], written(A, B, C), stop_ids=C).tokens
    assert (done.text, done.tokens, done.reason) == ("AB", [A, B, C], "stop")


def test_stop_strings_end_the_text_before_them():
    done = generate([9, 9], written(A, B, C, D), stop=["CD", "XX"])
    assert (done.text, done.tokens, done.reason) == ("AB", [A, B, C, D], "stop")
    assert generate([9, 9], written(A, B, C, D), stop="BC").text == "A"


def test_held_back_text_comes_when_the_length_ends_it():
    done = generate([9, 9], written(A, B, C), stop="CD", max_new_tokens=3)
    assert (done.text, done.reason) == ("ABC", "length")


def test_no_new_tokens_only_reads():
    done = generate([9, 9], max_new_tokens=0)
    assert (done.text, done.tokens, done.reason) == ("", [], "length")


def test_one_token_prompt():
    assert len(generate([0], max_new_tokens=3).tokens) == 3


def test_without_a_tokenizer_ids_work_and_text_does_not():
    model = HistoryModel()
    model.tokenizer = None
    done = Generator(model).generate([9, 9], max_new_tokens=3)
    assert len(done.tokens) == 3 and done.text == ""
    with pytest.raises(ValueError, match="prompt must be token ids because the model has no tokenizer"):
        Generator(model).stream("text")
    with pytest.raises(ValueError, match="stop must be empty because the model has no tokenizer"):
        Generator(model).stream([9], stop="x")


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        ("", ValueError, "prompt must not be empty"),
        ([], ValueError, "prompt must not be empty"),
        ([[1], []], ValueError, "prompt must not be empty"),
        (["A", ""], ValueError, "prompt must not be empty"),
        (torch.empty(0, dtype=torch.int64), ValueError, "prompt must not be empty"),
        ([1, VOCAB], ValueError, rf"prompt must hold token ids in \[0, {VOCAB}\), got {VOCAB}"),
        ([5, -1], ValueError, rf"prompt must hold token ids in \[0, {VOCAB}\), got -1"),
        ([1, 2**80], TypeError, "prompt must hold integers"),
        ([1, 2.5], TypeError, "prompt must hold integers, got float32"),
        ([1, "a"], TypeError, "prompt must hold integers, got str"),
        ([1, None], TypeError, "prompt must hold integers, got NoneType"),
        (torch.ones(3), TypeError, "prompt must hold integers, got float32"),
        (torch.ones(2, 2, 2, dtype=torch.int64), ValueError, "prompt must be one-dimensional"),
        (7, TypeError, "prompt must be text, token ids or messages, got int"),
        (None, TypeError, "prompt must be text, token ids or messages, got NoneType"),
    ],
)
def test_bad_prompts(prompt, error, text):
    model = HistoryModel()
    with pytest.raises(error, match=f"lcore.Generator: {text}"):
        Generator(model).stream(prompt)
    assert model.steps == []


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be 0 or more, got -1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int, got 2.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0 or more, got -1.0"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"stop": [""]}, ValueError, "stop must hold strings that are not empty"),
        ({"stop": [3]}, TypeError, "stop must hold strings, got 3"),
        ({"stop_ids": ["x"]}, TypeError, "stop_ids must be an int, got 'x'"),
        ({"stop_ids": [-2]}, ValueError, "stop_ids must be 0 or more, got -2"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=f"lcore.Generator: {text}"):
        Generator(HistoryModel()).stream([1, 2], **options)


def test_bad_generators():
    with pytest.raises(ValueError, match="prefill_chunk must be 1 or more, got 0"):
        Generator(HistoryModel(), prefill_chunk=0)
    with pytest.raises(TypeError, match=r"prefill_chunk must be an int, got 1\.5"):
        Generator(HistoryModel(), prefill_chunk=1.5)
    with pytest.raises(TypeError, match=r"policy must be an lcore\.policies\.Policy or None, got 'snapkv'"):
        Generator(HistoryModel(), policy="snapkv")
