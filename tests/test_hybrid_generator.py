"""What a generator does with pages, done to those of a hybrid model: its states go along."""

import pytest
import torch
from state_cases import HYBRIDS, same_states, tiny_states_model

import lcore
from lcore.generation import Generator

DOCUMENT = [(7 * i * i + 3 * i + 11) % 256 for i in range(300)]


def write(model, count=4, **settings):
    generator = Generator(model, prefill_chunk=128, prefix_reuse=False, **settings)
    return generator.generate(DOCUMENT, max_new_tokens=count).tokens, generator.cache


@pytest.mark.parametrize("kind", HYBRIDS)
def test_settings_that_lose_nothing_change_nothing(kind, tmp_path):
    model = tiny_states_model(kind)
    want, plain = write(model)
    for settings in (
        {"context": 1000},
        {"max_bytes": 200_000, "overflow": tmp_path},
        {"policy": lcore.policies.SnapKV(512)},
        {"select": lcore.selection.Quest(64)},
    ):
        got, cache = write(model, **settings)
        assert got == want and same_states(cache, plain), settings
        assert cache.seen().tolist() == cache.states.seen().tolist() == [304]


@pytest.mark.parametrize("kind", HYBRIDS)
def test_policies_drop_pages_of_attention_layers_alone(kind):
    model = tiny_states_model(kind)
    for policy in (lcore.policies.StreamingLLM(64), lcore.policies.H2O(64, reindex=kind == "qwen3_next")):
        _, cache = write(model, policy=policy)
        assert all(int(cache.lengths(layer).max()) <= 128 for layer in range(cache.num_layers))
        assert cache.num_layers == 2 and cache.states.num_layers == 2
        assert cache.seen().tolist() == cache.states.seen().tolist() == [304]


@pytest.mark.parametrize("kv_format", ["int8", ("int8", "int4")])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_coded_formats_are_those_of_the_model_fed_by_hand(kind, kv_format):
    model = tiny_states_model(kind)
    got, _ = write(model, kv_format=kv_format)
    cache, ids = model.new_cache(kv_format=kv_format), []
    with torch.no_grad():
        for part in torch.tensor([DOCUMENT]).split(128, dim=1):
            logits = model(part, cache, last_only=True)
        for _ in range(4):
            ids.append(int(logits[0, 0].argmax()))
            logits = model(torch.tensor([ids[-1:]]), cache, last_only=True)
    assert got == ids


def test_keys_before_positions_need_positions():
    rule = (
        "rope must be False, as must reindex of a policy, in a model whose attention has no rotary positions, got True"
    )
    model = tiny_states_model("jamba")
    with pytest.raises(ValueError, match=f"^lcore.new_cache: {rule}$"):
        model.new_cache(rope=True)
    with pytest.raises(ValueError, match=f"^lcore.new_cache: {rule}$"):
        write(model, policy=lcore.policies.StreamingLLM(64, reindex=True))
