"""torch.ops.lcore.cache_append_ and attention_paged, called directly: as torch sees them, and with bad arguments."""

import pytest
import torch
from tolerance import assert_same_bits

import lcore

ops = torch.ops.lcore
PAGE = 16
FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def append_arguments(dtype=torch.float32, held=20, new=30):
    """A cache of (2, 2) slots that hold `held` tokens, and `new` more."""
    kv_heads, dim = 2, 8
    width = (held + new) // PAGE + 1
    itemsize = dtype.itemsize
    return {
        "pool": torch.zeros(4 * width, 2 * PAGE * dim * itemsize, dtype=torch.uint8),
        "page_table": torch.arange(4 * width, dtype=torch.int32).view(2, kv_heads, width),
        "kv_lengths": torch.full((2, kv_heads), held, dtype=torch.int32),
        "tail_k": torch.randn(2, kv_heads, PAGE, dim).to(dtype),
        "tail_v": torch.randn(2, kv_heads, PAGE, dim).to(dtype),
        "k": torch.randn(2, new, kv_heads, dim).to(dtype),
        "v": torch.randn(2, new, kv_heads, dim).to(dtype),
        "k_format": FORMATS[dtype],
        "v_format": FORMATS[dtype],
        "page_size": PAGE,
        "lengths": None,
    }


def attend_arguments(dtype=torch.float32, held=40, new=3):
    cache = append_arguments(dtype, held)
    for name in ("k", "v"):
        del cache[name]
    return {
        "q": torch.randn(2, new, 4, 8).to(dtype),
        **cache,
        "window_size": [-1, -1],
        "softmax_scale": 0.3,
        "softcap": 0.0,
        "alibi_slopes": None,
        "sinks": None,
    }


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 0])])
def test_opcheck_attention_paged(lengths, dtype):
    arguments = {**attend_arguments(dtype), "lengths": lengths}
    torch.library.opcheck(ops.attention_paged.default, tuple(arguments.values()))
    arguments |= {"window_size": [9, 0], "softcap": 3.0, "alibi_slopes": torch.rand(4), "sinks": torch.randn(4)}
    torch.library.opcheck(ops.attention_paged.default, tuple(arguments.values()))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("lengths", [None, torch.tensor([30, 0])])
def test_opcheck_cache_append(lengths, dtype):
    arguments = {**append_arguments(dtype), "lengths": lengths}
    torch.library.opcheck(ops.cache_append_.default, tuple(arguments.values()))


def test_append_moves_the_lengths_and_fills_the_tables_pages():
    arguments = append_arguments(held=0, new=20)
    ops.cache_append_(**arguments)
    assert arguments["kv_lengths"].tolist() == [[20, 20]] * 2
    codes = arguments["pool"].view(torch.float32).view(2, 2, 2, 2, PAGE, 8)  # row, head, page, k or v
    assert_same_bits(codes[:, :, 0, 0], arguments["k"][:, :PAGE].transpose(1, 2))
    assert_same_bits(codes[:, :, 0, 1], arguments["v"][:, :PAGE].transpose(1, 2))
    assert not codes[:, :, 1].any()
    assert_same_bits(arguments["tail_k"][:, :, :4], arguments["k"][:, PAGE:].transpose(1, 2))


def test_attention_paged_returns_lse_too():
    k, v = torch.randn(2, 2, 20, 2, 8).unbind()
    held = append_arguments(held=0, new=20) | {"k": k, "v": v}
    ops.cache_append_(**held)
    arguments = attend_arguments(held=20) | {name: held[name] for name in held if name not in ("k", "v")}
    out, lse = ops.attention_paged(**arguments)
    want = lcore.attention(arguments["q"], k, v, causal=True, softmax_scale=0.3, return_lse=True)
    assert_same_bits(out, want[0])
    assert_same_bits(lse, want[1])
    out, lse = ops.attention_paged(**{**arguments, "lengths": torch.tensor([0, 2])})
    assert not out[0].any() and not out[1, 2].any() and lse[0].isneginf().all() and lse[1, :, 2].isneginf().all()


def ids(*values):
    """A page table with other ids."""
    return lambda table: torch.tensor(values, dtype=torch.int32).expand(2, 2, -1).contiguous()


