"""Bad arguments of lcore.PagedCache: the error names the argument, the rule and the value, and nothing has changed."""

import copy
import pickle

import pytest
import torch
from cache_cases import assert_same_contents, random_kv

import lcore

INT32_MAX = 2**31 - 1


def small_cache():
    """Two rows of 20 tokens, two layers, two kv heads of 8 and 6."""
    cache = lcore.PagedCache(
        2, 2, 8, head_dim_v=6, batch_size=2, dtype=torch.float32, kv_format="fp32", page_size=16, max_bytes=1 << 20
    )
    for layer in range(2):
        cache.append(layer, *random_kv(2, 20, 2, 8, 6))
    return cache


K, V = torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 6)
Q = torch.zeros(2, 3, 4, 8)

NEW = [
    ({"num_layers": 0}, ValueError, "num_layers must be an integer >= 1, got 0"),
    ({"num_layers": "2"}, TypeError, "num_layers must be an integer >= 1, got '2'"),
    ({"num_layers": True}, TypeError, "num_layers must be an integer >= 1, got True"),
    ({"num_kv_heads": -1}, ValueError, "num_kv_heads must be an integer >= 1, got -1"),
    ({"head_dim": 0}, ValueError, "head_dim must be an integer in [1, 512], got 0"),
    ({"head_dim": 513}, ValueError, "head_dim must be an integer in [1, 512], got 513"),
    ({"head_dim": 64.0}, TypeError, "head_dim must be an integer in [1, 512], got 64.0"),
    ({"head_dim_v": 513}, ValueError, "head_dim_v must be an integer in [1, 512], got 513"),
    ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
    ({"page_size": 0}, ValueError, "page_size must be an integer in [1, 4096], got 0"),
    ({"page_size": 4097}, ValueError, "page_size must be an integer in [1, 4096], got 4097"),
    ({"page_size": None}, TypeError, "page_size must be an integer in [1, 4096], got None"),
    ({"dtype": torch.float64}, TypeError, "dtype must be float32, float16 or bfloat16, got torch.float64"),
    ({"dtype": "bf16"}, TypeError, "dtype must be float32, float16 or bfloat16, got bf16"),
    ({"kv_format": "fp64"}, ValueError, 
     "kv_format must be one of 'fp32', 'fp16', 'bf16', 'fp8', 'int8', 'int4', 'int2', got 'fp64'"),
    ({"kv_format": 16}, TypeError, "kv_format must be a format name, or a pair of names (k, v), got 16"),
    ({"kv_format": ("bf16",) * 3}, TypeError,
     "kv_format must be a format name, or a pair of names (k, v), got ('bf16', 'bf16', 'bf16')"),
    ({"kv_format": "int4", "page_size": 48}, ValueError,
     "page_size must be one of (16, 32, 64, 128, 256) with kv_format 'int4', 'int4', got 48"),
    ({"rotate": 1}, TypeError, "rotate must be a bool, got 1"),
    ({"max_bytes": -1}, ValueError, "max_bytes must be an integer >= 0, got -1"),
    ({"max_bytes": 1e9}, TypeError, "max_bytes must be an integer >= 0, got 1000000000.0"),
    ({"device": "warp"}, ValueError, "device must be a torch device, got warp"),
    ({"policy": "h2o"}, TypeError, "policy must be an lcore.policies.Policy or None, got 'h2o'"),
]  # fmt: skip

MISSING = [
    ({"device": "cuda"}, "no kernels for device cuda yet; use device='cpu'"),
    ({"device": torch.device("meta")}, "no kernels for device meta yet; use device='cpu'"),
]  # fmt: skip

