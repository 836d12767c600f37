"""The generator with real models and paged caches."""

import re

import pytest
import torch
from tiny_model import tiny_decoder

import lcore
from lcore.generation import Completion, Generator, Token

HOT = {"temperature": 1.0, "top_k": 100, "top_p": 0.95, "min_p": 0.001}
PROMPT = [(17 * i * i + 5 * i + 3) % 256 for i in range(300)]


def written(completion: Completion | list[Completion]) -> list[int]:
    assert isinstance(completion, Completion)
    return completion.tokens


@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [1, 48, 64, 299, 2048])
def test_same_seed_same_text_for_every_chunk_size(chunk, options):
    model = tiny_decoder()
    whole = written(Generator(model, prefill_chunk=300).generate(PROMPT, max_new_tokens=24, seed=7, **options))
    cut = written(Generator(model, prefill_chunk=chunk).generate(PROMPT, max_new_tokens=24, seed=7, **options))
    assert cut == whole
    assert len(set(whole)) > 4


def test_greedy_text_follows_the_models_own_logits():
    model = tiny_decoder()
    ids = PROMPT[:50] + written(Generator(model, prefill_chunk=16).generate(PROMPT[:50], max_new_tokens=20))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    assert logits[49:-1].argmax(-1).tolist() == ids[50:]


@pytest.mark.parametrize("options", [{}, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "model_changes", [{}, {"model_type": "mistral", "sliding_window": (40, 40)}], ids=["full", "window"]
)
def test_a_batch_of_different_lengths_equals_single_runs(model_changes, options):
    model = tiny_decoder(**model_changes)
    prompts = [PROMPT[:130], PROMPT[:1], PROMPT[5:69], PROMPT]
    generator = Generator(model, prefill_chunk=64)
    batch = generator.generate(prompts, max_new_tokens=12, seed=1, **options)
    assert [len(p) + len(c.tokens) for p, c in zip(prompts, batch, strict=True)] == generator.cache.seen().tolist()
    for row, prompt in enumerate(prompts):
        assert batch[row].tokens == written(generator.generate(prompt, max_new_tokens=12, seed=1 + row, **options))


def test_rows_that_end_leave_the_others_as_they_are():
    model = tiny_decoder()
    prompts = [PROMPT[:20], PROMPT[40:110]]
    free = [written(Generator(model).generate(p, max_new_tokens=30)) for p in prompts]
    stop = next(t for t in free[0] if t not in free[1])
    batch = Generator(model).generate(prompts, max_new_tokens=30, stop_ids=[stop])
    assert batch[0].tokens == free[0][: free[0].index(stop) + 1]
    assert batch[1].tokens == free[1]
    assert [c.reason for c in batch] == ["stop", "length"]


def test_forks_answer_different_questions_about_one_text():
    model = tiny_decoder()
    generator = Generator(model, prefill_chunk=64)
    generator.generate(PROMPT, max_new_tokens=0)
    document = generator.cache
    for question in ([1, 2, 3], [200, 100]):
        forked = generator.generate(question, max_new_tokens=10, cache=document.fork(), seed=2, **HOT)
        whole = Generator(model, prefill_chunk=64).generate(PROMPT + question, max_new_tokens=10, seed=2, **HOT)
        assert written(forked) == written(whole)
    assert document.seen().tolist() == [300]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("place", ["before attention", "after attention"])
@pytest.mark.parametrize("step", [0, 2, 4, 5, 9])
def test_ctrl_c_leaves_a_cache_that_continues(step, place, layer):
    """Steps 0 to 4 read the prompt, 64 tokens each; later ones write."""
    model = tiny_decoder()
    expected = written(Generator(model).generate(PROMPT, max_new_tokens=12, seed=3, **HOT))
    module = model.model.layers[layer].self_attn if place == "before attention" else model.model.layers[layer].mlp
    calls = 0

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == step + 1:
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    generator, ids = Generator(model, prefill_chunk=64), []
    with pytest.raises(KeyboardInterrupt):
        ids.extend(
            event.id for event in generator.stream(PROMPT, max_new_tokens=12, seed=3, **HOT) if isinstance(event, Token)
        )
    handle.remove()
    cache = generator.cache
    held = int(cache.seen()[0])
    assert held == (64 * step if step < 5 else 300 + step - 5)
    assert [int(cache.seen(i)[0]) for i in range(2)] == [held, held]
    rest = (PROMPT + ids)[held:]
    left = 12 - len(ids)
    assert ids + written(generator.generate(rest, max_new_tokens=left, seed=3, cache=cache, **HOT)) == expected


def test_any_error_inside_the_model_leaves_a_usable_cache_too():
    model = tiny_decoder()
    generator = Generator(model, prefill_chunk=64)

    def fail(*_):
        raise RuntimeError("broken")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        generator.generate(PROMPT, max_new_tokens=1)
    handle.remove()
    assert generator.cache.seen(0).tolist() == [0]
    again = written(generator.generate(PROMPT, max_new_tokens=5, cache=generator.cache))
    assert again == written(Generator(model).generate(PROMPT, max_new_tokens=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_has_the_models_dtype_unless_asked(dtype):
    model = tiny_decoder(dtype=dtype)
    done = Generator(model).generate(PROMPT, max_new_tokens=4)
    assert done.stats.cache_bytes >= 304 * 2 * 2 * 16 * 2 * dtype.itemsize
    half = Generator(model, kv_format="bf16")
    half.generate(PROMPT, max_new_tokens=4)
    assert half.cache.kv_format in ("bf16", ("bf16", "bf16"))


def test_a_prompt_longer_than_memory_is_refused_before_any_work():
    model = tiny_decoder()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(MemoryError) as caught:
        Generator(model).stream(PROMPT, max_new_tokens=10**12)
    text = str(caught.value).replace(",", "")
    assert text.startswith("lcore.Generator: prompt + max_new_tokens must fit into memory: 1000000000300 tokens need ")
    needed, free, fits = (
        int(re.search(rf"(\d+) {word}", text)[1]) for word in (r"bytes \(cache", "bytes are free", "tokens would fit")
    )
    assert needed > 10**12 * 512 > free > fits * 512 > 0
    assert calls == []


def test_a_format_that_does_not_exist_is_named():
    with pytest.raises((ValueError, NotImplementedError), match="kv_format"):
        Generator(tiny_decoder(), kv_format="int3").stream(PROMPT)


def test_generator_is_public():
    assert lcore.Generator is Generator
