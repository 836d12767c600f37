"""Any order of append, attend, evict, fork, crop, save, load, trim and close over coded pages, against plain torch."""

import os
import tempfile

import hypothesis.strategies as st
import pytest
import torch
from cache_cases import Twins, all_pages_are_free, allocator_of, poison
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_cache_formats import check as check_attention
from test_cache_memory import held_bytes

import lcore

FORMATS = ["fp8", "int8", "int4", "int2", ("int8", "bf16"), ("fp32", "int4"), ("int4", "fp8")]
MOST_FORKS = 3
SIZE = 16


class CodedMachine(RuleBasedStateMachine):
    """A family of forks, each beside its model."""

    @initialize(
        layers=st.integers(1, 2),
        head_dims=st.sampled_from([(8, 8), (5, 9), (16, 3)]),
        batch=st.integers(1, 2),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        kv_format=st.sampled_from(FORMATS),
        skip=st.booleans(),
        prefix=st.sampled_from([0, 0, 1, 2 * SIZE]),
        start=st.sampled_from([53, 97, 0]),
        seed=st.integers(0, 2**31),
    )
    def begin(self, layers, head_dims, batch, dtype, kv_format, skip, prefix, start, seed):
        torch.manual_seed(seed)
        self.family = [
            Twins(layers, 2, head_dims[0], head_dim_v=head_dims[1], batch_size=batch, dtype=dtype, page_size=SIZE,
                  kv_format=kv_format, skip_layers=(layers - 1,) if skip else (), fp_prefix=prefix)
        ]  # fmt: skip
        self.batch, self.prefix = batch, -(-prefix // SIZE) * SIZE
        self.allocators = {id(allocator_of(self.family[0].cache)): allocator_of(self.family[0].cache)}
        self.family[0].append(start)

    def pick(self, data):
        return self.family[data.draw(st.integers(0, len(self.family) - 1), label="cache")]

    def lengths(self, data, most):
        if data.draw(st.booleans(), label="all rows full"):
            return None
        rows = st.lists(st.integers(0, most), min_size=self.batch, max_size=self.batch)
        return torch.tensor(data.draw(rows, label="lengths"))

    def compare(self, twins, new, layer, lengths=None, group=2):
        q = torch.randn(self.batch, new, twins.kv_heads * group, twins.head_dim).to(twins.dtype)
        if new == 0 or not any(len(head[1]) for row in twins.model.tokens[layer] for head in row):
            return
        check_attention(twins.cache, twins.model, q, lengths, layer=layer)

    @rule(data=st.data(), new=st.sampled_from([0, 1, 2, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 5]))
    def append_and_attend(self, data, new):
        twins = self.pick(data)
        lengths = self.lengths(data, new)
        twins.append(new, lengths)
        for layer in range(twins.layers):
            self.compare(twins, new, layer, lengths)

    @rule(data=st.data())
    def append_to_one_layer(self, data):
        twins = self.pick(data)
        layer = data.draw(st.integers(0, twins.layers - 1), label="layer")
        twins.append(data.draw(st.integers(0, 20), label="tokens"), None, layer)

    @rule(data=st.data(), pages=st.booleans())
    def crop(self, data, pages):
        """A page is given up whole, or what came last is taken back; anything else is refused and changes nothing."""
        twins = self.pick(data)
        longest = int(twins.cache.seen().max())
        n = max(longest - data.draw(st.integers(0, longest + 1), label="taken"), 0)
        n = n // SIZE * SIZE if pages else n
        before = [twins.cache.lengths(layer) for layer in range(twins.layers)]
        possible = twins.model.can_crop(n)
        try:
            twins.cache.crop(n)
        except ValueError as error:
            assert ("n must be 0 or >=" in str(error)) == (not possible)
            refused = "end at whole pages" in str(error)
            assert refused or not possible
            for layer, lengths in enumerate(before):
                assert torch.equal(twins.cache.lengths(layer), lengths)
            return
        assert possible
        twins.model.crop(n)
        for layer in range(twins.layers):
            self.compare(twins, min(1, int(twins.model.unbroken(layer).min())), layer)

    @rule(data=st.data(), share=st.sampled_from([0.0, 0.3, 0.9]))
    def evict(self, data, share):
        twins = self.pick(data)
        layer = data.draw(st.integers(0, twins.layers - 1), label="layer")
        lengths = twins.cache.lengths(layer)
        longest = int(lengths.max())
        keep = (torch.rand(*lengths.shape, longest // SIZE + 1) >= share).repeat_interleave(SIZE, -1)[..., :longest]
        keep[..., : self.prefix] = True
        keep |= torch.arange(longest) >= (lengths // SIZE * SIZE)[..., None]
        twins.cache.evict(layer, keep)
        twins.model.evict(layer, keep)

    @rule(data=st.data())
    def trim(self, data):
        twins = self.pick(data)
        twins.cache.trim()
        assert allocator_of(twins.cache).free_count == 0

    @precondition(lambda self: len(self.family) < MOST_FORKS)
    @rule(data=st.data())
    def fork(self, data):
        self.family.append(self.pick(data).fork())

    @precondition(lambda self: len(self.family) > 1)
    @rule(data=st.data(), close=st.booleans())
    def drop(self, data, close):
        twins = self.family.pop(data.draw(st.integers(0, len(self.family) - 1), label="cache"))
        if close:
            twins.cache.close()

    @rule(data=st.data())
    def save_and_load(self, data):
        """The cache goes on as the one that the file gives, in a pool of its own."""
        place = data.draw(st.integers(0, len(self.family) - 1), label="cache")
        twins = self.family[place]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.cache")
            twins.cache.save(path)
            loaded = twins.fork()
            loaded.cache = lcore.PagedCache.load(path)
        self.family[place] = loaded
        self.allocators[id(allocator_of(loaded.cache))] = allocator_of(loaded.cache)

    @rule()
    def poison(self):
        for allocator in self.allocators.values():
            caches = [twins.cache for twins in self.family if allocator_of(twins.cache) is allocator]
            if caches and caches[0]._slots.layout.plain.parts == 1:
                poison(*caches)

    @invariant()
    def lengths_and_pages_add_up(self):
        if not hasattr(self, "family"):
            return
        for key, allocator in self.allocators.items():
            references = {}
            for twins in self.family:
                if id(allocator_of(twins.cache)) != key:
                    continue
                twins.check_lengths()
                assert twins.cache.stats()["bytes"] == held_bytes(twins.cache)
                slots = twins.cache._slots
                for table, count in zip(slots.table.flatten(0, 2), slots.entries().flatten().tolist(), strict=True):
                    for page in table[:count].tolist():
                        references[page] = references.get(page, 0) + 1
            assert allocator.num_pages - allocator.free_count == len(references)
            assert all(allocator.refcount(page) == n for page, n in references.items())

    def teardown(self):
        if hasattr(self, "family"):
            self.family.clear()
            assert all(all_pages_are_free(allocator) for allocator in self.allocators.values())


CodedMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = pytest.mark.usefixtures("one_thread")(CodedMachine.TestCase)
