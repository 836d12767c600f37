"""Keys that are stored before RoPE: attention and key mass over keys rotated to their places, against float64."""

import pytest
import torch
from cache_cases import NAME_OF, Twins, poison, random_kv
from test_cache_ops import attend_arguments
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference
from lcore.positions import RopeConfig, Rotation

ops = torch.ops.lcore
PAGE = 16
LLAMA = Rotation.of(RopeConfig(), 64)
PARTIAL = Rotation(torch.rand(13, generator=torch.Generator().manual_seed(1)) * 2, attention_scaling=1.2)
INTERLEAVED = Rotation(PARTIAL.inv_freq, 0.9, interleaved=True)
# At place 300 this one has turned half a million times: a product in float32 is off by a tenth of a turn.
FAST = Rotation(1e4 * (1 + torch.rand(16, generator=torch.Generator().manual_seed(2))))

pytestmark = pytest.mark.usefixtures("one_thread")


def slack(dtype, kv_format):
    """Where V has integer codes, weights are rounded to 2^-16 of their page's largest, and values reach 4."""
    v_format = kv_format if isinstance(kv_format, str) else kv_format[1]
    return 16 + (2**-12 / torch.finfo(dtype).eps if v_format.startswith("int") else 0)


@pytest.mark.parametrize("dtype", NAME_OF)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(
    "kv_format", ["fp32", "fp16", "bf16", "fp8", "int8", "int4", ("int2", "bf16"), ("bf16", "int4")]
)
def test_formats(kv_format, page_size, dtype):
    twins = Twins(head_dim=64, dtype=dtype, kv_format=kv_format, page_size=page_size, rope=LLAMA)
    ulp = slack(dtype, kv_format)
    for new, group in ((70, 2), (1, 1), (1, 4), (300, 3)):
        twins.append(new)
        twins.check(new, group=group, slack_ulp=ulp)
    twins.check(5, group=8, slack_ulp=ulp)


@pytest.mark.parametrize("rope", [PARTIAL, INTERLEAVED, FAST], ids=["partial", "interleaved", "fast"])
@pytest.mark.parametrize("dtype", NAME_OF)
@pytest.mark.parametrize("head_dim", [32, 37, 130])
def test_rotations(head_dim, dtype, rope):
    twins = Twins(head_dim=head_dim, head_dim_v=24, dtype=dtype, page_size=64, rope=rope)
    for new, group in ((130, 1), (1, 4), (255, 2), (1, 1)):
        twins.append(new)
        twins.check(new, group=group)


@pytest.mark.parametrize("tokens", [1, 15, 16, 31, 32, 33, 255, 256, 257, 4095, 4097])
def test_lengths(tokens):
    twins = Twins(kv_heads=1, head_dim=26, page_size=PAGE, rope=PARTIAL)
    twins.append(tokens)
    for new in (1, 3, 40):
        if new <= tokens:
            twins.check(new, group=2)


def test_rows_of_a_batch_with_scores_of_every_kind():
    twins = Twins(batch_size=3, head_dim=32, page_size=PAGE, rope=INTERLEAVED)
    twins.append(70, lengths=torch.tensor([70, 0, 33]))
    counts = torch.tensor([5, 40, 0])
    twins.append(40, lengths=counts)
    poison(twins.cache)
    twins.check(40, group=2, lengths=counts)
    arguments = {"softmax_scale": 0.4, "softcap": 2.0, "sinks": torch.randn(4), "window_size": (20, 0)}
    twins.check(40, group=2, lengths=counts, **arguments)
    twins.check(40, group=2, lengths=counts, alibi_slopes=torch.rand(4))


def test_layers_have_rotations_of_their_own():
    ropes = [PARTIAL, None, INTERLEAVED]
    cache = lcore.PagedCache(3, 2, 32, dtype=torch.float32, kv_format="fp32", rope=ropes)
    k, v = random_kv(1, 90, 2, 32)
    q = torch.randn(1, 90, 4, 32)
    for layer, rope in enumerate(ropes):
        assert cache.layer_rope(layer) == rope
        alone = lcore.PagedCache(1, 2, 32, dtype=torch.float32, kv_format="fp32", rope=rope)
        for one, i in ((cache, layer), (alone, 0)):
            one.append(i, k, v)
        assert_same_bits(cache.attend(layer, q), alone.attend(0, q))


