"""lcore.mlstm against its recurrence: values, gradients, gates of any size, and what must not change its bits."""

import itertools
import math

import pytest
import torch
from linear_attention_cases import FLOATS, LENGTHS, offsets, random_inputs
from tolerance import assert_close, assert_same_bits

import lcore
from lcore import reference

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("C", "n", "m")


def random_mlstm(shape, key_dim=9, value_dim=17, *, heads=2, heads_v=2, dtype=torch.float32, size=2.0):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = random_inputs(
        "gated_linear_attention", shape, key_dim, value_dim, heads=heads, heads_v=heads_v, dtype=dtype
    )
    inputs.pop("g")
    gates = (*shape, heads_v)
    return {**inputs, "i": size * torch.randn(gates, dtype=wide), "f": size * torch.randn(gates, dtype=wide)}


def random_state(inputs, sequences):
    """n as large as C's columns, so that neither branch of the divisor is rare."""
    q, v, wide = inputs["q"], inputs["v"], inputs["i"].dtype
    heads = (sequences, v.shape[-2])
    return (
        torch.randn(*heads, q.shape[-1], v.shape[-1], dtype=wide),
        torch.randn(*heads, q.shape[-1], dtype=wide),
        torch.randn(heads, dtype=wide),
    )


def run(module, tensors, state=None, **arguments):
    out, final = module.mlstm(**tensors, initial_state=state, return_final_state=True, **arguments)
    return dict(zip(("out", *NAMES), (out, *final), strict=True))


def gradients(module, tensors, state, grads, dtype=None, **arguments):
    """Results, and gradients of <result, grads> for those that grads has, by name."""
    cast = [x if dtype is None else x.to(dtype) for x in (*tensors.values(), *(state or ()))]
    leaves = [x.detach().requires_grad_() for x in cast]
    named = dict(zip(tensors, leaves, strict=False))
    results = run(module, named, tuple(leaves[len(tensors) :]) if state else None, **arguments)
    used = {name: x for name, x in results.items() if name in grads}
    found = torch.autograd.grad(
        list(used.values()), leaves, [grads[name].to(x.dtype) for name, x in used.items()], materialize_grads=True
    )
    names = [*tensors, *(f"initial {name}" for name in NAMES)]
    return {name: x.detach() for name, x in results.items()}, dict(zip(names, found, strict=False))


def check(tensors, state=None, *, floor=4.0, slack_ulp=32, of=("out", *NAMES), **arguments):
    """Results and gradients against the recurrence in float64. Where n^T q is small, a gradient grows with the square
    of 1 / |n^T q|, and what rounding does to n^T q with it.
    """
    dtype, wide = tensors["q"].dtype, tensors["i"].dtype
    shapes = run(lcore, tensors, state, **arguments)
    grads = {name: torch.randn_like(x) for name, x in shapes.items() if name in of}
    got, want, working = (
        gradients(module, tensors, state, grads, kind, **arguments)
        for module, kind in ((lcore, None), (reference, torch.float64), (reference, wide))
    )
    assert got[0]["out"].dtype == dtype
    for part in (0, 1):
        for name, x in got[part].items():
            rounded = x.dtype != wide
            slack = None if rounded or wide == torch.float64 else slack_ulp
            size = 0.05 * floor if rounded else floor
            what = f"gradient of {name}" if part else name
            assert_close(x, want[part][name], working[part][name].to(x.dtype), what, slack_ulp=slack, floor=size)
    return got[0]


def tokens(inputs, which):
    return {name: x[:, which] for name, x in inputs.items()}


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length):
    inputs = random_mlstm((2, length))
    check(inputs, random_state(inputs, 2))


@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (40, 100), (17, 128), (16, 512)])
def test_head_dims(dims):
    check(random_mlstm((1, 70), *dims), scale=0.3, slack_ulp=64)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype):
    inputs = random_mlstm((1, 70), dtype=dtype)
    check(inputs, random_state(inputs, 1))


@pytest.mark.parametrize("heads_v", [3, 12])
def test_grouped_heads(heads_v):
    check(random_mlstm((2, 66), heads=3, heads_v=heads_v))


@pytest.mark.parametrize("of", [("out",), ("C",), ("n",), ("m",)])
def test_gradient_of_one_result_only(of):
    inputs = random_mlstm((1, 90))
    check(inputs, random_state(inputs, 1), of=of)


