"""Generation that goes on from a session file: the text of an uninterrupted run, from as few tokens as possible."""

import itertools
import os

import pytest
import torch
from tiny_model import byte_tokenizer, tiny_decoder

import lcore
from lcore.cache import StoredSession
from lcore.generation import Done, Prefill, Token

PROMPT = "One ring to rule them all, one ring to find them,"


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.session"


def generator(model, **options) -> lcore.Generator:
    return lcore.Generator(model, **{"prefill_chunk": 8, **options})


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


def tokens_of(path, row=0) -> list[int]:
    with StoredSession(path) as stored:
        return stored.tokens[row].tolist()


def count_steps(model, monkeypatch) -> list[int]:
    """Tokens of each step that the model is asked for."""
    steps, forward = [], type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, tokens, *a, **k: steps.append(tokens.shape[1]) or forward(self, tokens, *a, **k),
    )
    return steps


def test_the_file_holds_what_was_read_and_written(model, path):
    reply = generator(model).generate(PROMPT, max_new_tokens=7, session=path)
    assert reply.text == generator(model).generate(PROMPT, max_new_tokens=7).text
    assert tokens_of(path) == [*ids_of(PROMPT), *reply.tokens]
    assert reply.stats.reused_tokens == 0
    assert os.listdir(path.parent) == ["a.session"]


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 30, len(PROMPT) - 1])
def test_a_prompt_that_extends_the_session_is_read_from_there_on(model, path, cut, monkeypatch):
    gen = generator(model)
    gen.generate(PROMPT[:cut], max_new_tokens=0, session=path)
    assert tokens_of(path) == ids_of(PROMPT[:cut])
    steps = count_steps(model, monkeypatch)
    reply = gen.generate(PROMPT, max_new_tokens=9, session=path)
    assert sum(steps) == len(PROMPT) - cut + 9
    assert reply.stats.reused_tokens == cut and reply.stats.prompt_tokens == len(PROMPT)
    assert reply.text == generator(model).generate(PROMPT, max_new_tokens=9).text


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", ("fp32", "fp16")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(path, kv_format, dtype):
    """Two calls on one cache against two calls with a file between them: the logits that the last token leaves."""
    model = tiny_decoder(dtype=dtype)
    gen = generator(model, kv_format=kv_format, prefill_chunk=16)
    first = gen.generate(PROMPT, max_new_tokens=30, session=path)
    whole = generator(model, kv_format=kv_format, prefill_chunk=16)
    whole.generate(PROMPT, max_new_tokens=30)
    question = " What then?"
    on = whole.generate(question, max_new_tokens=20, cache=whole.cache, temperature=1.0)
    ids = [*ids_of(PROMPT), *first.tokens, *ids_of(question)]
    resumed = gen.generate(ids, max_new_tokens=20, session=path, temperature=1.0)
    assert resumed.tokens == on.tokens and resumed.stats.reused_tokens == len(PROMPT) + 30
    last = torch.tensor([[3]])
    with torch.no_grad():
        assert torch.equal(model(last, gen.cache), model(last, whole.cache))


def test_text_goes_on_in_the_middle_of_a_character(model, path):
    """The first new text is decoded with the tokens before it, also when they came from the file."""
    ids = ids_of("año")
    gen = generator(model)
    gen.generate(ids[:2], max_new_tokens=0, session=path)
    assert gen.generate(ids, max_new_tokens=12, session=path).text == generator(model).generate(ids, 12).text


@pytest.mark.parametrize("kv_format", ["fp32", "bf16"])
@pytest.mark.parametrize("shared", [3, 63, 64, 65, 100, 129])
def test_a_prompt_that_leaves_the_session_keeps_what_is_exact(path, kv_format, shared):
    """Where pages are rounded, a page that is cut would give rounded values for a tail that holds exact ones."""
    model = tiny_decoder()
    text = [i % 250 for i in range(140)]
    other = [*text[:shared], 7, 8, 9]
    gen = generator(model, kv_format=kv_format)
    gen.generate(text, max_new_tokens=0, session=path)
    reply = gen.generate(other, max_new_tokens=8, session=path)
    exact = shared if kv_format == "fp32" or shared >= 128 else shared // 64 * 64
    assert reply.stats.reused_tokens == exact
    fresh = generator(model, kv_format=kv_format)
    assert reply.tokens == fresh.generate(other, max_new_tokens=8).tokens
    assert tokens_of(path) == [*other, *reply.tokens]


@pytest.mark.parametrize("new", [0, 5])
def test_the_same_prompt_again_and_a_shorter_one(model, path, new):
    """The last token is read again: what follows it comes from its logits."""
    gen = generator(model)
    text = gen.generate(PROMPT, max_new_tokens=5, session=path).text
    for prompt in (PROMPT, PROMPT[:20]):
        reply = gen.generate(prompt, max_new_tokens=new, session=path)
        assert reply.stats.reused_tokens == len(prompt) - 1 and reply.stats.prompt_tokens == len(prompt)
        assert reply.text == generator(model).generate(prompt, max_new_tokens=new).text
        assert len(tokens_of(path)) == len(prompt) + new
    assert text