@pytest.mark.parametrize("dtype", NAME_OF)
def test_without_evictions_it_is_a_cache_after_rope(dtype):
    before, after = (
        lcore.PagedCache(1, 2, 64, dtype=dtype, kv_format=NAME_OF[dtype], rope=rope) for rope in (LLAMA, None)
    )
    k, v = random_kv(1, 300, 2, 64, dtype=dtype)
    q = torch.randn(1, 300, 4, 64).to(dtype)
    turn = {"positions": torch.arange(300), "inv_freq": LLAMA.frequencies}
    before.append(0, k, v)
    after.append(0, lcore.rope(k, **turn), v)
    got, got_lse = before.attend(0, q, return_lse=True)
    want, want_lse = after.attend(0, lcore.rope(q, **turn), return_lse=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(got_lse, want_lse, rtol=0, atol=8 * eps)


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "int4"])
def test_bits_do_not_depend_on_chunks_or_threads(kv_format, threads):
    k, v = random_kv(1, 600, 2, 32)
    q = torch.randn(1, 600, 6, 32)

    def last(chunks):
        cache = lcore.PagedCache(1, 2, 32, dtype=torch.float32, kv_format=kv_format, page_size=PAGE, rope=PARTIAL)
        for part in torch.arange(600).split(chunks):
            cache.append(0, k[:, part], v[:, part])
        return torch.cat([cache.attend(0, q[:, -n:], return_lse=False)[:, -1] for n in (1, 40, 600)])

    want = last([600])
    assert_same_bits(want[:1].expand(3, -1, -1).contiguous(), want)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_same_bits(last([1, 16, 300, 283]), want)


@pytest.mark.parametrize("kv_format", ["fp32", "bf16"])
def test_keys_close_up_where_others_were_evicted(kv_format):
    twins = Twins(layers=2, batch_size=2, head_dim=32, kv_format=kv_format, page_size=PAGE, rope=PARTIAL)
    twins.append(200)
    for layer in range(2):
        twins.evict(0.4, layer)
    assert len(set(twins.cache.lengths(0).flatten().tolist())) > 1
    for new in (1, 30, 1):
        twins.append(new)
        for layer in range(2):
            twins.check(new, group=2, layer=layer)
            twins.evict(0.3, layer)
    twins.append(1)
    twins.check(1, group=4)


def test_coded_pages_close_up():
    twins = Twins(head_dim=32, kv_format="int8", page_size=PAGE, rope=PARTIAL)
    twins.append(100)
    keep = torch.tensor([[[1, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1]]]).bool().repeat_interleave(PAGE, dim=-1)
    for one in (twins.cache, twins.model):
        one.evict(0, keep[..., :100])
    for new in (1, 20):
        twins.append(new)
        twins.check(new, group=2, slack_ulp=slack(torch.float32, "int8"))


def test_forks_crops_and_files(tmp_path):
    twins = Twins(layers=2, batch_size=2, head_dim=32, page_size=PAGE, rope=INTERLEAVED)
    twins.append(90)
    fork = twins.fork()
    fork.append(7)
    twins.crop(torch.tensor([50, 33]))
    for one in (twins, fork):
        one.append(2)
        one.check(2, group=2, layer=1)
    twins.cache.save(tmp_path / "cache")
    loaded = lcore.PagedCache.load(tmp_path / "cache")
    assert loaded.rope == INTERLEAVED
    twins.cache.close()
    twins.cache = loaded
    twins.append(40)
    twins.check(40, layer=1)


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("kv_format", ["fp32", "int4"])
def test_key_mass(kv_format, reduction):
    twins = Twins(head_dim=40, kv_format=kv_format, page_size=PAGE, rope=PARTIAL)
    twins.append(300)
    for new, heads in ((1, 2), (3, 4), (200, 6)):
        q = torch.randn(1, new, heads, 40)
        _, lse = twins.cache.attend(0, q, return_lse=True)
        got = twins.cache.key_mass(0, q, lse, reduction=reduction)
        k = torch.stack([head[0] for head in twins.model.tokens[0][0]], dim=1)[None]
        wanted = []
        for precision in (torch.float64, torch.float32):
            turned = [
                reference.rope(x.to(precision), torch.arange(first, 300), PARTIAL.frequencies, attention_scaling=1.2)
                for x, first in ((q, 300 - new), (k, 0))
            ]
            mass = reference.key_mass(*turned, lse.to(precision), causal=True, reduction=reduction)
            wanted.append(mass)
        assert_close(got, *wanted, "mass", slack_ulp=16)