@pytest.mark.parametrize("size", [0.0, 60.0])
def test_gates_of_any_size(size):
    """With 60, e^i alone would overflow and underflow."""
    inputs = random_mlstm((1, 150), size=size)
    check(inputs, random_state(inputs, 1), floor=10.0)


def test_an_input_gate_that_grows_and_one_that_falls():
    inputs = random_mlstm((1, 130))
    inputs["i"] = torch.linspace(-300, 300, 130)[None, :, None].repeat(1, 1, 2)
    inputs["i"][..., 1] = inputs["i"][..., 0].flip(1)
    out = check(inputs)["out"]
    assert out.isfinite().all()


def test_queries_that_see_nothing():
    inputs = random_mlstm((1, 70))
    inputs["i"] = inputs["i"] + 150.0
    inputs["q"][:, 10] = 0.0
    assert not run(lcore, inputs)["out"][:, 10].any()


def test_a_shift_of_the_state_changes_nothing():
    """C, n and m stand for e^m C and e^m n."""
    inputs = random_mlstm((1, 70), dtype=torch.float64)
    c, n, m = random_state(inputs, 1)
    want = run(lcore, inputs, (c, n, m))["out"]
    for shift in (-3.0, 5.0):
        got = run(lcore, inputs, (c * math.exp(-shift), n * math.exp(-shift), m + shift))["out"]
        torch.testing.assert_close(got, want)


def test_packed_sequences():
    lengths = [5, 0, 1, 64, 70, 2]
    inputs = random_mlstm((sum(lengths) + 3,))
    state = random_state(inputs, len(lengths))
    got = check(inputs, state, cu_seqlens=offsets(lengths))
    assert not got["out"][-3:].any()
    for name, x in zip(NAMES, state, strict=True):
        assert_same_bits(got[name][1], x[1])


def test_a_token_at_a_time_and_pieces():
    inputs = random_mlstm((2, 150))
    first = random_state(inputs, 2)
    want = run(lcore, inputs, first)
    exact = run(reference, {name: x.double() for name, x in inputs.items()}, tuple(x.double() for x in first))
    for cuts, same in (([0, 64, 128, 150], True), ([0, 50, 51, 150], False)):
        state, outs = first, []
        for begin, end in itertools.pairwise(cuts):
            part = run(lcore, tokens(inputs, slice(begin, end)), state)
            outs.append(part["out"])
            state = tuple(part[name] for name in NAMES)
        if same:
            assert_same_bits(torch.cat(outs, 1), want["out"])
            for name, x in zip(NAMES, state, strict=True):
                assert_same_bits(x, want[name])
        assert_close(torch.cat(outs, 1), exact["out"], want["out"], "pieces", slack_ulp=16, floor=4.0)
    state = tuple(x.clone() for x in first)
    outs = [lcore.mlstm_update(state, **tokens(inputs, t)) for t in range(150)]
    assert_close(torch.stack(outs, 1), exact["out"], want["out"], "out", slack_ulp=16, floor=4.0)
    for name, x in zip(NAMES, state, strict=True):
        assert_close(x, exact[name], want[name], name, slack_ulp=16, floor=4.0)


def test_update_by_slots():
    inputs = tokens(random_mlstm((3, 1)), 0)
    states = random_state(inputs, 5)
    want_states, got_states = tuple(x[[4, 1, 0]].clone() for x in states), tuple(x.clone() for x in states)
    want = lcore.mlstm_update(want_states, **inputs)
    got = lcore.mlstm_update(got_states, **inputs, state_indices=torch.tensor([4, -1, 0]))
    assert_same_bits(got[[0, 2]], want[[0, 2]])
    assert not got[1].any()
    for was, after, x in zip(states, want_states, got_states, strict=True):
        for slot, row in ((4, after[0]), (0, after[2]), (1, was[1]), (2, was[2]), (3, was[3])):
            assert_same_bits(x[slot], row)


def test_threads_and_strides(threads):
    """With 7 threads for 3 heads, columns of v are shared out."""
    inputs = random_mlstm((1, 150), 40, 100, heads=3, heads_v=3)
    views = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    state = random_state(inputs, 1)
    grads = {name: torch.randn_like(x) for name, x in run(lcore, inputs, state).items()}
    results = []
    for n, tensors in ((1, inputs), (2, inputs), (7, inputs), (1, views)):
        torch.set_num_threads(n)
        results.append([*run(lcore, tensors, state).values(), *gradients(lcore, tensors, state, grads)[1].values()])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("at", [0, 15, 63, 64, 99])
