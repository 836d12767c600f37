"""lcore.attention forward against the float64 formula."""

import math

import pytest
import torch
from attention_cases import (
    FLOATS,
    GROUPS,
    HEAD_DIM_PAIRS,
    HEAD_DIMS,
    SIZES,
    WINDOWS,
    check_forward,
    everything,
    random_qkv,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_same_bits

import lcore


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_sizes_round_the_tiles(seq_q, seq_k, causal):
    check_forward(*random_qkv(seq_q, seq_k, batch=2, heads=3), causal=causal)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    check_forward(*random_qkv(67, 131, head_dim=head_dim, dtype=dtype), causal=True)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIM_PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_another_head_dim(head_dim, head_dim_v, dtype):
    q, k, v = random_qkv(67, 131, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    check_forward(q, k, v, causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_grouped_heads_with_every_argument(heads, kv_heads, dtype):
    q, k, v = random_qkv(130, 200, batch=2, heads=heads, kv_heads=kv_heads, dtype=dtype)
    check_forward(q, k, v, **everything(heads))
    check_forward(q, k, v, **everything(heads, rows=2))


@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 300), (200, 300), (300, 300), (300, 140)])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_windows(window, seq_q, seq_k, causal):
    check_forward(*random_qkv(seq_q, seq_k), window_size=window, causal=causal)


def test_window_of_the_whole_past_is_causal():
    q, k, v = random_qkv(300, 300)
    causal = lcore.attention(q, k, v, causal=True)
    assert_same_bits(lcore.attention(q, k, v, window_size=(299, 0)), causal)
    assert_same_bits(lcore.attention(q, k, v, window_size=(-1, 0)), causal)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_softcap(softcap, dtype):
    q, k, v = random_qkv(70, 150, dtype=dtype)
    check_forward(q * 8, k, v, softcap=softcap, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_alibi_counts_the_distance_on_both_sides(causal):
    q, k, v = random_qkv(130, 140, batch=3, heads=4, kv_heads=2)
    check_forward(q, k, v, alibi_slopes=torch.tensor([0.0, 0.01, 0.5, 8.0]), causal=causal)
    check_forward(q, k, v, alibi_slopes=torch.rand(3, 4), causal=causal)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sinks_of_every_size(dtype):
    q, k, v = random_qkv(60, 40, heads=6, kv_heads=2, dtype=dtype)
    sinks = torch.tensor([0.0, -math.inf, math.inf, 1e4, -1e4, 3.0])
    out, lse = check_forward(q, k, v, sinks=sinks, causal=True)  # the first 20 rows see no key
    assert torch.equal(lse[0, :, 0], sinks.to(lse.dtype)) and not out[:, :20].any()
    assert not out[:, :, 2].any(), "a sink of +inf takes everything"
    plain = lcore.attention(q, k, v, causal=True)
    assert_same_bits(out[:, :, 1], plain[:, :, 1], "a sink of -inf is none")


@pytest.mark.parametrize(
    "arguments",
    [{"causal": True}, {"window_size": (3, 2)}, {"causal": True, "softcap": 2}, {"causal": True, "softmax_scale": 0}],
)
def test_rows_without_keys_are_neutral(arguments):
    q, k, v = random_qkv(333, 100)
    out, lse = check_forward(q, k, v, **arguments)
    blind = lse[0, 0].isneginf()
    assert blind[:230].all() and not out[:, :230].any()


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_empty_inputs(shape, dtype):
    batch, seq_q, seq_k = shape
    q, k, v = random_qkv(seq_q, seq_k, batch=batch, dtype=dtype)
    out, lse = check_forward(q, k, v, causal=True)
    assert out.shape == (batch, seq_q, 2, 16) and lse.shape == (batch, 2, seq_q)
    assert not out.any() and (seq_k > 0 or lse.isneginf().all())


def strided_inputs(layout):
    """q, k, v of shape (2, 70, 6 or 3, 16), not contiguous, in memory that is NaN wherever a view does not look."""

    def place(make_view):
        view = make_view(torch.full((1 << 18,), math.nan))
        view.copy_(torch.randn(view.shape))
        return view

    if layout == "heads first":
        return [place(lambda m, h=h: m[: 2 * h * 70 * 16].view(2, h, 70, 16).transpose(1, 2)) for h in (6, 3, 3)]
    if layout == "packed qkv":
        packed = place(lambda m: m[: 2 * 70 * 12 * 16].view(2, 70, 12, 16))
        return list(packed.split([6, 3, 3], dim=2))
    if layout == "strided last dim":
        return [place(lambda m, h=h: m[1 : 1 + 2 * 70 * h * 48].view(2, 70, h, 48)[..., ::3]) for h in (6, 3, 3)]
    if layout == "every second token":
        return [place(lambda m, h=h: m[: 2 * 140 * h * 16].view(2, 140, h, 16)[:, ::2]) for h in (6, 3, 3)]
    if layout == "odd offset, padded rows":
        return [place(lambda m, h=h: m[7 : 7 + 2 * 70 * h * 19].view(2, 70, h, 19)[..., 2:18]) for h in (6, 3, 3)]
    if layout == "dims first":
        return [place(lambda m, h=h: m[: 2 * 16 * h * 70].view(2, 16, h, 70).permute(0, 3, 2, 1)) for h in (6, 3, 3)]
    assert layout == "expanded"
    q, k, v = random_qkv(70, 70, heads=6, kv_heads=1)
    return [x.expand(2, 70, h, 16) for x, h in zip((q, k, v), (6, 3, 3), strict=True)]


LAYOUTS = ("heads first", "packed qkv", "strided last dim", "every second token", "odd offset, padded rows",
           "dims first", "expanded")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_bits_of_contiguous_inputs(layout, dtype):
    views = strided_inputs(layout)
    if dtype != torch.float32:  # the same strides in another dtype; clone() would keep them only for dense views
        views = [x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype).as_strided(
            x.shape, x.stride(), x.storage_offset()) for x in views]  # fmt: skip
    want = lcore.attention(*(x.contiguous() for x in views), causal=True, return_lse=True)
    got = lcore.attention(*views, causal=True, return_lse=True)
    for x, y in zip(got, want, strict=True):
        assert x.isfinite().all()
        assert_same_bits(x, y, layout)


