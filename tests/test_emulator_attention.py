"""The CUDA kernels of lcore.attention, emulated: against the float64 formula, round the edges of their tiles."""

import math

import attention_cases
import pytest
import torch
from attention_cases import FLOATS, HALVES, check_forward, everything, random_packed, random_qkv
from emulated import cuda_kernels
from test_attention_forward import LAYOUTS, strided_inputs
from tolerance import assert_same_bits

import lcore

# Tensor cores: 128 rows (64 where head_dim is above 128) x 64 keys; without them 64 x 64.
SIZES = ((1, 1), (1, 65), (63, 64), (65, 63), (127, 128), (129, 65), (130, 7))
WINDOWS = ((0, 0), (5, 3), (70, 0), (-1, 66), (17, 1 << 40))
PACKINGS = {
    "tiles": ([1, 129, 64], [65, 130, 64]),
    "gaps": ([0, 70, 0, 1, 20, 0], [3, 60, 0, 1, 0, 7]),
    "all empty": ([0, 0], [0, 0]),
}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setattr(attention_cases, "multiplies_in", lambda dtype: dtype in HALVES)  # as tensor cores do
    with cuda_kernels("attention", "attention_backward"):
        yield


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_sizes_round_the_tiles(seq_q, seq_k, causal):
    check_forward(*random_qkv(seq_q, seq_k, heads=1, dtype=torch.bfloat16), causal=causal)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (64, 65), (65, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_round_the_tiles_without_tensor_cores(seq_q, seq_k, dtype):
    check_forward(*random_qkv(seq_q, seq_k, heads=1, head_dim=5, dtype=dtype), causal=True)


@pytest.mark.parametrize("dims", [(1, 1), (40, 59), (64, 64), (65, 8), (128, 128), (129, 17), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", HALVES)
def test_head_dims(dims, dtype):
    q, k, v = random_qkv(33, 70, head_dim=dims[0], head_dim_v=dims[1], dtype=dtype)
    check_forward(q, k, v, causal=True)


@pytest.mark.parametrize("dims", [(17, 129), (128, 64), (260, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_head_dims_without_tensor_cores(dims, dtype):
    """float32 and float64, and what tensor cores have no tile for."""
    dims = dims if dtype not in HALVES else (dims[0] + 240, dims[1])
    q, k, v = random_qkv(5, 19, heads=1, head_dim=dims[0], head_dim_v=dims[1], dtype=dtype)
    check_forward(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_grouped_heads_with_every_argument(dtype):
    q, k, v = random_qkv(20, 70, batch=2, heads=6, kv_heads=2, head_dim=8, dtype=dtype)
    check_forward(q, k, v, **{**everything(6), "window_size": (30, -1)})
    check_forward(q, k, v, **everything(6, rows=2))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(70, 140), (140, 70)])
def test_windows(window, seq_q, seq_k):
    check_forward(*random_qkv(seq_q, seq_k, heads=1, dtype=torch.float16), window_size=window)


@pytest.mark.parametrize("scale", [-0.4, 0.0, None])
@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_softcap_and_alibi(scale, dtype):
    q, k, v = random_qkv(20, 66, heads=2, head_dim=8, dtype=dtype)
    check_forward(q, k, v, softmax_scale=scale, causal=True)
    check_forward(q * 8, k, v, softmax_scale=scale, softcap=3.0)
    check_forward(q, k, v, softmax_scale=scale, alibi_slopes=torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_sinks_of_every_size(dtype):
    q, k, v = random_qkv(30, 20, heads=6, kv_heads=2, head_dim=8, dtype=dtype)
    sinks = torch.tensor([0.0, -math.inf, math.inf, 1e4, -1e4, 3.0])
    out, lse = check_forward(q, k, v, sinks=sinks, causal=True)  # the first 10 rows see no key
    assert torch.equal(lse[0, :, 0], sinks.to(lse.dtype)) and not out[:, :10].any()
    assert_same_bits(out[:, :, 1], lcore.attention(q, k, v, causal=True)[:, :, 1], "a sink of -inf is none")


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_without_keys_are_neutral(dtype):
    q, k, v = random_qkv(150, 20, heads=1, head_dim=8, dtype=dtype)
    out, lse = check_forward(q, k, v, causal=True)
    assert lse[0, 0, :130].isneginf().all() and not out[:, :130].any()


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_inputs(shape, dtype):
    out, lse = check_forward(*random_qkv(shape[1], shape[2], batch=shape[0], dtype=dtype), causal=True)
    assert not out.any() and (shape[2] > 0 or lse.isneginf().all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_bits_of_contiguous_inputs(layout):
    views = [x[:, :9] for x in strided_inputs(layout)]
    views = [x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0).to(torch.bfloat16).as_strided(
        x.shape, x.stride(), x.storage_offset()) for x in views]  # fmt: skip
    want = lcore.attention(*(x.contiguous() for x in views), causal=True, return_lse=True)
    got = lcore.attention(*views, causal=True, return_lse=True)
    for x, y in zip(got, want, strict=True):
        assert x.isfinite().all()
        assert_same_bits(x, y, layout)


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_logits(dtype):
    q, k, v = random_qkv(20, 70, heads=1, head_dim=16, dtype=dtype)
    check_forward(q * 100, k * 10, v, causal=True)  # logits to 1e4: one-hot rows
    check_forward(q.abs() * 30, -k.abs() * 30, v, window_size=(2, 2))  # far below the range of exp


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinite_scores(dtype):
    """Of -inf: weight 0, and a row of such scores is empty. Of +inf: NaN, as inf - inf is in the formula."""
    q, k, v = random_qkv(5, 130, heads=1, head_dim=8, dtype=dtype)
    q = q.abs() + 1
    for keys in (slice(0, 66), slice(70, None), slice(0, None)):
        bad = k.clone()
        bad[:, keys] = -math.inf
        check_forward(q, bad, v)
    k[0, 60, 0, 0] = math.inf
    assert check_forward(q, k, v)[0].isnan().all()


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed(name, dtype):
    lengths_q, lengths_k = PACKINGS[name]
    q, k, v, offsets = random_packed(lengths_q, lengths_k, 5, heads=2, head_dim=8, dtype=dtype)
    for arguments in ({"causal": True}, {**everything(2, len(lengths_q)), "window_size": (30, -1)}):
        out, lse = check_forward(q, k, v, **arguments, **offsets)
    used = sum(lengths_q)
    assert not out[used:].any() and lse[:, used:].isneginf().all()


def test_a_packing_without_sequences():
    q, k, v, _ = random_packed([200], [200], dtype=torch.bfloat16)
    none = torch.zeros(1, dtype=torch.int32)
    out, lse = lcore.attention(q, k, v, cu_seqlens_q=none, cu_seqlens_k=none, return_lse=True)
    assert not out.any() and lse.isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_a_chunk_a_packing_and_alone(dtype):
    q, k, v = random_qkv(140, 140, heads=1, head_dim=8, dtype=dtype)
    whole = lcore.attention(q, k, v, causal=True)
    assert_same_bits(lcore.attention(q[:, 70:72], k[:, :72], v[:, :72], causal=True), whole[:, 70:72])
    assert_same_bits(lcore.attention(q[:, -1:], k, v), whole[:, -1:])
    assert_same_bits(lcore.attention(q, k, v, window_size=(139, 0)), whole)
    cu = torch.tensor([0, 0, 140], dtype=torch.int32)
    packed = lcore.attention(q[0], k[0], v[0], causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert_same_bits(packed, whole[0])


def test_more_sequences_than_16_bits_count():
    q, k, v = (x[0] for x in random_qkv(3, 5, heads=1, head_dim=2, dtype=torch.bfloat16))
    cu_q, cu_k = (torch.tensor([0] * 66_000 + [n], dtype=torch.int32) for n in (3, 5))
    out = lcore.attention(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert_same_bits(out, lcore.attention(q[None], k[None], v[None], causal=True)[0])


def test_offsets_past_32_bits():
    """The second row of the batch lies 2^31 elements behind the first; memory between them is never touched."""
    dense = random_qkv(5, 9, batch=2, dtype=torch.bfloat16)
    memory = torch.empty((1 << 31) + 9 * 2 * 16 * 3, dtype=torch.bfloat16)
    views = []
    for i, x in enumerate(dense):
        far = memory[i * 9 * 2 * 16 :].as_strided(x.shape, ((1 << 31), *x.stride()[1:]))
        views.append(far.copy_(x))
    assert_same_bits(lcore.attention(*views, causal=True), lcore.attention(*dense, causal=True))