OPTIONAL = [{}, {"inv_freq": torch.rand(3), "attention_scaling": 1.5, "interleaved": True}]


@pytest.mark.parametrize("rope", OPTIONAL, ids=["plain", "rope"])
def test_opcheck(rope):
    arguments = attend_arguments()
    torch.library.opcheck(ops.attention_paged.default, tuple(arguments.values()), rope)
    _, lse = ops.attention_paged(**arguments, **rope)
    del arguments["sinks"]
    scored = (*arguments.values(), lse, "sum", 40)
    torch.library.opcheck(ops.key_mass_paged.default, scored, rope)


def test_the_ops_in_float64():
    rope = OPTIONAL[1] | {"inv_freq": torch.rand(3, dtype=torch.float64)}
    arguments = attend_arguments(held=7)  # the tail only: no page format holds float64
    arguments |= {name: arguments[name].double() for name in ("q", "tail_k", "tail_v")}
    got, lse = ops.attention_paged(**arguments, **rope)
    k, v = (arguments[name][:, :, :7].transpose(1, 2) for name in ("tail_k", "tail_v"))
    q = reference.rope(arguments["q"], torch.arange(4, 7), **rope)
    k = reference.rope(k, torch.arange(7), **rope)
    want, want_lse = reference.attention(q, k, v, causal=True, softmax_scale=0.3)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    del arguments["sinks"]
    mass = ops.key_mass_paged(**arguments, lse=lse, reduction="sum", width=7, **rope)
    want = reference.key_mass(q, k, want_lse, causal=True, softmax_scale=0.3)
    torch.testing.assert_close(mass, want, rtol=1e-13, atol=1e-13)


ERRORS = [
    (lambda: Rotation([[1.0]]), ValueError, "positions.Rotation: inv_freq must have one dimension, got (1, 1)"),
    (lambda: Rotation("fast"), TypeError,
     "positions.Rotation: inv_freq must be a tensor or a sequence of numbers, got 'fast'"),
    (lambda: Rotation([torch.inf]), ValueError, "positions.Rotation: inv_freq must be finite, got [inf]"),
    (lambda: Rotation([1.0], interleaved=1), TypeError, "positions.Rotation: interleaved must be a bool, got 1"),
    (lambda: lcore.PagedCache(1, 2, 16, rope=3), TypeError,
     "PagedCache: rope must be an lcore.positions.Rotation, a sequence with one or None for each layer, or None, "
     "got 3"),
    (lambda: lcore.PagedCache(2, 2, 16, rope=[None]), ValueError,
     "PagedCache: rope must have one entry for each of 2 layers, got 1"),
    (lambda: lcore.PagedCache(1, 2, 16, rope=PARTIAL), ValueError,
     "PagedCache: rope must have at most head_dim / 2 = 8 pairs, got 13"),
    (lambda: lcore.PagedCache(1, 2, 32, rope=PARTIAL, rotate=True), NotImplementedError,
     "PagedCache: rotate=True with rope, keys before RoPE, is not there: the Hadamard transform of a key must follow "
     "its RoPE, which is not known when it is stored; use one of the two"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), [pytest.param(*case, id=case[2][:60]) for case in ERRORS])
def test_errors(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == f"lcore.{message}"


def test_bad_frequencies_in_a_direct_call():
    for inv_freq in (torch.rand(5), torch.rand(2, 2), torch.rand(6)[::2], torch.ones(3, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"lcore\.attention_paged: inv_freq must be"):
            ops.attention_paged(**attend_arguments(), inv_freq=inv_freq)


def test_rotations_are_compared_by_their_numbers():
    assert Rotation([0.1, 2]) == Rotation(torch.tensor([0.1, 2])) != Rotation([0.1, 2], 1.1)
    same = lcore.PagedCache(2, 2, 32, rope=[PARTIAL, Rotation(PARTIAL.frequencies, 1.2)])
    assert same.rope == PARTIAL and lcore.PagedCache(2, 2, 32, rope=[None, None]).rope is None
