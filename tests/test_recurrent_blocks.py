"""The GLA and RWKV-6 blocks against their formulas in float64, chunked, stepped, packed, and through their state."""

import math

import pytest
import torch
from state_cases import tiny_states_model

from lcore import reference
from lcore.cache import LayerState
from lcore.nn import GatedLinearAttention, RWKV6ChannelMix, RWKV6TimeMix

SEQ = 150  # chunks of 64 in the kernel: two full ones and a rest
KINDS = ["gla", "rwkv6"]


def block_of(kind):
    torch.manual_seed(0)
    block = GatedLinearAttention(32, 2, 16, 48, gate_rank=4) if kind == "gla" else RWKV6TimeMix(32, 16, mix_rank=4)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() < 3 else 0.1)
    return block


def heads(x, count):
    return x.unflatten(-1, (count, -1))


def gla_formula(block, x):
    q, k, v = (heads(linear(x), 2) for linear in (block.q_proj, block.k_proj, block.v_proj))
    low, high = block.gk_proj
    g = heads(torch.log(1 / (1 + torch.exp(-(x @ low.weight.T @ high.weight.T + high.bias)))) / 16, 2)
    o = reference.gated_linear_attention(q, k, v, g)
    o = o[0] if isinstance(o, tuple) else o
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.g_norm.weight
    gate = block.g_proj(x)
    return block.o_proj(normed.flatten(2) * gate / (1 + torch.exp(-gate)))


def rwkv6_formula(block, x):
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    d = before - x
    lora = torch.tanh((x + d * block.time_maa_x) @ block.time_maa_w1)
    mixes = [part @ w for part, w in zip(lora.chunk(5, -1), block.time_maa_w2, strict=True)]
    w, k, v, r, g = (x + d * (getattr(block, f"time_maa_{name}") + m) for name, m in zip("wkvrg", mixes, strict=True))
    decay = -torch.exp(block.time_decay + torch.tanh(w @ block.time_decay_w1) @ block.time_decay_w2)
    tokens = (heads(part, 2) for part in (block.receptance(r), block.key(k), block.value(v), decay))
    o = reference.rwkv6(*tokens, block.time_faaaa)
    o = o[0] if isinstance(o, tuple) else o
    centred = o - o.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + 64e-5).sqrt()).flatten(2)
    gate = block.gate(g)
    return block.output((normed * block.ln_x.weight + block.ln_x.bias) * gate / (1 + torch.exp(-gate)))


