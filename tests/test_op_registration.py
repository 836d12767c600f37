"""The ops as torch sees them: schemas, fake kernels, autograd, torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from attention_cases import everything, random_packed, random_qkv
from tolerance import assert_same_bits

import lcore

ops = torch.ops.lcore


def leaves(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def attention_samples():
    dense = random_qkv(5, 7, batch=2, heads=4, kv_heads=2, head_dim=8, head_dim_v=6)
    *packed, offsets = random_packed([2, 0, 3], [4, 1, 2], heads=4, kv_heads=2, head_dim=8)
    extra = everything(4)
    extra["window_size"] = list(extra["window_size"])
    yield pytest.param(dense, {}, id="plain")
    yield pytest.param(dense, {**extra, "sinks": extra["sinks"].requires_grad_()}, id="every argument")
    yield pytest.param(packed, {"causal": True, **offsets, "max_seqlen_q": 3, "max_seqlen_k": 4}, id="packed")
    yield pytest.param([x.bfloat16() for x in dense], {"softcap": 2.0}, id="bfloat16")
    yield pytest.param([x.double() for x in dense], {"window_size": [2, 1]}, id="float64")
    yield pytest.param([x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense], {}, id="strided")


@pytest.mark.parametrize(("inputs", "arguments"), attention_samples())
def test_opcheck_attention(inputs, arguments):
    torch.library.opcheck(ops.attention.default, leaves(*inputs), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck_attention_backward(with_lse, dtype):
    q, k, v = random_qkv(5, 7, batch=2, heads=4, kv_heads=2, head_dim=8, dtype=dtype)
    sinks = torch.randn(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out, lse = ops.attention(q, k, v, True, sinks=sinks)
    dlse = torch.randn_like(lse) if with_lse else None
    arguments = (torch.randn_like(out), dlse, q, k, v, out, lse, True, [-1, -1], None, 0.0, None, sinks, None, None)
    torch.library.opcheck(ops.attention_backward.default, arguments)
    torch.library.opcheck(ops.attention_backward.default, (*arguments[:-3], None, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_merge_states(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [torch.randn(2, 3, 4, 8).to(dtype) for _ in range(3)]
    lses = [torch.randn(2, 4, 3, dtype=wide) for _ in range(3)]
    torch.library.opcheck(ops.merge_states.default, leaves(outs[0], lses[0], outs[1], lses[1]))
    arguments = (outs[2], lses[2], outs[0], lses[0], outs[1], lses[1])
    torch.library.opcheck(ops.merge_states_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("positions", [torch.arange(3), torch.rand(2, 3)])
def test_opcheck_rope(positions, dtype):
    x = torch.randn(2, 3, 4, 8).to(dtype).requires_grad_()
    torch.library.opcheck(ops.rope.default, (x, positions, torch.rand(3), 1.5, True, False))
    torch.library.opcheck(ops.rope.default, (x[0], torch.arange(3), torch.rand(4)))


def model(x, k, v, sinks, positions, inv_freq):
    """All three ops, gradients through each of their results."""
    q = lcore.rope(x, positions, inv_freq)
    k = lcore.rope(k, positions, inv_freq)
    new = lcore.attention(q, k, v, causal=True, window_size=(9, 0), softcap=20.0, return_lse=True)
    old = lcore.attention(q, k, v, sinks=sinks, return_lse=True)
    out, lse = lcore.merge_states(*new, *old)
    return out.square().mean() + lse.mean()


def model_inputs(batch, seq):
    x, k, v = leaves(*random_qkv(seq, seq, batch=batch, heads=4, kv_heads=2, head_dim=8))
    (sinks,) = leaves(torch.randn(4))
    return [x, k, v, sinks], [torch.arange(seq), torch.rand(4)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, seq in ((2, 20), (3, 33), (2, 7)):
        inputs, rest = model_inputs(batch, seq)
        want, got = model(*inputs, *rest), compiled(*inputs, *rest)
        assert_same_bits(got, want)
        for x, y in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_dynamic_shapes_compile_once():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch, seq in ((5, 20), (3, 33), (6, 50)):  # unlike each other and unlike heads and head_dim
        inputs, rest = model_inputs(batch, seq)
        compiled(*inputs, *rest).backward()
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 2, f"compiled again for another shape: {counts}"


def test_compile_packed_sequences():
    torch.compiler.reset()
    q, k, v, offsets = random_packed([3, 5], [4, 9], heads=2, head_dim=8)

    def call(q, k, v):
        return lcore.attention(q, k, v, causal=True, **offsets, max_seqlen_q=5)

    assert_same_bits(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v))


def test_meta_tensors_give_shapes_and_no_work():
    q = torch.empty(1, 1 << 20, 8, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 1 << 20, 2, 128, dtype=torch.bfloat16, device="meta")
    out, lse = lcore.attention(q, k, k[..., :64], causal=True, return_lse=True)
    assert out.shape == (1, 1 << 20, 8, 64) and out.dtype == torch.bfloat16 and out.device.type == "meta"
    assert lse.shape == (1, 8, 1 << 20) and lse.dtype == torch.float32
    assert lcore.merge_states(out, lse, out, lse)[1].shape == lse.shape
    positions, inv_freq = torch.empty(1 << 20, dtype=torch.int64, device="meta"), torch.empty(64, device="meta")
    assert lcore.rope(q, positions, inv_freq).shape == q.shape