@pytest.mark.parametrize("name", ["q", "k", "v", "i", "f"])
def test_a_token_never_reaches_those_before_it(at, name):
    inputs = random_mlstm((1, 100))
    want = run(lcore, inputs)["out"]
    poisoned = {key: x.clone() for key, x in inputs.items()}
    poisoned[name][:, at, 0].view(-1)[0] = math.nan
    got = run(lcore, poisoned)["out"]
    assert_same_bits(got[:, :at], want[:, :at])
    assert_same_bits(got[:, :, 1], want[:, :, 1], "the other head")
    assert got[:, at:, 0].isnan().any()


def test_nan_in_one_packed_sequence_reaches_no_other():
    lengths = [70, 5, 66]
    inputs = random_mlstm((sum(lengths),))
    poisoned = {name: x.clone().index_fill_(0, torch.tensor([72]), math.nan) for name, x in inputs.items()}
    grads = {"out": torch.randn_like(inputs["v"])}
    others = [*range(70), *range(75, sum(lengths))]
    want, got = (gradients(lcore, x, None, grads, cu_seqlens=offsets(lengths)) for x in (inputs, poisoned))
    assert_same_bits(got[0]["out"][others], want[0]["out"][others])
    for name, x in got[1].items():
        assert_same_bits(x[others], want[1][name][others], f"gradient of {name}")


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    inputs = random_mlstm((7,) if packed else (2, 5), 3, 2, heads=1, dtype=torch.float64)
    state = random_state(inputs, 3 if packed else 2)
    cu_seqlens = offsets([3, 0, 4]) if packed else None

    def call(*values):
        return torch.ops.lcore.mlstm(*values[:5], 0.7, *values[5:], cu_seqlens)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (*inputs.values(), *state)])


def test_gradcheck_over_chunks():
    inputs = random_mlstm((1, 67), 2, 1, heads=1, heads_v=1, dtype=torch.float64)

    def call(*values):
        out, *state = torch.ops.lcore.mlstm(*values)
        return out[:, -1], *state

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()])


def test_opcheck_and_compile():
    inputs = {name: x.requires_grad_() for name, x in random_mlstm((2, 5), 3, 2).items()}
    state = random_state(inputs, 2)
    torch.library.opcheck(torch.ops.lcore.mlstm.default, (*inputs.values(), 0.5, *state))
    step = {name: x.detach() for name, x in tokens(inputs, 0).items()}
    clones = [tuple(x.clone() for x in state) for _ in range(3)]
    torch.library.opcheck(torch.ops.lcore.mlstm_update.default, (*clones[0], *step.values(), 0.5))
    torch.compiler.reset()
    compiled = torch.compile(lcore.mlstm, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(**inputs, initial_state=state), lcore.mlstm(**inputs, initial_state=state))
    update = torch.compile(lcore.mlstm_update, fullgraph=True, backend="aot_eager")
    assert_same_bits(update(clones[1], **step), lcore.mlstm_update(clones[2], **step))
    for x, y in zip(clones[1], clones[2], strict=True):
        assert_same_bits(x, y)


def test_errors():
    inputs = random_mlstm((2, 5))
    c, n, m = random_state(inputs, 2)
    for change, error, message in (
        ({"i": inputs["i"][..., :1]}, ValueError, r"i must have shape \(batch, len, heads_v\) = \(2, 5, 2\), got"),
        ({"f": inputs["f"].double()}, TypeError, "f must have dtype float32 or float16 or bfloat16, got float64"),
        ({"initial_state": c}, TypeError, "initial_state must be a tuple of C, n and m, got Tensor"),
        ({"initial_state": (c, n[:1], m)}, ValueError, r"n of initial_state must have shape \(sequences, heads_v, k"),
        ({"initial_state": (c, n, m.double())}, TypeError, "m of initial_state must have dtype float32, got float64"),
    ):
        with pytest.raises(error, match=rf"lcore\.mlstm: {message}"):
            lcore.mlstm(**{**inputs, **change})
    with pytest.raises(RuntimeError, match="an initial state has C, n and m"):
        torch.ops.lcore.mlstm(*inputs.values(), None, c)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        leaves = [x.requires_grad_() for x in inputs.values()]
        (grad,) = torch.autograd.grad(lcore.mlstm(*leaves).sum(), leaves[0], create_graph=True)
        torch.autograd.grad(grad.sum(), leaves[1])