FORMULAS = {"gla": gla_formula, "rwkv6": rwkv6_formula}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula_in_any_chunks(kind):
    block = block_of(kind)
    x = torch.randn(2, SEQ, 32)
    with torch.no_grad():
        exact = block_of(kind).double()
        want = FORMULAS[kind](exact, x.double()).float()
        torch.testing.assert_close(block(x), want, rtol=0, atol=2e-5)
        for cuts in ([SEQ], [1, 2, 61, 1, 64, 20, 1], [1] * SEQ):
            state, parts = block.new_state(2), []
            for part in x.split(cuts, dim=1):
                before = LayerState(*(tensor.clone() for tensor in state))
                out, after = block(part, state, return_final_state=True)
                assert torch.equal(state.recurrent, before.recurrent) and torch.equal(state.conv, before.conv)
                parts, state = [*parts, out], after
            torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=0, atol=2e-5)
        fresh, _ = block(x[:, 100:], block.new_state(2), return_final_state=True)
        assert (fresh[:, 20:] - want[:, 120:]).abs().max() > 1e-3  # what the state holds matters


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_parameters_and_through_the_state(kind):
    block = block_of(kind).double()
    x = torch.randn(2, 70, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 70, 32, dtype=torch.float64)
    inputs = [x, *block.parameters()]
    want = torch.autograd.grad((FORMULAS[kind](block, x) * weight).sum(), inputs)
    got = torch.autograd.grad((block(x) * weight).sum(), inputs)
    state, loss = block.new_state(2), 0.0
    for part, part_weight in zip(x.split([1, 40, 1, 28], dim=1), weight.split([1, 40, 1, 28], dim=1), strict=True):
        out, state = block(part, state, return_final_state=True)
        loss = loss + (out * part_weight).sum()
    cut = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(want, got, cut, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9 * float(a.abs().max()))
        torch.testing.assert_close(c, b, rtol=1e-9, atol=1e-9 * float(a.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_states_after_each_token_have_the_bits_of_decoding(kind):
    block = block_of(kind)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        _, begin = block(torch.randn(2, 70, 32), return_final_state=True)
        out, each = block(x, begin, return_final_state=True, each=True)
        state = begin
        for step, token in enumerate(x.split(1, dim=1)):
            want, state = block(token, state, return_final_state=True)
            assert torch.equal(out[:, step : step + 1], want)
            assert torch.equal(each.recurrent[step], state.recurrent) and torch.equal(each.conv[step], state.conv)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_apart(kind):
    block = block_of(kind)
    x = torch.randn(1, 60, 32)
    x[0, 20:25] = math.nan
    cu_seqlens = torch.tensor([0, 20, 25, 25, 60], dtype=torch.int32)
    before = LayerState(*(torch.randn_like(tensor) for tensor in block.new_state(4)))
    with torch.no_grad():
        out, after = block(x, before, cu_seqlens=cu_seqlens, return_final_state=True)
        for row, (begin, end) in enumerate([(0, 20), (20, 25), (25, 25), (25, 60)]):
            alone = LayerState(*(tensor[row : row + 1] for tensor in before))
            if row == 2:
                want, state = None, alone
            else:
                want, state = block(x[:, begin:end], alone, return_final_state=True)
                torch.testing.assert_close(out[:, begin:end], want, rtol=0, atol=1e-5, equal_nan=True)
            for got, tensor in zip(after, state, strict=True):
                torch.testing.assert_close(got[row : row + 1], tensor, rtol=0, atol=1e-5, equal_nan=True)


def test_channel_mix():
    torch.manual_seed(0)
    block = RWKV6ChannelMix(16, 24).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    d = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1) - x
    inner = (torch.relu((x + d * block.time_maa_k) @ block.key.weight.T) ** 2) @ block.value.weight.T
    want = inner / (1 + torch.exp(-(x + d * block.time_maa_r) @ block.receptance.weight.T))
    last, parts = None, []
    for part in x.split([1, 7, 1, 11], dim=1):
        out, last = block(part, last)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), want)
    assert torch.equal(last[..., 0], x[:, -1])
    weight = torch.randn_like(want)
    grads = [torch.autograd.grad((y * weight).sum(), [x, *block.parameters()]) for y in (want, torch.cat(parts, dim=1))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_rounds_as_the_formula_does():
    for kind in KINDS:
        exact, block = block_of(kind).double(), block_of(kind).bfloat16()
        x = torch.randn(1, 100, 32).bfloat16()
        with torch.no_grad():
            exact.load_state_dict(block.state_dict())
            want = FORMULAS[kind](exact, x.double())
            theirs = FORMULAS[kind](block, x).double() if kind == "gla" else None
            error = (block(x).double() - want).abs().max()
        bound = 0.05 * want.abs().max() if theirs is None else 2 * (theirs - want).abs().max()
        assert error <= bound, kind


def test_bad_input_is_refused():
    with pytest.raises(
        ValueError, match=r"^lcore.nn.GatedLinearAttention: key_size must be a multiple of num_heads = 3"
    ):
        GatedLinearAttention(32, 3)
    with pytest.raises(ValueError, match=r"^lcore.nn.RWKV6TimeMix: hidden_size must be a multiple of head_dim = 64"):
        RWKV6TimeMix(96)
    with pytest.raises(ValueError, match=r"^lcore.nn.RWKV6TimeMix: x must have shape \(batch, seq, hidden_size\)"):
        block_of("rwkv6")(torch.randn(1, 3, 31))


def test_experts_of_a_token_do_not_depend_on_the_others():
    mlp = tiny_states_model("qwen3_next").model.layers[0].mlp
    x = torch.randn(50, 32)
    with torch.no_grad():
        want = mlp(x)
        assert all(torch.equal(mlp(x[i : i + 1]), want[i : i + 1]) for i in range(0, 50, 7))
        parts = mlp.gate(x).softmax(-1)
        weights, chosen = parts.topk(2, dim=-1)
        dense = sum(
            mlp.experts[e](x) * ((chosen == e) * weights / weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)
            for e in range(4)
        )
        dense = dense + torch.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)
    torch.testing.assert_close(want, dense)
