"""The generator over a part of the cache: the text of a model that reads it, and what may be missing."""

import pytest
import torch
from tiny_model import greedy_by_hand, tiny_decoder, tiny_folder
from typer.testing import CliRunner

from lcore import PrefixCache, selection
from lcore.cli import app
from lcore.generation import Done, Generator

PROMPT = [(17 * i * i + 5 * i + 3) % 256 for i in range(700)]

pytestmark = pytest.mark.usefixtures("one_thread")


def quest(budget, **options):
    return selection.Quest(budget, **{"dense_layers": 0, **options})


def dropped_of(generator, prompt, new):
    events = generator.stream(prompt, max_new_tokens=new)
    return next(event.stats.dropped_mass for event in events if isinstance(event, Done))


@pytest.mark.parametrize("select", [quest(3), selection.InfLLM(4, recent=1, local_tokens=64, sinks=1)])
def test_the_text_is_the_models_own_over_what_is_read(select):
    model = tiny_decoder()
    ids, cache = greedy_by_hand(model, PROMPT, 64, 60, select=select)
    generator = Generator(model, prefill_chunk=64, select=select)
    assert generator.generate(PROMPT, max_new_tokens=60).tokens == ids
    assert torch.equal(generator.cache.lengths(1), cache.lengths(1))
    assert ids != Generator(model).generate(PROMPT, max_new_tokens=60).tokens


def test_what_may_be_missing_is_told_and_kept():
    model = tiny_decoder()
    want = Generator(model).generate(PROMPT, max_new_tokens=30).tokens
    assert 0 < dropped_of(Generator(model, select=quest(3)), PROMPT, 30) <= 1
    for mass in (0.2, 1e-9):
        generator = Generator(model, select=quest(mass))
        assert dropped_of(generator, PROMPT, 30) <= mass
    assert generator.generate(PROMPT, max_new_tokens=30).tokens == want
    assert dropped_of(Generator(model), PROMPT, 30) == 0


def test_a_prompt_that_was_read_before_changes_no_text():
    model = tiny_decoder()
    prefixes = PrefixCache()
    for select in (quest(3), None):
        generator = Generator(model, prefix_reuse=prefixes, select=select)
        same = Generator(model, prefix_reuse=False, select=select)
        for prompt in (PROMPT, [*PROMPT[:650], 1, 2, 3]):
            done = generator.generate(prompt, max_new_tokens=150)
            text = [*prompt, *done.tokens, 5]
            longer = generator.generate(text, max_new_tokens=20)
            assert done.tokens == same.generate(prompt, max_new_tokens=150).tokens
            assert longer.tokens == same.generate(text, max_new_tokens=20).tokens
    assert longer.stats.reused_tokens > 0


def test_a_session_goes_on_under_the_same_selection(tmp_path):
    model = tiny_decoder()
    path = tmp_path / "a.session"
    once = Generator(model, select=quest(3)).generate(PROMPT, max_new_tokens=80).tokens
    part = Generator(model, select=quest(3)).generate(PROMPT, max_new_tokens=40, session=path).tokens
    rest = Generator(model, select=quest(3)).generate(PROMPT + part, max_new_tokens=40, session=path)
    assert part + rest.tokens == once and rest.stats.reused_tokens >= 700
    with pytest.raises(ValueError, match="select must be 'Quest"):
        Generator(model).generate(PROMPT, max_new_tokens=1, session=path)
    infllm = selection.InfLLM(4, recent=1, sinks=1)
    with pytest.raises(NotImplementedError, match="InfLLM has observed"):
        Generator(model, select=infllm).generate(PROMPT, max_new_tokens=1, session=tmp_path / "b.session")


def test_rows_of_a_batch_read_their_own_pages():
    model = tiny_decoder()
    prompts = [PROMPT, PROMPT[:50], PROMPT[100:470]]
    generator = Generator(model, prefill_chunk=64, select=quest(3))
    together = generator.generate(prompts, max_new_tokens=30)
    for prompt, completion in zip(prompts, together, strict=True):
        assert generator.generate(prompt, max_new_tokens=30).tokens == completion.tokens


def test_from_the_command_line(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    arguments = ["generate", "--model", str(folder), "-p", "abcdefgh " * 90, "-n", "20", "--raw"]
    found = CliRunner().invoke(app, [*arguments, "--select", "quest:budget=3,dense_layers=0"])
    assert found.exit_code == 0 and "of attention missed" in found.stderr
    assert "missed" not in CliRunner().invoke(app, arguments).stderr
    wrong = CliRunner().invoke(app, [*arguments, "--select", "quest:budget=0"])
    assert wrong.exit_code == 1 and "budget must be" in wrong.stderr


def test_what_does_not_go_together():
    model = tiny_decoder()
    with pytest.raises(TypeError, match=r"Generator: select must be an lcore\.selection"):
        Generator(model, select="quest")
