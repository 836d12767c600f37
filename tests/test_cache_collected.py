"""A cache that is closed while torch traces with tensors that hold nothing gives its pages back all the same."""

import gc
import weakref

import pytest
import torch
from cache_cases import all_pages_are_free, allocator_of
from torch._subclasses.fake_tensor import FakeTensorMode

import lcore


@pytest.mark.parametrize("options", [{"kv_format": "bf16"}, {"kv_format": "int4", "skip_layers": [0]}])
def test_while_torch_traces(options):
    cache = lcore.PagedCache(2, 2, 16, page_size=16, **options)
    for layer in range(2):
        cache.append(layer, *(torch.randn(1, 100, 2, 16).bfloat16() for _ in range(2)))
    fork, allocator = cache.fork(), allocator_of(cache)
    pool = cache._slots.pool
    gone = weakref.ref(fork)
    with FakeTensorMode():
        cache.close()
        del fork
        gc.collect()
    assert gone() is None and all_pages_are_free(allocator) and pool.member_bytes == 0
