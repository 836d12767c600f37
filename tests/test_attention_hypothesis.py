"""Random calls of lcore.attention in any memory layout against the float64 formula; every run draws the same calls."""

import math
from typing import NamedTuple

import torch
from attention_cases import FLOATS, check_backward, check_forward, random_packed, random_qkv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_same_bits
from torch import Tensor

import lcore


def examples(count):
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class View(NamedTuple):
    """How a tensor lies in memory: a general as_strided view."""

    order: tuple[int, ...]  # dimensions, the slowest first
    steps: tuple[int, ...]  # of each dimension, only every such element is used
    offset: int  # elements before the first
    expanded: frozenset[int]  # dimensions of stride 0

    def place(self, x: Tensor) -> Tensor:
        """A view with x's shape, in memory that is NaN wherever the view does not look; x's values, expanded."""
        kept = [1 if d in self.expanded else n for d, n in enumerate(x.shape)]
        strides, room = [0] * x.dim(), 1
        for d in reversed(self.order):
            strides[d] = room * self.steps[d]
            room *= max(kept[d], 1) * self.steps[d]
        memory = torch.full((self.offset + room,), math.nan, dtype=x.dtype)
        view = memory.as_strided(kept, strides, self.offset)
        return view.copy_(x[tuple(slice(n) for n in kept)]).expand(x.shape)


def views(rank, may_expand):
    steps = st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=rank, max_size=rank).map(tuple)
    expanded = st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from(may_expand), max_size=len(may_expand)))
    return st.builds(View, st.permutations(range(rank)).map(tuple), steps, st.integers(0, 9), expanded)


# Both sides of vectors, tiles and blocks as they are or may become; 0 is an empty sequence.
LENGTHS = st.one_of(
    st.integers(0, 9),
    st.integers(10, 330),
    st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 143, 145, 191, 192, 193, 255, 257]),
)
HEAD_DIMS = st.one_of(st.integers(1, 160), st.sampled_from([8, 16, 32, 64, 80, 96, 128]))


@st.composite
def calls(draw, longest, strides=True):
    """q, k, v, the arguments, and a strategy for views of q's shape."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 4, 5, 7]))
    heads = kv_heads * group
    head_dim = draw(HEAD_DIMS)
    head_dim_v = draw(st.one_of(st.just(head_dim), HEAD_DIMS))
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "head_dim_v": head_dim_v}
    sizes["dtype"] = draw(st.sampled_from(FLOATS))
    lengths = LENGTHS.filter(lambda n: n <= longest)
    arguments = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        rows = draw(st.integers(1, 3))
        q, k, v = random_qkv(draw(lengths), draw(lengths), batch=rows, **sizes)
    else:
        pairs = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4))
        rows = len(pairs)
        q, k, v, offsets = random_packed([a for a, _ in pairs], [b for _, b in pairs], draw(st.integers(0, 3)), **sizes)
        arguments.update(offsets)
    if draw(st.booleans()):
        sides = st.one_of(st.just(-1), st.integers(0, 20), st.integers(0, longest + 20))
        arguments["window_size"] = (draw(sides), draw(sides))
    if draw(st.booleans()):
        arguments["softcap"] = draw(st.floats(0.5, 50))
    if draw(st.booleans()):
        arguments["softmax_scale"] = draw(st.floats(-1.5, 1.5)) / math.sqrt(head_dim)
    if draw(st.booleans()):
        arguments["sinks"] = torch.randn(heads) * 3
    if draw(st.booleans()):
        arguments["alibi_slopes"] = torch.rand(heads) if draw(st.booleans()) else torch.rand(rows, heads)
    may_expand = [q.dim() - 2, 0] if q.dim() == 4 else [q.dim() - 2]  # heads; rows of the batch
    like_q = views(q.dim(), may_expand) if strides else st.just(None)
    if strides:
        q, k, v = (draw(like_q).place(x) for x in (q, k, v))
    return q, k, v, arguments, like_q


@examples(150)
@given(calls(longest=330))
def test_values(call):
    q, k, v, arguments, _ = call
    out, lse = check_forward(q, k, v, **arguments)
    dense = lcore.attention(*(x.contiguous() for x in (q, k, v)), **arguments, return_lse=True)
    assert_same_bits(out, dense[0], "strides change out")
    assert_same_bits(lse, dense[1], "strides change lse")


@examples(120)
@given(calls(longest=260), st.data())
def test_gradients(call, data):
    q, k, v, arguments, like_q = call
    dout = data.draw(like_q).place(torch.randn(*q.shape[:-1], v.shape[-1]).to(q.dtype))
    check_backward(q, k, v, dout=dout, with_lse=data.draw(st.booleans()), **arguments)


@examples(150)
@given(calls(longest=330, strides=False), st.data())
def test_a_piece_of_the_rows_has_the_bits_of_the_whole(call, data):
    """Causal rows [begin, end) against the keys up to their last: a chunk of a prompt, a few new tokens, or one."""
    q, k, v, arguments, _ = call
    arguments["causal"] = True
    if q.dim() == 3:  # a packing of one sequence, without its tail
        q, k, v = (x[None] for x in (q, k, v))
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            del arguments[name]
        if "alibi_slopes" in arguments:
            arguments["alibi_slopes"] = arguments["alibi_slopes"].reshape(-1, q.shape[2])[0]
    out, lse = lcore.attention(q, k, v, **arguments, return_lse=True)
    seq_q, seq_k = q.shape[1], k.shape[1]
    begin = data.draw(st.integers(0, seq_q))
    new = data.draw(st.one_of(st.integers(0, 8), st.integers(0, 70), st.integers(0, 330)))
    end = min(begin + new, seq_q)
    seen = seq_k - seq_q + end
    if seen < 0:  # rows that stand before every key
        assert not out[:, begin:end].any()
        return
    piece = lcore.attention(q[:, begin:end], k[:, :seen], v[:, :seen], **arguments, return_lse=True)
    assert_same_bits(piece[0], out[:, begin:end], f"rows {begin}:{end}")
    assert_same_bits(piece[1], lse[:, :, begin:end], f"lse of rows {begin}:{end}")
