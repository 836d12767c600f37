"""Bounds of pages of keys are exact or rounded outward, in tensors and in caches."""

import math

import pytest
import torch
from cache_cases import NAME_OF, Twins, inside, pool_of
from test_cache_ops import COMMON, append_arguments
from tolerance import assert_same_bits

import lcore
from lcore import reference

ops = torch.ops.lcore
DTYPES = tuple(NAME_OF)
FAR_APART = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    6e-8,
    -6e-8,
    1e-40,
    -1e-40,
    65504.0,
    3.4028234e38,
    -3.4028234e38,
    math.inf,
    -math.inf,
)


def keys(seq, batch=2, kv_heads=3, head_dim=24, dtype=torch.float32):
    return torch.randn(batch, seq, kv_heads, head_dim).to(dtype)


def next_bfloat16(x, up):
    """The neighbour of bfloat16 numbers in the direction of +inf or -inf, as float64."""
    bits = x.view(torch.int16).int()
    order = torch.where(bits < 0, -(bits & 0x7FFF), bits) + (1 if up else -1)
    return torch.where(order < 0, -order | 0x8000, order).to(torch.int16).view(torch.bfloat16).double()


def assert_outward(bounds, exact):
    """bfloat16 bounds (.., 2, head_dim) enclose the exact ones, and no closer ones would."""
    least, most = bounds.unbind(-2)
    low, high = exact.double().unbind(-2)
    assert (least.double() <= low).all() and (most.double() >= high).all()
    # Beside zero the neighbour of 0 is a denormal: still farther than the exact value.
    assert ((next_bfloat16(least, up=True) > low) | low.isinf()).all()
    assert ((next_bfloat16(most, up=False) < high) | high.isinf()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 50, 64])
@pytest.mark.parametrize("head_dim", [1, 24, 129])
def test_values(head_dim, page_size, dtype):
    k = keys(160, head_dim=head_dim, dtype=dtype)
    want = reference.page_bounds(k, page_size)
    assert want.shape == (2, 3, 160 // page_size, 2, head_dim)
    assert_same_bits(lcore.page_bounds(k, page_size, dtype=torch.float32), want.float())
    bounds = lcore.page_bounds(k, page_size)
    assert bounds.dtype == torch.bfloat16 and bounds.is_contiguous()
    if dtype == torch.bfloat16:
        assert_same_bits(bounds, want)
    else:
        assert_outward(bounds, want)


@pytest.mark.parametrize("value", FAR_APART)
def test_rounding_outward_of_hard_numbers(value):
    """Also of numbers one float32 away from a bfloat16 on either side."""
    x = torch.tensor([value])
    around = torch.cat([x, torch.nextafter(x, torch.tensor(math.inf)), torch.nextafter(x, torch.tensor(-math.inf))])
    k = around.view(1, 1, 1, 3)
    exact = lcore.page_bounds(k, 1, dtype=torch.float32)
    assert_same_bits(exact[0, 0, 0], around.expand(2, 3).contiguous())
    assert_outward(lcore.page_bounds(k, 1), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 7, 15])
def test_a_nan_makes_both_bounds_of_its_channel_nan(at, dtype):
    k = keys(48, dtype=dtype)
    clean = lcore.page_bounds(k, 16)
    k[1, 16 + at, 2, 5] = math.nan
    bounds = lcore.page_bounds(k, 16)
    assert bounds[1, 2, 1, :, 5].isnan().all() and int(bounds.isnan().sum()) == 2
    assert_same_bits(torch.where(bounds.isnan(), clean, bounds), clean)