@pytest.mark.parametrize("seq_k", [4095, 4096, 4097, 8191, 9000])
def test_keys_round_the_spans(seq_k):
    q, k, v = random_qkv(3, seq_k, heads=3, head_dim=8)
    check_forward(q, k, v, causal=True)
    check_forward(q, k, v, causal=True, window_size=(4100, 0))
    check_forward(q, k, v, **{**everything(3), "window_size": (seq_k - 3, -1)})


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_logits(dtype):
    q, k, v = random_qkv(70, 300, dtype=dtype)
    check_forward(q * 100, k * 10, v, causal=True)  # logits to 1e4: one-hot rows


def test_scores_far_below_the_range_of_exp():
    """A padded or masked key of score 0 would outweigh every real one."""
    q, k, v = random_qkv(131, 131)
    q, k = q.abs() * 30, -k.abs() * 30
    for arguments in ({}, {"causal": True}, {"window_size": (2, 2)}):
        _, lse = check_forward(q, k, v, **arguments)
        assert lse.max() < -88


def test_equal_logits_average_the_values():
    _, k, v = random_qkv(1, 1000)
    out = lcore.attention(torch.zeros(1, 1, 2, 16), k, v)
    torch.testing.assert_close(out[0, 0, 0], v[0, :, 0].mean(dim=0), rtol=0, atol=1e-6)


def test_sums_of_many_bfloat16_keys_keep_float32_accuracy():
    q, k, v = random_qkv(1, 20000, head_dim=8, dtype=torch.bfloat16)
    check_forward(q, k, v + 1)


@pytest.mark.parametrize("seq_k", [5, 200, 5000])
def test_nan_in_a_query_or_a_seen_key_is_not_hidden(seq_k):
    q, k, v = random_qkv(3, seq_k)
    q[0, 1, 0, 3] = math.nan
    out, lse = lcore.attention(q, k, v, return_lse=True)
    assert out[0, 1, 0].isnan().all() and lse[0, 0, 1].isnan()
    others = torch.ones(3, 2, dtype=torch.bool)
    others[1, 0] = False
    assert out[0][others].isfinite().all()
    q, k, v = random_qkv(3, seq_k)
    k[0, 2, 0, 0] = math.nan
    assert lcore.attention(q, k, v).isnan().all()


def test_nan_in_a_masked_key_does_not_count():
    q, k, v = random_qkv(40, 40)
    k[:, 30:] = math.nan
    out = lcore.attention(q, k, v, causal=True)
    assert out[:, :30].isfinite().all() and out[:, 30:].isnan().all()


def test_more_batch_rows_than_16_bits_count():
    q, k, v = random_qkv(1, 2, batch=70_000, head_dim=2)
    out = lcore.attention(q, k, v)
    assert_same_bits(out[-3:], lcore.attention(q[-3:], k[-3:], v[-3:]))


def test_offsets_past_32_bits():
    """The second row of the batch lies 2^31 elements behind the first; memory between them is never touched."""
    dense = random_qkv(5, 9, batch=2, dtype=torch.bfloat16)
    memory = torch.empty((1 << 31) + 9 * 2 * 16 * 3, dtype=torch.bfloat16)
    views = []
    for i, x in enumerate(dense):
        far = memory[i * 9 * 2 * 16 :].as_strided(x.shape, ((1 << 31), *x.stride()[1:]))
        views.append(far.copy_(x))
    assert_same_bits(lcore.attention(*views, causal=True), lcore.attention(*dense, causal=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_calls(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 2**31))
    kv_heads, group, batch = draw(1, 3), draw(1, 5), draw(1, 3)
    heads = kv_heads * group
    sizes = {"heads": heads, "kv_heads": kv_heads, "batch": batch}
    dims = {"head_dim": draw(1, 70), "head_dim_v": draw(1, 70)}
    q, k, v = random_qkv(draw(0, 300), draw(0, 300), **sizes, **dims, dtype=data.draw(st.sampled_from(FLOATS)))
    arguments = {"causal": data.draw(st.booleans()), "window_size": (draw(-1, 320), draw(-1, 320))}
    if data.draw(st.booleans()):
        arguments["softcap"] = data.draw(st.floats(0.5, 50))
    if data.draw(st.booleans()):
        arguments["softmax_scale"] = data.draw(st.floats(-0.5, 0.5))
    if data.draw(st.booleans()):
        arguments["sinks"] = torch.randn(heads) * 3
    if data.draw(st.booleans()):
        arguments["alibi_slopes"] = torch.rand(heads) if data.draw(st.booleans()) else torch.rand(batch, heads)
    check_forward(q, k, v, **arguments)
