"""With and without reuse the generator computes the same bits, and pages of another model are never taken."""

import pytest
import torch
from tiny_model import tiny_decoder

import lcore
from lcore.generation import Completion, Generator
from lcore.generation.reuse import fingerprint
from lcore.positions import RopeConfig

DOCUMENT = [(17 * i * i + 5 * i + 3) % 256 for i in range(300)]
QUESTIONS = [[1, 2, 3], [200, 100, 7, 7], [9] * 40]


class Recorder:
    """The logits of each step of a model."""

    def __init__(self, model):
        self.steps: list[torch.Tensor] = []
        model.register_forward_hook(lambda module, arguments, logits: self.steps.append(logits.clone()))

    def take(self) -> list[torch.Tensor]:
        steps, self.steps = self.steps, []
        return steps


@pytest.mark.parametrize(
    ("dtype", "kv_format", "chunk"),
    [
        (torch.float32, None, 64),
        (torch.float32, "bf16", 64),
        (torch.float32, "bf16", 100),  # chunks that end inside a page
        (torch.float32, ("fp16", "fp32"), 2048),
        (torch.bfloat16, None, 48),
    ],
)
def test_logits_are_the_same_bits(dtype, kv_format, chunk):
    model = tiny_decoder(dtype=dtype)
    recorder = Recorder(model)
    reader, plain = (Generator(model, kv_format, chunk, prefix_reuse=reuse) for reuse in (True, False))

    def ask(prompt: list[int], new: int) -> Completion:
        known, with_reuse = reader.generate(prompt, max_new_tokens=new), recorder.take()
        fresh, without = plain.generate(prompt, max_new_tokens=new), recorder.take()
        assert known.tokens == fresh.tokens
        for step, (got, want) in enumerate(zip(reversed(with_reuse), reversed(without), strict=False)):
            assert torch.equal(got, want), f"{step} steps before the last"
        return known

    reused = [ask(DOCUMENT + question, 3).stats.reused_tokens for question in QUESTIONS]
    assert reused == [0, 256, 256]
    # A format that rounds does not keep written tokens: beyond the prompt's pages, the follow-up is read again.
    written = ask(DOCUMENT, 21).tokens
    assert ask([*DOCUMENT, *written, 5, 6], 3).stats.reused_tokens == (320 if kv_format is None else 256)


@pytest.mark.parametrize("kv_format", [None, "bf16"])
def test_rows_of_a_batch_are_the_same_bits(kv_format):
    model = tiny_decoder(model_type="mistral", sliding_window=(40, 40))
    recorder = Recorder(model)
    reader, plain = (Generator(model, kv_format, 64, prefix_reuse=reuse) for reuse in (True, False))
    reader.generate(DOCUMENT, max_new_tokens=0)
    prompts = [DOCUMENT[:130], [1], DOCUMENT[5:69], DOCUMENT + QUESTIONS[1]]
    recorder.take()
    known, last = reader.generate(prompts, max_new_tokens=12), recorder.take()[-1]
    fresh = plain.generate(prompts, max_new_tokens=12)
    assert [row.tokens for row in known] == [row.tokens for row in fresh]
    assert [row.stats.reused_tokens for row in known] == [128, 0, 0, 256]
    assert torch.equal(last, recorder.take()[-1])


def test_the_readme_of_prefix_cache_works():
    """The four lines of its docstring."""
    model, prefixes = tiny_decoder(), lcore.PrefixCache()
    ids = torch.tensor(DOCUMENT)
    logits = []
    for expected in (0, 256):
        cache = model.new_cache()
        [known] = prefixes.start(cache, [ids])
        assert known == expected
        with torch.no_grad():
            logits.append(model(ids[None, known:], cache)[:, -1])
        prefixes.insert(cache, 0, ids)
    assert torch.equal(*logits)


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([DOCUMENT[:9]])).logsumexp(-1).sum().backward()
    optimizer.step()


def replace(model):
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def scale_data(model):
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.01)


def low_rank(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data += torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1]))


def row(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[DOCUMENT[0]] += 1


def rotate(model):
    model.model.layers[0].self_attn.rotary.inv_freq *= 2


def load(model):
    model.load_state_dict(tiny_decoder(seed=1).state_dict())


def swap(model):
    model.load_state_dict(tiny_decoder(seed=1).state_dict(), assign=True)


@pytest.mark.parametrize("change", [step, replace, scale_data, low_rank, row, rotate, load, swap])
def test_a_changed_model_reads_the_text_again(change):
    model = tiny_decoder()
    reader = Generator(model)
    reader.generate(DOCUMENT, max_new_tokens=0)
    assert reader.generate(DOCUMENT, max_new_tokens=5).stats.reused_tokens == 256
    change(model)
    again = reader.generate(DOCUMENT, max_new_tokens=5)
    assert isinstance(again, Completion) and again.stats.reused_tokens == 0
    assert again.tokens == Generator(model, prefix_reuse=False).generate(DOCUMENT, max_new_tokens=5).tokens


def test_weights_that_change_while_a_text_is_read_leave_nothing():
    model = tiny_decoder()
    reader = Generator(model, prefill_chunk=100)
    stream = reader.stream(DOCUMENT, max_new_tokens=0)
    next(stream), next(stream)
    row(model)
    list(stream)
    assert reader.prefixes.stats()["runs"] == 0


@pytest.mark.parametrize(
    "other",
    [
        {"rope": RopeConfig(theta=20000.0)},
        {"rope": RopeConfig(rope_type="linear", factor=2.0)},
        {"model_type": "mistral", "sliding_window": (40, 40)},
        {"seed": 1},
        {"dtype": torch.bfloat16},
        {},
    ],
)
def test_other_models_do_not_share_pages(other):
    prefixes = lcore.PrefixCache(max_bytes=10**9)
    models = [tiny_decoder(), tiny_decoder(**other)]
    for model in models:
        reader = Generator(model, "fp32", prefix_reuse=prefixes)
        assert reader.generate(DOCUMENT, max_new_tokens=5).stats.reused_tokens == 0
    for model in models:
        reader = Generator(model, "fp32", prefix_reuse=prefixes)
        again = reader.generate(DOCUMENT, max_new_tokens=5)
        assert again.stats.reused_tokens == 256
        assert again.tokens == Generator(model, "fp32", prefix_reuse=False).generate(DOCUMENT, max_new_tokens=5).tokens
    assert fingerprint(models[0]) != fingerprint(models[1])


def test_formats_do_not_share_pages():
    model, prefixes = tiny_decoder(), lcore.PrefixCache(max_bytes=10**9)
    for reused in (0, 256):
        for kv_format in ("fp16", "bf16", ("bf16", "fp16")):
            reader = Generator(model, kv_format, prefix_reuse=prefixes)
            assert reader.generate(DOCUMENT, max_new_tokens=2).stats.reused_tokens == reused


def test_where_chunks_cut_pages_only_equal_cuts_share_a_format_that_rounds():
    model, prefixes = tiny_decoder(), lcore.PrefixCache(max_bytes=10**9)
    reused = []
    for chunk in (64, 128, 100, 100, 90):
        reader = Generator(model, "bf16", chunk, prefix_reuse=prefixes)
        reused.append(reader.generate(DOCUMENT, max_new_tokens=0).stats.reused_tokens)
    assert reused == [0, 256, 0, 256, 0]


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_decoder()
    reader = Generator(model)
    for reused in (0, 256):
        assert reader.generate(DOCUMENT, max_new_tokens=2).stats.reused_tokens == reused
