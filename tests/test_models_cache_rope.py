"""Decoders over caches that hold keys before RoPE: the same logits, and texts longer than any position."""

import json

import pytest
import torch
from model_cases import CASES, random_tokens, reference_logits, write_reference
from test_generator_policy import PROMPT
from tiny_model import greedy_by_hand, tiny_decoder, tiny_folder
from typer.testing import CliRunner

import lcore
from lcore import policies
from lcore.cli import app
from lcore.generation import Generator, SelfSpeculation

SEQ = 150  # pages of 64: two full ones and a tail
STREAM = policies.StreamingLLM(80, sinks=4, reindex=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def read(model, tokens, chunks, **options):
    cache = model.new_cache(tokens.shape[0], **options)
    with torch.no_grad():
        return torch.cat([model(part, cache) for part in tokens.split(chunks, dim=1)], dim=1), cache


@pytest.mark.parametrize("name", CASES)
def test_logits_of_every_family(name, tmp_path):
    """Scaled frequencies, attention scaling, windows, odd head sizes."""
    reference = write_reference(name, tmp_path)
    tokens = random_tokens(2, SEQ)
    model = lcore.load_model(tmp_path)
    got, cache = read(model, tokens, [1, 2, 61, 1, 64, 20, 1], rope=True)
    assert cache.rope == model.model.layers[0].self_attn.rotary.rotation
    torch.testing.assert_close(got, reference_logits(reference, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_and_layers_with_rotations_of_their_own(dtype):
    sliding = lcore.positions.RopeConfig(theta=100.0)
    model = tiny_decoder(dtype=dtype, model_type="qwen3", sliding_window=(None, 40), sliding_rope=sliding)
    tokens = random_tokens(3, 100)
    lengths = torch.tensor([100, 7, 60])
    caches = [model.new_cache(3, rope=rope) for rope in (False, True)]
    assert caches[0].rope is None and len(caches[1].rope) == 2
    with torch.no_grad():
        for part, counts in ((tokens, lengths), (tokens[:, :9], None)):
            want, got = (model(part, cache, lengths=counts, last_only=True) for cache in caches)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_generator_reindexes_by_itself():
    model = tiny_decoder()
    ids, cache = greedy_by_hand(model, PROMPT, 64, 90, policy=STREAM)
    generator = Generator(model, prefill_chunk=64, policy=STREAM)
    assert generator.generate(PROMPT, max_new_tokens=90).tokens == ids
    assert cache.rope == generator.cache.rope == model.model.layers[1].self_attn.rotary.rotation
    assert int(cache.lengths(0).max()) <= 80 + 64 and generator.cache.seen().tolist() == [390]
    plain = policies.StreamingLLM(80, sinks=4)
    assert ids != Generator(model, prefill_chunk=64, policy=plain).generate(PROMPT, max_new_tokens=90).tokens
    whole = policies.StreamingLLM(1000, reindex=True)
    want = Generator(model, prefill_chunk=64).generate(PROMPT, max_new_tokens=40).tokens
    assert Generator(model, prefill_chunk=64, policy=whole).generate(PROMPT, max_new_tokens=40).tokens == want


def test_rows_of_a_batch():
    model = tiny_decoder()
    prompts = [PROMPT, PROMPT[:50], PROMPT[100:270]]
    generator = Generator(model, prefill_chunk=64, policy=STREAM)
    together = generator.generate(prompts, max_new_tokens=30)
    for prompt, completion in zip(prompts, together, strict=True):
        assert generator.generate(prompt, max_new_tokens=30).tokens == completion.tokens


def test_a_text_longer_than_the_model_was_made_for(recwarn):
    """Positions stay below what is kept, so that there is nothing to warn of; with those of the text there is."""
    model = tiny_decoder(max_position_embeddings=200)
    Generator(model, prefill_chunk=64, policy=STREAM).generate(PROMPT, max_new_tokens=8)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the model was made for 200"):
        Generator(model, prefill_chunk=64, policy=policies.StreamingLLM(80)).generate(PROMPT, max_new_tokens=8)


def test_command_line(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    arguments = ["generate", "--model", str(folder), "-p", "abc " * 60, "-n", "4", "--raw", "--policy"]
    result = CliRunner().invoke(app, [*arguments, "streamingllm:budget=100,reindex=true"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*arguments, "streamingllm:budget=100,reindex=maybe"])
    assert result.exit_code == 1 and "StreamingLLM: reindex must be a bool, got 'maybe'" in result.output


def test_speculation_over_such_a_cache():
    model = tiny_decoder()
    want = Generator(model).generate(PROMPT, max_new_tokens=40).tokens
    generator = Generator(model, speculate=SelfSpeculation(window=64, from_tokens=0))
    cache = model.new_cache(rope=True)
    assert generator.generate(PROMPT, max_new_tokens=40, cache=cache).tokens == want
    assert generator.cache.rope is not None


def test_pages_before_and_after_rope_are_not_taken_for_each_other():
    model, prefixes = tiny_decoder(), lcore.PrefixCache()
    tokens = torch.tensor(PROMPT[:200])
    caches = []  # that are open: their pages are not given up for those of the next
    for rope, known in ((False, 0), (True, 0), (True, 192), (False, 192)):
        caches.append(cache := model.new_cache(rope=rope))
        assert prefixes.start(cache, [tokens]) == [known]
        with torch.no_grad():
            model(tokens[None, known:], cache)
        prefixes.insert(cache, 0, tokens)


def test_files_say_how_keys_are_stored(tmp_path):
    model = tiny_decoder()
    path = tmp_path / "cache"
    _, cache = read(model, torch.tensor([PROMPT]), [200, 100], rope=True)
    cache.save(path)
    loaded = lcore.PagedCache.load(path)
    assert loaded.rope == cache.rope
    step = torch.tensor([[5]])
    with torch.no_grad():
        assert torch.equal(model(step, loaded), model(step, cache))
    with (
        lcore.cache.StoredSession(path) as stored,
        pytest.raises(ValueError, match=r"cache\.rope must be \{'inv_freq'"),
    ):
        stored.check(model.new_cache())
    assert json.loads(stored._file.strings["settings"])["rope"]["attention_scaling"] == 1.0


def test_positions_of_the_callers_own_are_refused():
    model = tiny_decoder()
    with pytest.raises(ValueError, match="Decoder: positions must be None with a cache that holds keys before RoPE"):
        model(torch.tensor([[1, 2]]), model.new_cache(rope=True), positions=torch.tensor([5, 6]))
