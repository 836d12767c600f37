"""The Gated DeltaNet block against that of Qwen3-Next in transformers."""

import math

import pytest
import torch
import transformers
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from lcore.cache import LayerState
from lcore.nn import GatedDeltaNet

SEQ = 150  # chunks of 64 in the kernel: two full ones and a rest


def pair(key_heads=2, value_heads=4, key_dim=16, value_dim=24):
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=2, linear_num_key_heads=key_heads, linear_num_value_heads=value_heads,
        linear_key_head_dim=key_dim, linear_value_head_dim=value_dim, rms_norm_eps=1e-3,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.1)
        theirs.A_log.sub_(6)  # states that last longer than a chunk
    ours = GatedDeltaNet(32, key_heads, value_heads, key_dim, value_dim, norm_eps=1e-3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (3, 3)])
def test_equals_transformers_in_one_pass_and_from_a_state(heads):
    ours, theirs = pair(*heads)
    x = torch.randn(2, SEQ, 32)
    with torch.no_grad():
        want = theirs(x)
        torch.testing.assert_close(ours(x), want, rtol=0, atol=1e-5)
        for cuts in ([SEQ], [1, 2, 61, 1, 64, 20, 1]):
            state, parts = ours.new_state(2), []
            for part in x.split(cuts, dim=1):
                before = LayerState(*(tensor.clone() for tensor in state))
                out, after = ours(part, state, return_final_state=True)
                assert torch.equal(state.recurrent, before.recurrent) and torch.equal(state.conv, before.conv)
                parts, state = [*parts, out], after
            torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=0, atol=1e-5)
        fresh, _ = ours(x[:, 100:], ours.new_state(2), return_final_state=True)
        assert (fresh[:, 20:] - want[:, 120:]).abs().max() > 1e-3  # what the state holds matters


def test_gradients_equal_transformers():
    ours, theirs = pair()
    x = torch.randn(2, 70, 32)
    weight = torch.randn(2, 70, 32)
    for block in (ours, theirs):
        (block(x) * weight).sum().backward()
    want = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = want[name].grad.abs().max()
        assert scale > 0, name
        assert (parameter.grad - want[name].grad).abs().max() <= 5e-5 * scale, name


def test_gradients_through_the_state():
    block = GatedDeltaNet(8, 1, 2, 4, 6).double()
    x = torch.randn(2, 70, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 70, 8, dtype=torch.float64)
    grads = []
    for cuts in ([70], [1, 40, 1, 28]):
        state, outs = block.new_state(2), []
        for part in x.split(cuts, dim=1):
            out, state = block(part, state, return_final_state=True)
            outs.append(out)
        loss = (torch.cat(outs, dim=1) * weight).sum() + state.recurrent.square().sum()
        grads.append(torch.autograd.grad(loss, [x, *block.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bfloat16_is_as_near_as_transformers():
    ours, theirs = pair()
    x = torch.randn(2, SEQ, 32)
    with torch.no_grad():
        want = theirs(x)
        other = theirs.bfloat16()(x.bfloat16()).float()
        got = ours.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).pow(2).mean().sqrt() <= 1.2 * (other - want).pow(2).mean().sqrt()


def test_packed_sequences_are_apart():
    block, _ = pair()
    x = torch.randn(1, 60, 32)
    x[0, 20:25] = math.nan
    cu_seqlens = torch.tensor([0, 20, 25, 25, 60], dtype=torch.int32)
    before = LayerState(*(torch.randn_like(tensor) for tensor in block.new_state(4)))
    with torch.no_grad():
        out, after = block(x, before, cu_seqlens=cu_seqlens, return_final_state=True)
        assert out[:, 20:25].isnan().all()
        assert torch.equal(after.recurrent[2], before.recurrent[2])
        for row, part in ((0, slice(0, 20)), (3, slice(25, 60))):
            alone = LayerState(*(tensor[row : row + 1] for tensor in before))
            want, state = block(x[:, part], alone, return_final_state=True)
            torch.testing.assert_close(out[:, part], want, rtol=0, atol=1e-5)
            torch.testing.assert_close(after.recurrent[row : row + 1], state.recurrent, rtol=0, atol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(
        ValueError, match=r"^lcore.nn.GatedDeltaNet: num_value_heads must be a multiple of num_key_heads = 2"
    ):
        GatedDeltaNet(32, 2, 3)
    with pytest.raises(ValueError, match=r"^lcore.nn.GatedDeltaNet: x must have shape \(batch, seq, hidden_size\) = "):
        GatedDeltaNet(32, 2, 2)(torch.randn(3, 32))


def test_a_fresh_block_forgets_little_from_token_to_token():
    block = GatedDeltaNet(32, 8, 8, 4, 4)
    decay = (-block.A_log.exp() * torch.nn.functional.softplus(block.dt_bias)).exp()
    assert decay.min() > math.exp(-16 * 0.1) and decay.median() > 0.7
