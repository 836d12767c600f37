"""lcore.ssd against its recurrence: values, gradients, and what belongs to Mamba-2 alone."""

import math

import pytest
import torch
from linear_attention_cases import FLOATS, offsets
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def random_ssd(shape, *, heads=4, head_dim=8, groups=2, state_dim=6, dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(*shape, heads, head_dim).to(dtype),
        "dt": torch.rand(*shape, heads).to(wide),
        "A": -torch.rand(heads, dtype=wide),
        "B": torch.randn(*shape, groups, state_dim).to(dtype),
        "C": torch.randn(*shape, groups, state_dim).to(dtype),
    }


def extras(tensors, sequences, *, per_channel=False):
    x = tensors["x"]
    heads, head_dim = x.shape[-2:]
    wide = tensors["A"].dtype
    return {
        "D": torch.randn((heads, head_dim) if per_channel else (heads,), dtype=wide),
        "z": torch.randn(x.shape).to(x.dtype),
        "dt_bias": torch.randn(heads, dtype=wide),
        "initial_state": torch.randn(sequences, heads, head_dim, tensors["B"].shape[-1], dtype=wide),
    }


def call(module, tensors, **arguments):
    return module.ssd(**tensors, **arguments, return_final_state=True)


def check(tensors, **arguments):
    dtype = tensors["x"].dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for module, cast in ((lcore, None), (reference, torch.float64), (reference, work)):
        leaves = {name: (x if cast is None else x.to(cast)).detach().requires_grad_() for name, x in tensors.items()}
        got = call(module, leaves, **arguments)
        if not results:
            grads = [torch.randn_like(x) for x in got]
        found = torch.autograd.grad(
            got, list(leaves.values()), [d.to(x.dtype) for d, x in zip(grads, got, strict=True)]
        )
        names = ["out", "final state", *(f"gradient of {name}" for name in leaves)]
        results.append(dict(zip(names, [x.detach() for x in (*got, *found)], strict=True)))
    got, want, working = results
    assert got["out"].dtype == dtype and got["final state"].dtype == work
    for name, x in got.items():
        wide = x.dtype == work
        slack_ulp = 16 if wide and work == torch.float32 else None
        floor = (4.0 if "gradient" in name else 1.0) if wide else 0.05
        assert_close(x, want[name], working[name].to(x.dtype), name, slack_ulp=slack_ulp, floor=floor)


@pytest.mark.parametrize("length", [1, 16, 63, 64, 65, 130])
@pytest.mark.parametrize("dt_softplus", [False, True])
def test_everything_at_once(length, dt_softplus):
    tensors = random_ssd((2, length))
    check({**tensors, **extras(tensors, 2)}, dt_softplus=dt_softplus)


@pytest.mark.parametrize("name", ["D", "z", "dt_bias", "initial_state"])
def test_each_option_alone(name):
    tensors = random_ssd((1, 70))
    check({**tensors, name: extras(tensors, 1, per_channel=True)[name]})


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype):
    tensors = random_ssd((1, 70), dtype=dtype)
    check(tensors)
    check({**tensors, **extras(tensors, 1, per_channel=True)}, dt_softplus=True)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_groups(groups):
    check(random_ssd((2, 66), heads=12, groups=groups))


@pytest.mark.parametrize(("head_dim", "state_dim"), [(1, 16), (64, 128), (100, 40), (16, 256)])
def test_sizes(head_dim, state_dim):
    check(random_ssd((1, 70), heads=1, groups=1, head_dim=head_dim, state_dim=state_dim))


def test_limits_of_dt_and_their_gradient():
    tensors = random_ssd((1, 70))
    tensors["dt"] = torch.linspace(-2, 30, tensors["dt"].numel()).view_as(tensors["dt"])
    for limit in ((0.0, math.inf), (0.2, 0.7)):
        check(tensors, dt_limit=limit)
        leaf = tensors["dt"].clone().requires_grad_()
        lcore.ssd(**{**tensors, "dt": leaf}, dt_limit=limit).sum().backward()
        outside = (leaf < limit[0]) | (leaf > limit[1])
        assert outside.any() and not leaf.grad[outside].any()
    check(tensors, dt_limit=(0.2, 25.0), dt_softplus=True)  # on both sides of softplus's threshold, 20


def test_no_step_and_a_long_step():
    tensors = random_ssd((1, 100))
    tensors["dt"][:, ::3] = 0.0
    tensors["dt"][:, 1::9] = 200.0
    check(tensors)


@pytest.mark.parametrize("groups", [1, 2])
def test_packed_sequences(groups):
    lengths = [5, 0, 1, 64, 70]
    tensors = random_ssd((sum(lengths) + 2,), groups=groups)
    more = extras(tensors, len(lengths))
    check({**tensors, **more}, cu_seqlens=offsets(lengths))
    poisoned = {name: x.clone() for name, x in tensors.items()}
    poisoned["x"][70] = math.nan
    want, got = (call(lcore, x, cu_seqlens=offsets(lengths)) for x in (tensors, poisoned))
    assert got[0][70].isnan().all()
    assert_same_bits(got[0][:70], want[0][:70])
    assert_same_bits(got[1][:3], want[1][:3])


def test_pieces_at_chunks_keep_all_bits():
    tensors = random_ssd((2, 200))
    more = extras(tensors, 2)
    whole = call(lcore, {**tensors, **more})
    state, outs = more["initial_state"], []
    for cut in (slice(0, 128), slice(128, None)):
        piece = {name: x if x.dim() == 1 else x[:, cut] for name, x in tensors.items()}
        piece.update(D=more["D"], dt_bias=more["dt_bias"], z=more["z"][:, cut], initial_state=state)
        out, state = call(lcore, piece)
        outs.append(out)
    assert_same_bits(torch.cat(outs, 1), whole[0])
    assert_same_bits(state, whole[1])


def test_strided_views():
    tensors = random_ssd((2, 70))
    fused = torch.cat([tensors["x"].flatten(2), tensors["B"].flatten(2), tensors["C"].flatten(2)], dim=-1)
    x, B, C = fused.split([32, 12, 12], dim=-1)
    views = {**tensors, "x": x.unflatten(2, (4, 8)), "B": B.unflatten(2, (2, 6)), "C": C.unflatten(2, (2, 6))}
    assert_same_bits(lcore.ssd(**views), lcore.ssd(**tensors))
