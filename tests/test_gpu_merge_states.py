"""merge_states on a GPU: the CPU's tests with tensors there, and what only a GPU has: streams and graphs."""

import pytest
import torch
from test_merge_states import *  # noqa: F403
from test_merge_states import random_states
from tolerance import assert_same_bits

import lcore

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_gpu(device):
    with device:
        yield


def test_the_bits_are_those_of_any_batch():
    states = random_states((3, 70, 2, 128), torch.bfloat16)
    whole = lcore.merge_states(*states)
    for i in range(3):
        one = lcore.merge_states(*(x[i : i + 1].contiguous() for x in states))
        for x, y in zip(one, whole, strict=True):
            assert_same_bits(x, y[i : i + 1])


def test_the_current_stream():
    states = random_states((2, 4096, 8, 128))
    want = lcore.merge_states(*states)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = [x.clone() for x in states]  # behind the sleep: another stream would read them too early
        got = lcore.merge_states(*late)
    stream.synchronize()
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)


def test_a_graph():
    states = random_states((1, 64, 4, 64), torch.float16)
    lcore.merge_states(*states)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = lcore.merge_states(*states)
    for x in states:
        x.copy_(torch.randn_like(x))
    graph.replay()
    for x, y in zip(got, lcore.merge_states(*states), strict=True):
        assert_same_bits(x, y)