APPEND = [
    ({"layer": 2}, ValueError, "layer must be an integer in [0, 1], got 2"),
    ({"layer": -1}, ValueError, "layer must be an integer in [0, 1], got -1"),
    ({"layer": 0.0}, TypeError, "layer must be an integer in [0, 1], got 0.0"),
    ({"k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    ({"k": K.half()}, TypeError, "k must have dtype float32, got float16"),
    ({"v": V.double()}, TypeError, "v must have dtype float32, got float64"),
    ({"k": K.to("meta")}, ValueError, "k must be on device cpu, got meta"),
    ({"k": K[0]}, ValueError, "k must have shape (batch, new, kv_heads, head_dim) = (2, *, 2, 8), got (3, 2, 8)"),
    ({"k": K[:1]}, ValueError, "k must have shape (batch, new, kv_heads, head_dim) = (2, *, 2, 8), got (1, 3, 2, 8)"),
    ({"k": K[..., :6]}, ValueError,
     "k must have shape (batch, new, kv_heads, head_dim) = (2, *, 2, 8), got (2, 3, 2, 6)"),
    ({"v": V[:, :2]}, ValueError,
     "v must have shape (batch, new, kv_heads, head_dim_v) = (2, 3, 2, 6), got (2, 2, 2, 6)"),
    ({"v": V[:, :, :1]}, ValueError,
     "v must have shape (batch, new, kv_heads, head_dim_v) = (2, 3, 2, 6), got (2, 3, 1, 6)"),
    ({"v": K}, ValueError, "v must have shape (batch, new, kv_heads, head_dim_v) = (2, 3, 2, 6), got (2, 3, 2, 8)"),
    ({"lengths": [3, 3]}, TypeError, "lengths must be a torch.Tensor, got list"),
    ({"lengths": torch.tensor([3.0, 3.0])}, TypeError, "lengths must have dtype int64 or int32, got float32"),
    ({"lengths": torch.tensor([3])}, ValueError, "lengths must have shape (batch,) = (2,), got (1,)"),
    ({"lengths": torch.tensor([3, 4])}, ValueError, "lengths must lie in [0, 3], got [3, 4]"),
    ({"lengths": torch.tensor([-1, 3])}, ValueError, "lengths must lie in [0, 3], got [-1, 3]"),
    ({"k": K[:, :1].expand(2, INT32_MAX, 2, 8), "v": V[:, :1].expand(2, INT32_MAX, 2, 6)}, ValueError,
     f"k must bring no head over {INT32_MAX} tokens, got {INT32_MAX} on top of 20"),
    ({"k": K[:, :1].expand(2, 2**40, 2, 8), "v": V[:, :1].expand(2, 2**40, 2, 6)}, ValueError,
     f"k must bring no head over {INT32_MAX} tokens, got {2**40} on top of 20"),
]  # fmt: skip

ATTEND = [
    ({"layer": 2}, ValueError, "layer must be an integer in [0, 1], got 2"),
    ({"q": "q"}, TypeError, "q must be a torch.Tensor, got str"),
    ({"q": Q.bfloat16()}, TypeError, "q must have dtype float32, got bfloat16"),
    ({"q": Q[..., :7]}, ValueError, "q must have shape (batch, new, heads, head_dim) = (2, *, *, 8), got (2, 3, 4, 7)"),
    ({"q": Q[0]}, ValueError, "q must have shape (batch, new, heads, head_dim) = (2, *, *, 8), got (3, 4, 8)"),
    ({"q": Q[:, :, :3]}, ValueError, "q must have heads a positive multiple of num_kv_heads 2, got 3"),
    ({"q": Q[:, :, :0]}, ValueError, "q must have heads a positive multiple of num_kv_heads 2, got 0"),
    ({"q": torch.zeros(2, 21, 4, 8)}, ValueError, "q must have at most the [20, 20] tokens held by each row, got 21"),
    ({"lengths": torch.tensor([4, 0])}, ValueError, "lengths must lie in [0, 3], got [4, 0]"),
    ({"window_size": (1,)}, ValueError, "window_size must be two integers >= -1, got (1,)"),
    ({"window_size": (-2, 0)}, ValueError, "window_size must be two integers >= -1, got (-2, 0)"),
    ({"window_size": 5}, TypeError, "window_size must be two integers >= -1, got 5"),
    ({"softcap": -1.0}, ValueError, "softcap must be a finite number >= 0, got -1.0"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be a finite number, got nan"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks must have shape (heads,) = (4,), got (3,)"),
    ({"alibi_slopes": torch.zeros(4).half()}, TypeError, "alibi_slopes must have dtype float32, got float16"),
    ({"alibi_slopes": torch.zeros(1, 4)}, ValueError, "alibi_slopes must have shape (4,) or (2, 4), got (1, 4)"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes must have shape (4,) or (2, 4), got (3,)"),
]

OTHER = [
    ("crop", (-1,), ValueError, "n must be an integer >= 0, got -1"),
    ("crop", (1.5,), TypeError, "n must be an integer >= 0, got 1.5"),
    ("crop", (None,), TypeError, "n must be an integer >= 0, got None"),
    ("crop", (torch.tensor([1.0, 2.0]),), TypeError, "n must have dtype int64 or int32, got float32"),
    ("crop", (torch.tensor([1, -2]),), ValueError, "n must be >= 0, got [1, -2]"),
    ("crop", (torch.tensor([1, 2, 3]),), ValueError, "n must have shape (batch,) = (2,), got (3,)"),
    ("reserve", (-1,), ValueError, f"tokens must be an integer in [0, {INT32_MAX}], got -1"),
    ("reserve", (2**31,), ValueError, f"tokens must be an integer in [0, {INT32_MAX}], got {2**31}"),
    ("reserve", (2**70,), ValueError, f"tokens must be an integer in [0, {INT32_MAX}], got {2**70}"),
    ("reserve", ("1",), TypeError, f"tokens must be an integer in [0, {INT32_MAX}], got '1'"),
    ("reserve", (torch.tensor([0, 2**31]),), ValueError, f"tokens must lie in [0, {INT32_MAX}], got [0, {2**31}]"),
    ("reserve", (torch.tensor([1]),), ValueError, "tokens must have shape (batch,) = (2,), got (1,)"),
    ("seen", (2,), ValueError, "layer must be an integer in [0, 1], got 2"),
    ("lengths", (-1,), ValueError, "layer must be an integer in [0, 1], got -1"),
    ("bytes_per_token", (0, 2, 8), ValueError, "num_layers must be an integer >= 1, got 0"),
    ("bytes_per_token", (1, "2", 8), TypeError, "num_kv_heads must be an integer >= 1, got '2'"),
    ("bytes_per_token", (1, 2, 1024), ValueError, "head_dim must be an integer in [1, 512], got 1024"),
    ("bytes_per_token", (1, 2, 8, "int3"), ValueError, None),
]


def ids(cases):
    return [pytest.param(*case, id="-".join(str(x) for x in case[-1:])[:60]) for case in cases]


def unchanged(cache, before):
    for layer in range(2):
        assert_same_contents(cache, before, layer)


@pytest.mark.parametrize(("change", "error", "message"), ids(NEW))
def test_new(change, error, message):
    with pytest.raises(error) as caught:
        lcore.PagedCache(**{"num_layers": 1, "num_kv_heads": 2, "head_dim": 8, **change})
    assert str(caught.value) == f"lcore.PagedCache: {message}"


@pytest.mark.parametrize(("change", "message"), ids(MISSING))
def test_what_is_not_there_yet(change, message):
    with pytest.raises(NotImplementedError) as caught:
        lcore.PagedCache(1, 2, 8, **change)
    assert str(caught.value) == f"lcore.PagedCache: {message}"


@pytest.mark.parametrize(("change", "error", "message"), ids(APPEND))
def test_append(change, error, message):
    cache = small_cache()
    before = cache.fork()
    with pytest.raises(error) as caught:
        cache.append(**{"layer": 0, "k": K, "v": V, **change})
    assert str(caught.value) == f"lcore.PagedCache.append: {message}"
    unchanged(cache, before)
    cache.append(0, K, V)


@pytest.mark.parametrize(("change", "error", "message"), ids(ATTEND))
def test_attend(change, error, message):
    cache = small_cache()
    with pytest.raises(error) as caught:
        cache.attend(**{"layer": 0, "q": Q, **change})
    assert str(caught.value) == f"lcore.PagedCache.attend: {message}"


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ids(OTHER))
def test_other_calls(function, arguments, error, message):
    cache = small_cache()
    before = cache.fork()
    with pytest.raises(error) as caught:
        getattr(cache, function)(*arguments)
    text = str(caught.value)
    assert text.startswith(f"lcore.PagedCache.{function}: ")
    assert message is None or text == f"lcore.PagedCache.{function}: {message}"
    unchanged(cache, before)


@pytest.mark.parametrize("tokens", [2**20, INT32_MAX])
def test_reserve_says_what_is_missing(tokens):
    cache = small_cache()
    with pytest.raises(
        MemoryError, match=r"^lcore\.PagedCache\.reserve: max_bytes=1,048,576 leaves .* are needed .* fit$"
    ):
        cache.reserve(tokens)


def test_crop_beyond_any_length_is_nothing():
    cache = small_cache()
    before = cache.fork()
    for n in (20, 2**31, 2**63, 2**70, torch.tensor([2**62, 20])):
        cache.crop(n)
        unchanged(cache, before)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_is_forked_not_copied(way):
    with pytest.raises(TypeError, match=r"^lcore\.PagedCache: a cache cannot be copied or pickled; use fork\(\)$"):
        way(small_cache())


def test_a_closed_cache_says_so():
    cache = small_cache()
    cache.close()
    for call in (cache.fork, cache.stats, cache.seen, lambda: cache.crop(0), lambda: cache.append(0, K, V)):
        with pytest.raises(ValueError, match=r"^lcore\.PagedCache\.\w+: the cache must be open, got a closed one$"):
            call()
