"""The CUDA kernels of attention over a paged cache, emulated, against the model of a cache in float64."""

import pytest
import torch
from cache_cases import Twins, poison
from emulated import cuda_kernels
from test_cache_rope import INTERLEAVED, PARTIAL, slack
from tolerance import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = ["fp32", "fp16", "bf16", "fp8", "int8", "int4", "int2", ("int8", "int4"), ("bf16", "int4"), ("int2", "fp32")]
UNIT = 512  # keys that are reduced from a fresh state


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_kernels("attention_paged", "cache_append_", "hadamard"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_formats(kv_format, page_size, dtype):
    twins = Twins(kv_heads=1, head_dim=64, head_dim_v=80, dtype=dtype, kv_format=kv_format, page_size=page_size)
    for new, group in ((75, 4), (65, 1)):
        twins.append(new)
        twins.check(5, group=group, slack_ulp=slack(dtype, kv_format))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 65, UNIT - 1, UNIT, UNIT + 1])
def test_lengths(tokens, dtype):
    twins = Twins(kv_heads=1, head_dim=16, page_size=16, dtype=dtype)
    twins.append(tokens)
    twins.check(1, group=3)
    if tokens >= 17:
        twins.check(17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(8, 8), (72, 136), (128, 128), (80, 40), (256, 200), (40, 512)])
def test_head_dims(head_dim, head_dim_v, dtype):
    twins = Twins(kv_heads=1, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, page_size=32)
    twins.append(70)
    twins.check(1, group=8)
    twins.check(20, group=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_format", ["bf16", "int4"])
def test_rows_of_a_batch_with_scores_of_every_kind(kv_format, dtype):
    twins = Twins(batch_size=3, head_dim=32, page_size=16, kv_format=kv_format, dtype=dtype)
    twins.append(70, lengths=torch.tensor([70, 0, 33]))
    counts = torch.tensor([5, 20, 0])
    twins.append(20, lengths=counts)
    poison(twins.cache)
    ulp = slack(dtype, kv_format)
    twins.check(20, group=2, lengths=counts, slack_ulp=ulp)
    arguments = {"softmax_scale": 0.4, "softcap": 2.0, "sinks": torch.randn(4), "window_size": (20, 0)}
    twins.check(20, group=2, lengths=counts, slack_ulp=ulp, **arguments)
    twins.check(20, group=2, lengths=counts, slack_ulp=ulp, alibi_slopes=torch.rand(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"skip_layers": (0,)}, {"fp_prefix": 20}, {"rotate": True}])
def test_values_among_codes_and_rotation(options, dtype):
    twins = Twins(head_dim=64, page_size=16, kv_format="int4", dtype=dtype, **options)
    for new, group in ((75, 2), (1, 4)):
        twins.append(new)
        twins.check(min(new, 20), group=group, slack_ulp=slack(dtype, "int4"))


def test_heads_of_unequal_length():
    twins = Twins(batch_size=2, head_dim=32, page_size=16)
    twins.append(200)
    twins.evict(0.4)
    twins.append(1)
    poison(twins.cache)
    twins.check(1, group=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("rope", [PARTIAL, INTERLEAVED], ids=["halves", "interleaved"])
def test_keys_before_rope(rope, kv_format, dtype):
    twins = Twins(head_dim=32, page_size=16, kv_format=kv_format, rope=rope, dtype=dtype)
    twins.append(70)
    twins.check(9, group=2, slack_ulp=slack(dtype, kv_format))
    twins.check(1, group=4, slack_ulp=slack(dtype, kv_format))


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_bits_of_a_chunk(dtype, kv_format):
    twins = Twins(kv_heads=1, head_dim=16, dtype=dtype, kv_format=kv_format, page_size=16)
    twins.append(UNIT + 20)
    q = torch.randn(1, 40, 1, 16).to(dtype)
    together, lse = twins.cache.attend(0, q, return_lse=True)
    for new in (1, 5):
        part, part_lse = twins.cache.attend(0, q[:, -new:], return_lse=True)
        assert_same_bits(part, together[:, -new:])
        assert_same_bits(part_lse, lse[..., -new:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_in_turn_have_the_bits_of_units_side_by_side(dtype):
    """256 tiles of rows are enough for the GPU, so that a block does all units of its rows; one tile is not."""
    twins = Twins(kv_heads=1, head_dim=16, dtype=dtype, page_size=16)
    twins.append(UNIT + 8)
    q = torch.randn(1, 1, 16 * 256, 16).to(dtype)
    arguments = {"window_size": (12, 0), "return_lse": True}  # keys of both units, and few of them
    together, lse = twins.cache.attend(0, q, **arguments)
    for first in (0, 16 * 255):
        part, part_lse = twins.cache.attend(0, q[:, :, first : first + 16].contiguous(), **arguments)
        assert_same_bits(part, together[:, :, first : first + 16])
        assert_same_bits(part_lse, lse[:, first : first + 16])


def test_a_nan_that_comes_later_is_not_seen():
    twins = Twins(kv_heads=1, head_dim=16, page_size=16)
    twins.append(40)
    twins.cache.append(0, torch.full((1, 1, 1, 16), torch.nan), torch.full((1, 1, 1, 16), torch.nan))
    out = twins.cache.attend(0, torch.randn(1, 5, 2, 16))
    assert out[:, :4].isfinite().all() and out[:, 4].isnan().all()
