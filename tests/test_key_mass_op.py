"""lcore.key_mass: what is invisible never reaches a key, and the op as torch sees it."""

import math

import pytest
import torch
from attention_cases import FLOATS, everything, random_packed, random_qkv
from test_attention_invisible import MASKS, POISONS, bad_keys, seeing
from tolerance import assert_same_bits

import lcore

ops = torch.ops.lcore
REDUCTIONS = ("sum", "max")
SHAPES = ((150, 150), (64, 64), (5, 200), (300, 4300))


def without_sinks(arguments):
    return {name: x for name, x in arguments.items() if name != "sinks"}


def with_lse(q, k, **arguments):
    return lcore.attention(q, k, k, **arguments, return_lse=True)[1]


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_bad_key_spoils_its_own_mass_only(reduction, mask, dtype, value):
    """With the lse of before: rows that do not see it, and all rows' weights of other keys, know nothing of it."""
    for seq_q, seq_k, key, _ in bad_keys(mask, *SHAPES):
        q, k, _ = random_qkv(seq_q, seq_k, heads=4, kv_heads=2, dtype=dtype)
        arguments = {**without_sinks(MASKS[mask][0]), "reduction": reduction}
        lse = with_lse(q, k, **MASKS[mask][0])
        want = lcore.key_mass(q, k, lse, **arguments)
        k[:, key] = value
        got = lcore.key_mass(q, k, lse, **arguments)
        others = torch.arange(seq_k) != key
        assert_same_bits(got[..., others], want[..., others], f"{seq_q} x {seq_k}")
        if math.isnan(value):
            assert got[..., key].isnan().all()


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("which", ["q", "lse"])
def test_a_bad_row_spoils_what_it_sees(which, mask, dtype, value):
    for seq_q, seq_k, row in ((150, 150, 70), (5, 200, 1), (1, 90, 0)):
        q, k, _ = random_qkv(seq_q, seq_k, heads=4, kv_heads=2, dtype=dtype)
        arguments = without_sinks(MASKS[mask][0])
        lse = with_lse(q, k, **MASKS[mask][0])
        want = lcore.key_mass(q, k, lse, **arguments)
        if which == "q":
            q[:, row] = value
        else:
            lse[..., row] = value
        got = lcore.key_mass(q, k, lse, **arguments)
        unseen = ~seeing(mask, seq_q, seq_k)[row]
        assert_same_bits(got[..., unseen], want[..., unseen], f"{seq_q} x {seq_k}")
        if math.isnan(value):
            assert got[..., ~unseen].isnan().all()
            assert lcore.key_mass(q, k, lse, **arguments, reduction="max")[..., ~unseen].isnan().all()


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_neighbours_and_tails_are_not_read(dtype, value):
    lengths_q, lengths_k = [131, 9, 1, 70], [131, 40, 77, 70]
    q, k, _, offsets = random_packed(lengths_q, lengths_k, 11, heads=4, kv_heads=2, head_dim=24, dtype=dtype)
    arguments = {**everything(4, rows=4), **offsets}
    lse = with_lse(q, k, **arguments)
    del arguments["sinks"]
    want = lcore.key_mass(q, k, lse, **arguments)
    ends_q, ends_k = (x.tolist() for x in offsets.values())
    for x, ends in ((q, ends_q), (k, ends_k)):
        x[ends[1] : ends[2]], x[ends[4] :] = value, value
    got = lcore.key_mass(q, k, lse, **arguments)
    good = torch.ones(k.shape[0], dtype=torch.bool)
    good[ends_k[1] : ends_k[2]] = False
    assert_same_bits(got[:, good], want[:, good])


def samples():
    q, k, _ = random_qkv(5, 7, batch=2, heads=4, kv_heads=2, head_dim=8)
    *packed, _, offsets = random_packed([2, 0, 3], [4, 1, 2], heads=4, kv_heads=2, head_dim=8)
    extra = {**everything(4), "window_size": [150, -1]}
    del extra["sinks"]
    yield pytest.param((q, k), {}, id="plain")
    yield pytest.param((q, k), {**extra, "reduction": "max"}, id="every argument")
    yield pytest.param(packed, {"causal": True, **offsets}, id="packed")
    yield pytest.param((q.bfloat16(), k.bfloat16()), {"softcap": 2.0}, id="bfloat16")
    yield pytest.param((q.double(), k.double()), {"window_size": [2, 1]}, id="float64")


@pytest.mark.parametrize(("inputs", "arguments"), samples())
def test_opcheck(inputs, arguments):
    lse = with_lse(*inputs, **{name: x for name, x in arguments.items() if name != "reduction"})
    leaves = [x.detach().requires_grad_() for x in (*inputs, lse)]
    torch.library.opcheck(ops.key_mass.default, leaves, arguments)