COMMON = [
    ("page_table", ids(0, -1, 1, 2), "ids of the pool"),
    ("page_table", ids(0, 2**31 - 1, 1, 2), "ids of the pool"),
    ("page_table", ids(-(2**31), 1, 2, 3), "ids of the pool"),
    ("page_table", lambda x: x[..., :0], "must"),
    ("page_table", lambda x: x.long(), "int32"),
    ("page_table", lambda x: x[:1], "batch, kv_heads"),
    ("page_table", lambda x: x.transpose(0, 1), "contiguous"),
    ("page_table", lambda x: x.flatten(), "dimensions"),
    ("kv_lengths", lambda x: x - 41, "kv_lengths"),
    ("kv_lengths", lambda x: x + 2**31 - 45, "kv_lengths"),
    ("kv_lengths", lambda x: x + 1000, "kv_lengths"),
    ("kv_lengths", lambda x: x.long(), "int32"),
    ("kv_lengths", lambda x: x[:, :1], "."),
    ("pool", lambda x: x[:0], "ids of the pool"),
    ("pool", lambda x: x[:, :-64].contiguous(), "pages of"),
    ("pool", lambda x: x[:, :-64], "contiguous"),
    ("pool", lambda x: x.view(torch.int8), "uint8"),
    ("pool", lambda x: x.flatten(), "dimensions"),
    ("tail_k", lambda x: x[:, :, :-1].contiguous(), "page_size"),
    ("tail_k", lambda x: x[..., :-1].contiguous(), "."),
    ("tail_k", lambda x: x[0], "dimensions"),
    ("tail_k", lambda x: x.half(), "dtype"),
    ("tail_k", lambda x: x.transpose(0, 1), "contiguous"),
    ("tail_v", lambda x: x[:, :, :-1].contiguous(), "page_size"),
    ("tail_v", lambda x: x[:, :1].contiguous(), "batch, kv_heads"),
    ("tail_v", lambda x: x.half(), "dtype"),
    ("tail_v", lambda x: x.int(), "dtype"),
    ("k_format", lambda x: "int3", "format"),
    ("v_format", lambda x: "", "format"),
    ("v_format", lambda x: "bf16", "pages of"),
    ("page_size", lambda x: 0, "page_size"),
    ("page_size", lambda x: -16, "page_size"),
    ("page_size", lambda x: 2**62, "page_size"),
    ("lengths", lambda x: torch.tensor([1, 99]), "lengths"),
    ("lengths", lambda x: torch.tensor([-1, 1]), "lengths"),
    ("lengths", lambda x: torch.tensor([-(2**63), 1]), "lengths"),
    ("lengths", lambda x: torch.tensor([1, 1, 1]), "lengths"),
    ("lengths", lambda x: torch.tensor([1, 1], dtype=torch.int32), "lengths"),
]
APPEND = [
    *COMMON,
    ("k", lambda x: x[:1], "."),
    ("k", lambda x: x[:, :, :1], "."),
    ("k", lambda x: x[..., :-1], "k must"),
    ("k", lambda x: x[:, :-1], "v must"),
    ("k", lambda x: x.bfloat16(), "dtype"),
    ("v", lambda x: x.bfloat16(), "dtype"),
    ("v", lambda x: x[..., :-1], "v must"),
    ("k", lambda x: x[0], "dimensions"),
]
ATTEND = [
    *COMMON,
    ("q", lambda x: x[:1], "."),
    ("q", lambda x: x[:, :, :3], "multiple"),
    ("q", lambda x: x[..., :-1], "."),
    ("q", lambda x: x.half(), "dtype"),
    ("q", lambda x: x[0], "dimensions"),
    ("window_size", lambda x: [1], "window_size"),
    ("window_size", lambda x: [1, 2, 3], "window_size"),
    ("sinks", lambda x: torch.zeros(3), "sinks"),
    ("sinks", lambda x: torch.zeros(4).half(), "sinks"),
    ("alibi_slopes", lambda x: torch.zeros(3), "alibi_slopes"),
    ("alibi_slopes", lambda x: torch.zeros(()), "alibi_slopes"),
    ("alibi_slopes", lambda x: torch.zeros(1, 4), "alibi_slopes"),
    ("alibi_slopes", lambda x: torch.zeros(4).double(), "alibi_slopes"),
]


@pytest.mark.parametrize(("name", "change", "message"), APPEND)
def test_bad_appends_are_errors_and_write_nothing(name, change, message):
    arguments = append_arguments()
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        ops.cache_append_(**{**arguments, name: change(arguments[name])})
    for key, x in before.items():
        assert torch.equal(arguments[key], x)


@pytest.mark.parametrize(("name", "change", "message"), ATTEND)
def test_bad_attends_are_errors(name, change, message):
    arguments = attend_arguments()
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        ops.attention_paged(**{**arguments, name: change(arguments[name])})


def test_more_queries_than_keys_see_nothing():
    arguments = attend_arguments(held=1, new=3)
    out, lse = ops.attention_paged(**arguments)
    assert not out[:, :2].any() and lse[..., :2].isneginf().all() and lse[..., 2].isfinite().all()


def test_no_keys_at_all():
    arguments = attend_arguments(held=0) | {"sinks": torch.tensor([0.0, 1.0, -torch.inf, 2.0])}
    out, lse = ops.attention_paged(**arguments)
    assert not out.any() and torch.equal(lse, arguments["sinks"][:, None].expand(2, 4, 3))
