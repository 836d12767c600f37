"""lcore.StateCache, and the blocks that fill it."""

import math

import pytest
import torch
from model_cases import random_tokens
from tolerance import assert_close

import lcore
from lcore.cache import LayerState
from lcore.models import MambaConfig, MambaDecoder
from lcore.nn import GroupedRMSNorm, Mamba, Mamba2

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "state_size": 4}


def small_model(kind="mamba", **changes):
    torch.manual_seed(0)
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 2} if kind == "mamba2" else {}
    return MambaDecoder(MambaConfig(model_type=kind, **SHAPE, **heads, **changes)).eval()


def blocks():
    torch.manual_seed(0)
    return {
        "mamba": Mamba(16, 24, 4),
        "falcon": Mamba(16, 24, 4, norm_eps=1e-6),
        "mamba2": Mamba2(16, 4, 8, 5, num_groups=2, dt_limit=(0.01, 0.5)),
    }


def same(a, b):
    return all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def layers(cache):
    return [cache.layer(index) for index in range(cache.num_layers)]


@pytest.mark.parametrize("kind", ["mamba", "falcon", "mamba2"])
def test_a_block_is_differentiable_through_its_state(kind):
    block = blocks()[kind].double()
    x = torch.randn(2, 70, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 70, 16, dtype=torch.float64)
    grads = []
    for cuts in ([70], [1, 40, 1, 28]):
        block.zero_grad()
        state, outs = block.new_state(2), []
        for part in x.split(cuts, dim=1):
            out, state = block(part, state, return_final_state=True)
            outs.append(out)
        loss = (torch.cat(outs, dim=1) * weight).sum() + state.recurrent.square().sum() + state.conv.sum()
        grads.append(torch.autograd.grad(loss, [x, *block.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mamba", "falcon", "mamba2"])
def test_packed_sequences_are_apart(kind):
    block = blocks()[kind]
    x = torch.randn(1, 60, 16)
    x[0, 20:25] = math.nan
    cu_seqlens = torch.tensor([0, 20, 25, 25, 60], dtype=torch.int32)
    before = block.new_state(4)
    before = LayerState(*(torch.randn_like(tensor) for tensor in before))
    out, after = block(x, before, cu_seqlens=cu_seqlens, return_final_state=True)
    for row, (begin, end) in enumerate([(0, 20), (20, 25), (25, 25), (25, 60)]):
        if row == 1:
            assert out[:, begin:end].isnan().all()
            continue
        if begin == end:
            assert torch.equal(after.recurrent[row], before.recurrent[row])
            assert torch.equal(after.conv[row], before.conv[row])
            continue
        alone = LayerState(*(tensor[row : row + 1] for tensor in before))
        want, state = block(x[:, begin:end], alone, return_final_state=True)
        torch.testing.assert_close(out[:, begin:end], want, rtol=0, atol=1e-5)
        torch.testing.assert_close(after.recurrent[row : row + 1], state.recurrent, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_norm(groups, dtype):
    torch.manual_seed(0)
    norm = GroupedRMSNorm(12, groups, eps=1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12))
    x = torch.randn(5, 12).to(dtype)

    def formula(dtype):
        parts = x.to(dtype).view(5, groups, -1)
        normed = parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return normed.view(5, 12) * norm.weight.to(dtype)

    assert_close(norm(x), formula(torch.float64), formula(dtype), f"{groups} groups")


def test_a_step_replaces_the_state_of_every_layer():
    model = small_model()
    cache = model.new_cache(2)
    assert cache.batch_size == 2 and cache.num_layers == 2
    fresh = layers(cache)
    model(random_tokens(2, 9, vocab=50), cache)
    assert not any(torch.equal(new.recurrent, old.recurrent) for new, old in zip(layers(cache), fresh, strict=True))
    assert not any(state.recurrent.any() for state in fresh)
    assert not any(tensor.requires_grad for state in layers(cache) for tensor in state)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2"])
def test_fork(kind):
    model = small_model(kind)
    tokens = random_tokens(1, 20, vocab=50)
    cache = model.new_cache()
    model(tokens[:, :12], cache)
    fork = cache.fork()
    for _ in range(2):  # steps of one token, which one kernel takes in place
        model(tokens[:, :1], fork)
    want = model(tokens[:, 12:], cache)
    assert fork.seen().tolist() == [14] and cache.seen().tolist() == [20]
    again = model.new_cache()
    model(tokens[:, :12], again)
    model(tokens[:, :1], again)
    model(tokens[:, :1], again)
    assert same(layers(again), layers(fork))
    torch.testing.assert_close(want, model(tokens)[:, 12:], rtol=0, atol=1e-5)


def test_crop_and_reset():
    model = small_model()
    cache = model.new_cache(3)
    model(random_tokens(3, 5, vocab=50), cache, lengths=torch.tensor([5, 2, 0]))
    held = layers(cache)
    cache.crop(5)
    cache.crop(torch.tensor([5, 2, 0]))
    assert same(layers(cache), held)
    cache.crop(torch.tensor([5, 0, 0]))
    assert cache.seen().tolist() == [5, 0, 0]
    for state, old in zip(layers(cache), held, strict=True):
        for tensor, before in zip(state, old, strict=True):
            assert torch.equal(tensor[0], before[0]) and before[0].any()
            assert not tensor[1:].any() and before[1].any()
    with pytest.raises(ValueError) as caught:
        cache.crop(4)
    assert str(caught.value) == (
        "lcore.StateCache.crop: n must be a place of which there are states, [0, 0, 0] here: read on from there again, "
        "got [4, 4, 4]"
    )
    with pytest.raises(ValueError, match=r"^lcore.StateCache.crop: n must not be negative, got \[-1, -1, -1\]$"):
        cache.crop(-1)
    cache.reset()
    assert cache.seen().tolist() == [0, 0, 0]
    assert same(layers(cache), layers(model.new_cache(3)))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_bytes_are_what_torch_holds_at_any_length(kind):
    model = small_model(kind)
    cache = model.new_cache(2)
    sizes = [cache.stats()["bytes"]]
    for seq in (1, 30, 1, 100):
        model(random_tokens(2, seq, vocab=50), cache)
        held = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for state in layers(cache) for tensor in state}
        stats = cache.stats()
        assert stats["bytes"] == sum(held.values()) == stats["conv_bytes"] + stats["recurrent_bytes"]
        sizes.append(stats["bytes"])
    assert len(set(sizes)) == 1
    channels = 64 if kind == "mamba" else 64 + 2 * 2 * 4
    assert sizes[0] == 2 * 2 * 4 * (channels * 3 + 64 * 4)
    assert cache.stats()["tokens"] == 2 * 132


def test_a_step_that_fails_leaves_the_cache_alone():
    model = small_model()
    cache = model.new_cache()
    model(random_tokens(1, 5, vocab=50), cache)
    held = layers(cache)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.backbone.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(random_tokens(1, 3, vocab=50), cache)
    handle.remove()
    assert same(layers(cache), held) and cache.seen().tolist() == [5]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_some_rows_step_alone(kind):
    model = small_model(kind)
    first, second = random_tokens(3, 6, vocab=50), random_tokens(2, 4, vocab=50, seed=2)
    cache, want = model.new_cache(3), model.new_cache(2)
    model(first, cache)
    model(first[[2, 0]], want)
    held = layers(cache)
    rows = cache.rows(torch.tensor([2, 0]))
    for part in second.split([3, 1], dim=1):
        torch.testing.assert_close(model(part, rows), model(part, want), rtol=0, atol=1e-5)
    assert cache.seen().tolist() == [10, 6, 10] and rows.seen().tolist() == [10, 10]
    for state, expected, old in zip(layers(cache), layers(want), held, strict=True):
        for tensor, there, before in zip(state, expected, old, strict=True):
            torch.testing.assert_close(tensor[[2, 0]], there, rtol=0, atol=1e-5)
            assert torch.equal(tensor[1], before[1])


@pytest.mark.parametrize("wide", [True, False])
def test_the_sum_of_layers_runs_in_the_dtype_that_the_config_says(wide):
    model = small_model(residual_in_fp32=wide).bfloat16()
    seen = []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda _, inputs, out: seen.append(out[0].dtype))
    model(random_tokens(1, 3, vocab=50), model.new_cache())
    assert seen == [torch.float32 if wide else torch.bfloat16] * 2


def test_bad_input_is_refused():
    cache = small_model().new_cache(2)
    states = layers(cache)
    with pytest.raises(ValueError, match=r"^lcore.StateCache.advance: states must hold 2 layers, got 1$"):
        cache.advance(states[:1], 1)
    bad = [states[0], LayerState(states[1].conv, states[1].recurrent.double())]
    with pytest.raises(
        TypeError, match=r"^lcore.StateCache.advance: recurrent of layer 1 must have dtype float32, got"
    ):
        cache.advance(bad, 1)
    with pytest.raises(ValueError, match=r"^lcore.StateCache.layer: index must be an integer in \[0, 1\], got 2$"):
        cache.layer(2)
    with pytest.raises(ValueError, match=r"^lcore.StateCache: states must hold at least one layer, got 0$"):
        lcore.StateCache([])
    with pytest.raises(
        ValueError, match=r"^lcore.nn.Mamba: x must have shape \(batch, seq, hidden_size\) = \(\*, \*, 16\)"
    ):
        blocks()["mamba"](torch.randn(1, 3, 15))