def test_no_gradient():
    q, k, _ = (x.requires_grad_() for x in random_qkv(5, 7, heads=4, kv_heads=2))
    lse = with_lse(q, k)
    assert lse.requires_grad
    for mass in (lcore.key_mass(q, k, lse), ops.key_mass(q, k, lse)):
        assert not mass.requires_grad and mass.grad_fn is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic):
    torch.compiler.reset()

    def model(q, k, slopes):
        out, lse = lcore.attention(q, k, k, causal=True, alibi_slopes=slopes, return_lse=True)
        mass = lcore.key_mass(q, k, lse, causal=True, alibi_slopes=slopes, reduction="max")
        return out.sum() * mass.sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, seq in ((2, 20), (3, 33), (2, 7)):
        q, k, _ = (x.requires_grad_() for x in random_qkv(seq, seq, batch=batch, heads=4, kv_heads=2))
        slopes = torch.rand(4)
        got, want = compiled(q, k, slopes), model(q, k, slopes)
        assert_same_bits(got, want)
        for x, y in zip(torch.autograd.grad(got, (q, k)), torch.autograd.grad(want, (q, k)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_meta_tensors_give_shapes_and_no_work():
    q = torch.empty(1, 1 << 20, 8, 128, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(1, 8, 1 << 20, device="meta")
    mass = lcore.key_mass(q, q[:, :, :2], lse)
    assert mass.shape == (1, 2, 1 << 20) and mass.dtype == torch.float32 and mass.device.type == "meta"


Q, K, _ = random_qkv(5, 7, batch=2, heads=4, kv_heads=2, head_dim=8)
LSE = torch.zeros(2, 4, 5)
ERRORS = [
    ({"q": Q.int()}, TypeError, "q must have dtype float32 or float64 or float16 or bfloat16, got int32"),
    ({"q": Q[0]}, ValueError, "k must have shape (tokens, kv_heads, head_dim) = (*, *, 8), got (2, 7, 2, 8)"),
    ({"k": K.half()}, TypeError, "k must have dtype float32, got float16"),
    ({"q": Q[:, :, :3]}, ValueError, "q must have heads a multiple of kv_heads 2, got 3"),
    ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, "head_dim must lie in [1, 512], got 0"),
    ({"lse": None}, TypeError, "lse must be a torch.Tensor, got NoneType"),
    ({"lse": LSE.double()}, TypeError, "lse must have dtype float32, got float64"),
    ({"lse": LSE[:, :2]}, ValueError, "lse must have shape (batch, heads, seq_q) = (2, 4, 5), got (2, 2, 5)"),
    ({"window_size": (3, -2)}, ValueError, "window_size must be two integers >= -1, got (3, -2)"),
    ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be a finite number, got nan"),
    ({"softcap": -1.0}, ValueError, "softcap must be a finite number >= 0, got -1.0"),
    (
        {"alibi_slopes": torch.ones(3)},
        ValueError,
        "alibi_slopes must have shape (heads,) or (batch, heads) with heads 4, got (3,)",
    ),
    ({"reduction": "mean"}, ValueError, 'reduction must be "sum" or "max", got \'mean\''),
    (
        {"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)},
        ValueError,
        "cu_seqlens_q and cu_seqlens_k must be given together, got only one of them",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[case[-1][:60] for case in ERRORS])
def test_errors(change, error, message):
    good = {"q": Q, "k": K, "lse": LSE}
    lcore.key_mass(**good)
    with pytest.raises(error) as info:
        lcore.key_mass(**{**good, **change})
    assert str(info.value) == f"lcore.key_mass: {message}"


DIRECT = [
    ({"k": K.half()}, "q and k must have one dtype"),
    ({"k": K[:1]}, "q and k must have one batch size"),
    ({"k": K[..., :4]}, "q and k must have one head_dim"),
    ({"lse": LSE[..., :4]}, "lse must be what attention returned for q"),
    ({"lse": LSE.double()}, "lse must be what attention returned for q"),
    ({"lse": LSE.transpose(1, 2)}, "lse must be what attention returned for q"),
    ({"reduction": "mean"}, "reduction must be sum or max, got mean"),
    ({"window_size": [1]}, "window_size must have two entries"),
]


@pytest.mark.parametrize(("change", "message"), DIRECT, ids=[message for _, message in DIRECT])
def test_a_direct_call_of_the_op_cannot_read_outside_its_tensors(change, message):
    with pytest.raises(RuntimeError, match=f"lcore.key_mass: {message}"):
        ops.key_mass(**{"q": Q, "k": K, "lse": LSE, **change})
