"""Every call that lcore.attention refuses: one sentence that names the argument, the rule and the value."""

import math

import pytest
import torch
from attention_cases import random_packed, random_qkv

import lcore

FLOATS = "float32 or float64 or float16 or bfloat16"
Q, K, V = random_qkv(5, 7, batch=2, heads=4, kv_heads=2, head_dim=8)
DENSE = {"q": Q, "k": K, "v": V}
PQ, PK, PV, OFFSETS = random_packed([2, 3], [4, 3], tail=1, heads=4, kv_heads=2, head_dim=8)
PACKED = {"q": PQ, "k": PK, "v": PV, **OFFSETS}


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


DENSE_CASES = [
    ({"q": 3.0}, TypeError, "q must be a torch.Tensor, got float"),
    ({"q": Q.int()}, TypeError, f"q must have dtype {FLOATS}, got int32"),
    ({"q": Q[0, 0]}, ValueError, "q must have 4 dimensions (3 with cu_seqlens), got 2: (4, 8)"),
    ({"q": Q[0], "k": K[0], "v": V[0]}, ValueError, "q must have 4 dimensions, got (5, 4, 8)"),
    ({"k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    ({"k": K.half()}, TypeError, "k must have dtype float32, got float16"),
    ({"k": K[:1]}, ValueError, "k must have shape (batch, seq, kv_heads, head_dim) = (2, *, *, 8), got (1, 7, 2, 8)"),
    (
        {"k": K[..., :4]},
        ValueError,
        "k must have shape (batch, seq, kv_heads, head_dim) = (2, *, *, 8), got (2, 7, 2, 4)",
    ),
    ({"k": K.to("meta")}, ValueError, "k must be on device cpu, got meta"),
    ({"v": V.double()}, TypeError, "v must have dtype float32, got float64"),
    (
        {"v": V[:, :6]},
        ValueError,
        "v must have shape (batch, seq, kv_heads, head_dim_v) = (2, 7, 2, *), got (2, 6, 2, 8)",
    ),
    (
        {"v": V[:, :, :1]},
        ValueError,
        "v must have shape (batch, seq, kv_heads, head_dim_v) = (2, 7, 2, *), got (2, 7, 1, 8)",
    ),
    ({"q": Q[:, :, :3]}, ValueError, "q must have heads a multiple of kv_heads 2, got 3"),
    ({"k": K[:, :, :0], "v": V[:, :, :0]}, ValueError, "q must have heads a multiple of kv_heads 0, got 4"),
    ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, "head_dim must lie in [1, 512], got 0"),
    ({"v": V[..., :0]}, ValueError, "head_dim_v must lie in [1, 512], got 0"),
    ({"v": V.repeat(1, 1, 1, 65)}, ValueError, "head_dim_v must lie in [1, 512], got 520"),
    ({"window_size": 5}, TypeError, "window_size must be two integers >= -1, got 5"),
    ({"window_size": (1.0, 2)}, TypeError, "window_size must be two integers >= -1, got (1.0, 2)"),
    ({"window_size": (1, 2, 3)}, ValueError, "window_size must be two integers >= -1, got (1, 2, 3)"),
    ({"window_size": ()}, ValueError, "window_size must be two integers >= -1, got ()"),
    ({"window_size": (3, -2)}, ValueError, "window_size must be two integers >= -1, got (3, -2)"),
    ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be a finite number, got nan"),
    ({"softmax_scale": math.inf}, ValueError, "softmax_scale must be a finite number, got inf"),
    ({"softcap": -1.0}, ValueError, "softcap must be a finite number >= 0, got -1.0"),
    ({"softcap": math.inf}, ValueError, "softcap must be a finite number >= 0, got inf"),
    ({"alibi_slopes": torch.ones(4).double()}, TypeError, "alibi_slopes must have dtype float32, got float64"),
    (
        {"alibi_slopes": torch.ones(3)},
        ValueError,
        "alibi_slopes must have shape (heads,) or (batch, heads) with heads 4, got (3,)",
    ),
    (
        {"alibi_slopes": torch.ones(1, 2, 4)},
        ValueError,
        "alibi_slopes must have shape (heads,) or (batch, heads) with heads 4, got (1, 2, 4)",
    ),
    ({"alibi_slopes": torch.ones(3, 4)}, ValueError, "alibi_slopes must have one row for each of 2 sequences, got 3"),
    (
        {"alibi_slopes": torch.ones(4, requires_grad=True)},
        NotImplementedError,
        "no gradient for alibi_slopes; pass alibi_slopes.detach(), or learn sinks instead",
    ),
    ({"sinks": torch.ones(4).int()}, TypeError, f"sinks must have dtype {FLOATS}, got int32"),
    ({"sinks": torch.ones(2)}, ValueError, "sinks must have shape (heads,) = (4,), got (2,)"),
    (
        {"cu_seqlens_q": cu(0, 5)},
        ValueError,
        "cu_seqlens_q and cu_seqlens_k must be given together, got only one of them",
    ),
    (
        {"cu_seqlens_q": cu(0, 5), "cu_seqlens_k": cu(0, 5)},
        ValueError,
        "q must have 3 dimensions (tokens, heads, head_dim) with cu_seqlens, got (2, 5, 4, 8)",
    ),
]

PACKED_CASES = [
    ({"k": PK[..., :4]}, ValueError, "k must have shape (tokens, kv_heads, head_dim) = (*, *, 8), got (8, 2, 4)"),
    ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens_q must have dtype int32, got int64"),
    (
        {"cu_seqlens_q": cu(0, 2, 5)[None]},
        ValueError,
        "cu_seqlens_q must have shape (sequences + 1,) = (*,), got (1, 3)",
    ),
    ({"cu_seqlens_q": cu()}, ValueError, "cu_seqlens_q must have at least one entry, got 0"),
    ({"cu_seqlens_q": cu(0, 9, 2, 9, 5)[::2]}, ValueError, "cu_seqlens_q must be contiguous, got strides (2,)"),
    ({"cu_seqlens_q": cu(1, 2, 5)}, ValueError, "cu_seqlens_q must begin with 0, got 1"),
    ({"cu_seqlens_q": cu(0, -2, 5)}, ValueError, "cu_seqlens_q must never fall, got [0, -2] at 0"),
    ({"cu_seqlens_k": cu(0, 4, 3)}, ValueError, "cu_seqlens_k must never fall, got [4, 3] at 1"),
    ({"cu_seqlens_q": cu(0, 2, 7)}, ValueError, "cu_seqlens_q must end within 6 tokens, got 7"),
    ({"cu_seqlens_k": cu(0, 4, 9)}, ValueError, "cu_seqlens_k must end within 8 tokens, got 9"),
    ({"cu_seqlens_k": cu(0, 4)}, ValueError, "cu_seqlens_k must have as many entries as cu_seqlens_q, 3, got 2"),
    ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be at least the longest sequence, 3, got 2"),
    ({"max_seqlen_k": 3}, ValueError, "max_seqlen_k must be at least the longest sequence, 4, got 3"),
    ({"alibi_slopes": torch.ones(3, 4)}, ValueError, "alibi_slopes must have one row for each of 2 sequences, got 3"),
]

CASES = [(DENSE, *case) for case in DENSE_CASES] + [(PACKED, *case) for case in PACKED_CASES]


@pytest.mark.parametrize(("good", "change", "error", "message"), CASES, ids=[case[-1][:70] for case in CASES])
def test_errors(good, change, error, message):
    with pytest.raises(error) as info:
        lcore.attention(**{**good, **change})
    assert str(info.value) == f"lcore.attention: {message}"


@pytest.mark.parametrize("good", [DENSE, PACKED], ids=["dense", "packed"])
def test_the_calls_that_the_cases_change_are_good(good):
    lcore.attention(**good)


def test_too_wide_heads_are_named():
    q, k, v = random_qkv(1, 1, head_dim=513)
    with pytest.raises(ValueError, match=r"lcore\.attention: head_dim must lie in \[1, 512\], got 513"):
        lcore.attention(q, k, v)


DIRECT_CASES = [
    ({"k": K.half()}, "q, k and v must have one dtype"),
    ({"k": K[:1], "v": V[:1]}, "q, k and v must have one batch size"),
    ({"v": V[:, :3]}, "v must have k's tokens and heads, got (2, 3, 2, 8) and (2, 7, 2, 8)"),
    ({"k": K[..., :4]}, "q and k must have one head_dim"),
    ({"q": Q[:, :, :3]}, "heads must be a multiple of kv_heads"),
    ({"q": Q[0]}, "q, k and v must have 4 dimensions"),
    ({"sinks": torch.ones(4).double()}, "sinks must be contiguous Float with last size 4"),
    ({"sinks": torch.ones(3)}, "sinks must be contiguous Float with last size 4"),
    ({"alibi_slopes": torch.ones(3, 4)}, "alibi_slopes must have one row a sequence"),
    ({"window_size": [1, 2, 3]}, "window_size must have two entries"),
    ({"cu_seqlens_q": cu(0, 5)}, "cu_seqlens_q and cu_seqlens_k must be given together"),
]


@pytest.mark.parametrize(("change", "message"), DIRECT_CASES, ids=[message for _, message in DIRECT_CASES])
def test_a_direct_call_of_the_op_cannot_read_outside_its_tensors(change, message):
    with pytest.raises(RuntimeError) as info:
        torch.ops.lcore.attention(**{**DENSE, **change})
    assert f"lcore.attention: {message}" in str(info.value)


@pytest.mark.parametrize("bad", [cu(0, 2, 7), cu(0, 3, 2), cu(1, 2, 5), cu(0, -1, 5)])
def test_a_direct_call_checks_offsets(bad):
    with pytest.raises(RuntimeError, match=r"lcore\.attention: cu_seqlens_q must rise from 0 to at most 6 tokens"):
        torch.ops.lcore.attention(**{**PACKED, "cu_seqlens_q": bad})