def test_another_text_is_refused_and_the_file_stays(model, path):
    gen = generator(model)
    gen.generate(PROMPT, max_new_tokens=0, session=path)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"lcore.Generator: prompt must begin as the text in the session file .*a.session"
    ):
        gen.stream("another", session=path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.session"]


def test_rows_of_a_batch(model, path):
    prompts, longer = ["abc", "de", "f" * 40], ["abcd", "dXYZ", "f" * 40 + "g"]
    gen = generator(model)
    gen.generate(prompts, max_new_tokens=0, session=path)
    replies = gen.generate(longer, max_new_tokens=6, session=path)
    assert [reply.stats.reused_tokens for reply in replies] == [3, 1, 40]
    assert [reply.text for reply in replies] == [r.text for r in generator(model).generate(longer, max_new_tokens=6)]
    assert tokens_of(path, 1) == [*ids_of("dXYZ"), *replies[1].tokens]
    with pytest.raises(ValueError, match=r"cache\.batch_size must be 3 as in the session file .*, got 1"):
        gen.generate("abc", session=path)


def change(model, **fields):
    """A model of the same weights with another config."""
    other = tiny_decoder(**fields)
    other.load_state_dict(model.state_dict())
    return other


def test_what_differs_is_named_with_both_values(model, path):
    generator(model).generate(PROMPT, max_new_tokens=0, session=path)

    def refused(model, text, **options):
        with pytest.raises(ValueError, match=rf"^lcore\.Generator: {text}"):
            generator(model, **options).stream(PROMPT, session=path)

    where = r"as in the session file .*a\.session"
    refused(
        change(model, rope=lcore.models.config.RopeConfig(theta=5e5)),
        rf"model.rope.theta must be '10000.0' {where}, got '500000.0'",
    )
    refused(change(model, rms_norm_eps=1e-5), rf"model.rms_norm_eps must be '1e-06' {where}, got '1e-05'")
    refused(tiny_decoder(num_layers=3), rf"model.num_layers must be '2' {where}, got '3'")
    refused(tiny_decoder(dtype=torch.bfloat16), rf"model.dtype must be 'float32' {where}, got 'bfloat16'")
    refused(tiny_decoder(seed=1), rf"model.weights must be '[0-9a-f]{{64}}' {where}, got '[0-9a-f]{{64}}'")
    refused(model, rf"cache.kv_format must be \['fp32', 'fp32'\] {where}, got \['bf16', 'bf16'\]", kv_format="bf16")
    generator(change(model, max_position_embeddings=777)).generate(PROMPT + "x", session=path)  # changes no key


def test_a_single_changed_weight_tensor_is_seen(path):
    """Every parameter is sampled."""
    from lcore.models.fingerprint import fingerprint

    model = tiny_decoder()
    seen = {fingerprint(model)["weights"]}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        seen.add(fingerprint(model)["weights"])
    assert len(seen) == 1 + len(list(model.parameters()))
    assert fingerprint(tiny_decoder()) == fingerprint(tiny_decoder())


def test_files_that_were_not_made_by_a_generator(model, path):
    model.new_cache().save(path)
    with pytest.raises(ValueError, match=r"model.vocab_size must be None as in the session file .*, got '257'"):
        generator(model).stream(PROMPT, session=path)
    path.write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match=r"^lcore.Generator: path must be a session file and"):
        generator(model).stream(PROMPT, session=path)
    with pytest.raises(ValueError, match="session must be None when cache is given"):
        generator(model).stream(PROMPT, session=path, cache=model.new_cache())


def test_a_stream_that_is_closed_or_interrupted_saves_what_was_read(model, path, monkeypatch):
    gen = generator(model)
    stream = gen.stream(PROMPT, max_new_tokens=3, session=path)
    events = list(itertools.takewhile(lambda event: not (isinstance(event, Prefill) and event.done >= 16), stream))
    assert events and not path.exists()
    stream.close()
    assert tokens_of(path) == ids_of(PROMPT)[:16]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stream = gen.stream(PROMPT, max_new_tokens=30, session=path)
        events = [next(stream) for _ in range(3)]
        assert events[0] == Prefill(0, len(PROMPT) - 16, None) and events[2].done == 16
        patch.setattr(type(model), "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert tokens_of(path) == ids_of(PROMPT)[:32]
    reply = gen.generate(PROMPT, max_new_tokens=3, session=path)
    assert reply.stats.reused_tokens == 32 and reply.text == generator(model).generate(PROMPT, max_new_tokens=3).text


def test_a_stream_that_is_closed_between_tokens_can_be_continued(model, path):
    gen = generator(model)
    stream = gen.stream(PROMPT, max_new_tokens=9, session=path)
    written = [event.id for event in itertools.islice((e for e in stream if isinstance(e, Token)), 4)]
    stream.close()
    assert tokens_of(path) == [*ids_of(PROMPT), *written[:3]]  # the last one was not fed
    reply = gen.generate([*ids_of(PROMPT), *written], max_new_tokens=5, session=path)
    assert [*written, *reply.tokens] == generator(model).generate(PROMPT, max_new_tokens=9).tokens


def test_an_error_leaves_the_file_as_it_was(model, path, monkeypatch):
    gen = generator(model)
    gen.generate(PROMPT[:20], max_new_tokens=0, session=path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise FloatingPointError("broken")

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(FloatingPointError, match="broken"):
        gen.generate(PROMPT, session=path)
    monkeypatch.setattr("lcore.generation.caches.free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="1,000 bytes are free"):
        gen.generate(PROMPT, session=path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.session"]


def test_one_stream_at_a_time(model, path):
    gen = generator(model)
    stream = gen.stream(PROMPT, max_new_tokens=1, session=path)
    with pytest.raises(BlockingIOError, match=r"lcore\.Generator: path must be a session file that no other process"):
        gen.stream(PROMPT, session=path)
    assert isinstance(list(stream)[-1], Done)
    del stream
    never_started = gen.stream(PROMPT, session=path)
    del never_started
    gen.generate(PROMPT, max_new_tokens=1, session=path)
