"""The CUDA kernels that write a paged cache, emulated: the bytes of the CPU's kernels, whatever the format."""

import pytest
import torch
from cache_cases import DTYPE_OF, NAME_OF
from emulated import cuda_kernels
from test_cache_compact import op_arguments
from test_page_formats import CODED, HARD, check

import lcore
from lcore.cache.formats import FORMATS, page_layout

ops = torch.ops.lcore
# Channels of unequal sizes, and zeros of both signs.
SPREAD = 4.0


def cloned(arguments):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def append_arguments(k_format, v_format, dtype, held, new, *, page_size=16, dim=40, dim_v=72, prefix=0, counts=None):
    """A cache of (2, 2) slots that hold `held` tokens each, or the CPU's bytes of them, and `new` more."""
    layout = page_layout("test", dim, dim_v, (k_format, v_format), page_size, num_layers=1, fp_prefix=prefix,
                         skip_layers=(), dtype=dtype)  # fmt: skip
    parts, plain = layout.plain.parts, layout.plain.counts[0]
    tokens = int(held.max()) + new
    width = int(layout.plain.columns(torch.tensor(tokens // page_size).numpy(), 0)) + 1
    arguments = {
        "pool": torch.full((4 * width, layout.page_bytes), 0xAB, dtype=torch.uint8),
        "page_table": torch.randperm(4 * width).int().view(2, 2, width),
        "kv_lengths": torch.zeros(2, 2, dtype=torch.int32),
        "tail_k": torch.zeros(2, 2, page_size, dim, dtype=dtype),
        "tail_v": torch.zeros(2, 2, page_size, dim_v, dtype=dtype),
        "k_format": k_format,
        "v_format": v_format,
        "page_size": page_size,
        "plain_pages": plain,
        "parts": parts,
    }

    def more(count):
        k, v = (torch.randn(2, 2, count, d) * torch.logspace(-1, SPREAD / 2, d) for d in (dim, dim_v))
        k[..., ::5], v[..., 1::7] = 0.0, -0.0
        k[:, :, ::2, 6:7] *= 0.0
        return {"k": k.to(dtype).transpose(1, 2), "v": v.to(dtype).transpose(1, 2)}

    ops.cache_append_(**arguments, **more(int(held.max())), lengths=held)
    return arguments | more(new) | {"lengths": counts}


def check_bytes(arguments, op="cache_append_"):
    want = cloned(arguments)
    getattr(ops, op)(**want)
    with cuda_kernels(op):
        getattr(ops, op)(**arguments)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x.contiguous().view(torch.uint8), want[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("k_format", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 15, 16, 40])
def test_bytes_of_every_format(new, dtype, k_format):
    v_format = {"fp8": "fp8", "int8": "int4", "int4": "int2", "int2": "int8"}.get(k_format, k_format)
    arguments = append_arguments(k_format, v_format, dtype, torch.tensor([31, 3]), new)
    check_bytes(arguments)


@pytest.mark.parametrize("kv_format", ["bf16", "fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize(("page_size", "dim", "dim_v"), [(16, 1, 513 - 1), (64, 128, 64), (256, 33, 128), (32, 300, 7)])
def test_page_sizes_and_dims(page_size, dim, dim_v, kv_format):
    held, new = torch.tensor([page_size - 1, 0]), page_size + 2
    arguments = append_arguments(kv_format, kv_format, torch.bfloat16, held, new, page_size=page_size, dim=dim,
                                 dim_v=dim_v)  # fmt: skip
    check_bytes(arguments)


@pytest.mark.parametrize("kv_format", ["int8", "int4", "fp8"])
def test_pages_of_values_among_codes(kv_format):
    held = torch.tensor([0, 17])
    check_bytes(append_arguments(kv_format, kv_format, torch.bfloat16, held, 70, prefix=40, dim=64, dim_v=64))


def test_right_padded_rows_do_not_read_their_padding():
    counts = torch.tensor([0, 33])
    arguments = append_arguments("int4", "bf16", torch.float32, torch.tensor([5, 20]), 40, counts=counts)
    arguments["k"][1, 33:], arguments["v"][0] = torch.nan, torch.nan
    check_bytes(arguments)
    assert arguments["kv_lengths"].tolist() == [[5, 5], [53, 53]]


def test_one_by_one_has_the_bytes_of_all_at_once():
    arguments = append_arguments("int4", "int8", torch.bfloat16, torch.tensor([7, 7]), 40)
    parts = cloned(arguments)
    with cuda_kernels("cache_append_"):
        ops.cache_append_(**arguments)
        for begin in range(0, 40, 5):
            ops.cache_append_(**parts | {name: parts[name][:, begin : begin + 5] for name in ("k", "v")})
    for name in ("pool", "kv_lengths"):
        assert torch.equal(parts[name], arguments[name])


@pytest.mark.parametrize("kv_format", CODED)
@pytest.mark.parametrize("name", HARD)
def test_hard_values(kv_format, name):
    with cuda_kernels("cache_append_"):
        check(HARD[name], kv_format)


@pytest.mark.parametrize("dtype", NAME_OF)
@pytest.mark.parametrize("k_format", DTYPE_OF)
@pytest.mark.parametrize(("held", "dim"), [(40, 8), (75, 200), (130, 64)])
def test_compaction_has_the_bytes_of_the_cpu(held, dim, k_format, dtype):
    masks = [torch.rand(held) < share for share in (0.9, 0.5, 0.02, 1.0)]
    keep = [mask.nonzero().flatten().tolist() for mask in masks]
    check_bytes(op_arguments(held, keep, dim=dim, dtype=dtype, k_format=k_format, v_format="bf16"), "cache_compact_")


def test_compaction_to_other_pages_leaves_the_old_ones():
    arguments = op_arguments(100, [[*range(30), 50, 99], [], list(range(100)), list(range(0, 100, 3))])
    arguments["pool"] = torch.cat([arguments["pool"], torch.zeros_like(arguments["pool"])])
    old = arguments["pool"][: len(arguments["pool"]) // 2].clone()
    arguments["new_table"] = arguments["page_table"] + len(old)
    check_bytes(arguments, "cache_compact_")
    assert torch.equal(arguments["pool"][: len(old)], old)


@pytest.mark.parametrize("kv_format", ["fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize("prefix", [0, 16])
def test_bounds_of_codes_are_those_of_the_cpu(prefix, kv_format):
    cache = lcore.PagedCache(1, 2, 40, dtype=torch.float32, kv_format=kv_format, page_size=16, fp_prefix=prefix)
    cache.append(0, torch.randn(1, 70, 2, 40), torch.randn(1, 70, 2, 40))
    want = cache.page_bounds(0, dtype=torch.float32)
    with cuda_kernels("page_bounds_paged"):
        got = cache.page_bounds(0, dtype=torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