def test_strides_threads_and_no_pages(threads):
    k = keys(5000)
    want = lcore.page_bounds(k, 16)
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        assert_same_bits(lcore.page_bounds(k, 16), want)
    assert_same_bits(lcore.page_bounds(k.transpose(1, 2).contiguous().transpose(1, 2), 16), want)
    assert_same_bits(lcore.page_bounds(k.repeat_interleave(2, dim=-1)[..., ::2], 16), want)
    assert lcore.page_bounds(k[:, :15], 16).shape == (2, 3, 0, 2, 24)
    assert lcore.page_bounds(k[:0], 16).shape == (0, 3, 312, 2, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k_format", NAME_OF.values())
def test_a_cache_has_the_bounds_of_its_stored_keys(k_format, dtype):
    twins = Twins(layers=2, batch_size=2, head_dim=24, page_size=16, dtype=dtype, kv_format=(k_format, "fp32"))
    for new in (15, 1, 70, 9):
        twins.append(new)
        for layer in range(2):
            stored = torch.stack([torch.stack([k for k, _ in row], dim=1) for row in twins.model.tokens[layer]])
            want = reference.page_bounds(stored, 16)
            assert_same_bits(twins.cache.page_bounds(layer, dtype=torch.float32), want.float())
            if k_format == "bf16":
                assert_same_bits(twins.cache.page_bounds(layer), want.bfloat16())
            else:
                assert_outward(twins.cache.page_bounds(layer), want)
    whole = twins.cache.page_bounds(1)
    assert whole.shape[2] == 5
    for first, last in ((0, 5), (2, 3), (4, 5), (3, 3)):
        assert_same_bits(twins.cache.page_bounds(1, first, last), whole[:, :, first:last])
    fork = twins.fork()
    twins.crop(40)
    assert_same_bits(twins.cache.page_bounds(1), whole[:, :, :2])
    assert_same_bits(fork.cache.page_bounds(1), whole)


def test_heads_of_unequal_length_have_zeros_behind_their_pages():
    twins = Twins(batch_size=2, page_size=16)
    twins.append(70)
    whole = twins.cache.page_bounds(0)
    table, lengths, tail_k, _ = inside(twins.cache)
    lengths.copy_(torch.tensor([[70, 3], [32, 47]]))
    tail_k.fill_(math.nan)
    pool_of(twins.cache)[table[0, 1].long()] = 0xFF  # NaN in what the shortest head does not hold
    bounds = twins.cache.page_bounds(0)
    for b, h, pages in ((0, 0, 4), (0, 1, 0), (1, 0, 2), (1, 1, 2)):
        assert_same_bits(bounds[b, h, :pages], whole[b, h, :pages])
        assert not bounds[b, h, pages:].any()


def paged_arguments():
    arguments = append_arguments(held=40, new=0)
    for name in ("k", "v", "lengths"):
        del arguments[name]
    return {**arguments, "first": 0, "last": 3, "dtype": "bfloat16"}


def test_opcheck():
    for dtype in ("float32", "bfloat16"):
        torch.library.opcheck(ops.page_bounds.default, (keys(40).requires_grad_(), 16, dtype))
        torch.library.opcheck(ops.page_bounds_paged.default, tuple({**paged_arguments(), "dtype": dtype}.values()))


def test_no_gradient_and_no_work_on_meta_tensors():
    k = keys(40).requires_grad_()
    assert not lcore.page_bounds(k, 16).requires_grad and not ops.page_bounds(k, 16).requires_grad
    bounds = lcore.page_bounds(k.to("meta"), 16)
    assert bounds.shape == (2, 3, 2, 2, 24) and bounds.dtype == torch.bfloat16 and bounds.device.type == "meta"


def test_compile_without_a_graph_break():
    torch.compiler.reset()

    def model(q, k):
        return lcore.page_scores(q, lcore.page_bounds(k, 16), softmax_scale=0.3)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (100, 333):
        q, k = keys(1, kv_heads=6), keys(seq)
        assert_same_bits(compiled(q, k), model(q, k))


def test_errors():
    k = keys(40)
    for arguments, error, message in (
        ((k.double(), 16), TypeError, "k must have dtype float32 or float16 or bfloat16, got float64"),
        ((k[0], 16), ValueError, r"k must have shape \(batch, seq, kv_heads, head_dim\)"),
        ((k, 0), ValueError, "page_size must be a positive integer, got 0"),
        ((k, 16.0), TypeError, "page_size must be a positive integer, got 16.0"),
    ):
        with pytest.raises(error, match=rf"lcore\.page_bounds: {message}"):
            lcore.page_bounds(*arguments)
    with pytest.raises(TypeError, match=r"lcore\.page_bounds: dtype must be bfloat16 or float32, got torch\.float16"):
        lcore.page_bounds(k, 16, dtype=torch.float16)
    twins = Twins(page_size=16)
    twins.append(40)
    for arguments, message in (
        ((1,), r"layer must be an integer in \[0, 0\], got 1"),
        ((0, 0, 3), r"last must be an integer in \[0, 2\], got 3"),
        ((0, 2, 1), r"first must be an integer in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=rf"lcore\.PagedCache\.page_bounds: {message}"):
            twins.cache.page_bounds(*arguments)


BAD = [case for case in COMMON if case[0] != "lengths"] + [
    ("first", lambda x: -1, "range"),
    ("last", lambda x: -1, "range"),
    ("first", lambda x: 4, "range"),
    ("last", lambda x: 2**62, "range"),
    ("dtype", lambda x: "float16", "dtype must be float32 or bfloat16, got float16"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_arguments_of_the_op_are_errors(name, change, message):
    arguments = paged_arguments()
    ops.page_bounds_paged(**arguments)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        ops.page_bounds_paged(**{**arguments, name: change(arguments[name])})
