"""Any order of append, attend, evict, fork, crop, trim and close, against the model in plain torch."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from cache_cases import Twins, all_pages_are_free, allocator_of, assert_same_contents, inside, poison, pool_of
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tolerance import assert_same_bits

FORMATS = st.sampled_from(["fp32", "fp16", "bf16"])
MOST_FORKS = 4


class CacheMachine(RuleBasedStateMachine):
    """A family of forks, each beside its model."""

    @initialize(
        layers=st.integers(1, 2),
        kv_heads=st.integers(1, 2),
        head_dims=st.sampled_from([(8, 8), (5, 9), (16, 3)]),
        batch=st.integers(1, 3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        kv_format=st.tuples(FORMATS, FORMATS),
        page_size=st.sampled_from([3, 16, 1, 48]),
        start=st.sampled_from([53, 97, 0]),
        seed=st.integers(0, 2**31),
    )
    def begin(self, layers, kv_heads, head_dims, batch, dtype, kv_format, page_size, start, seed):
        torch.manual_seed(seed)
        self.family = [
            Twins(layers, kv_heads, head_dims[0], head_dim_v=head_dims[1], batch_size=batch, dtype=dtype,
                  kv_format=kv_format, page_size=page_size)
        ]  # fmt: skip
        self.batch, self.page_size = batch, page_size
        self.allocator = allocator_of(self.family[0].cache)
        self.family[0].append(start)

    def pick(self, data):
        return self.family[data.draw(st.integers(0, len(self.family) - 1), label="fork")]

    def tokens(self, data):
        """Few, or up to a page border, or over several pages."""
        size = self.page_size
        sizes = {0, 1, 2, size - 1, size, size + 1, 2 * size + 5}
        return data.draw(st.sampled_from(sorted(n for n in sizes if n <= 60)), label="tokens")

    def lengths(self, data, most):
        if data.draw(st.booleans(), label="all rows full"):
            return None
        rows = st.lists(st.integers(0, most), min_size=self.batch, max_size=self.batch)
        return torch.tensor(data.draw(rows, label="lengths"))

    @rule(data=st.data(), group=st.integers(1, 3))
    def append_and_attend(self, data, group):
        twins, new = self.pick(data), self.tokens(data)
        lengths = self.lengths(data, new)
        twins.append(new, lengths)
        for layer in range(twins.layers):
            twins.check(new, group, lengths, layer)

    @rule(data=st.data())
    def append_to_one_layer(self, data):
        twins = self.pick(data)
        layer = data.draw(st.integers(0, twins.layers - 1), label="layer")
        new = self.tokens(data)
        twins.append(new, self.lengths(data, new), layer)

    @rule(data=st.data())
    def attend_again(self, data):
        twins = self.pick(data)
        layer = data.draw(st.integers(0, twins.layers - 1), label="layer")
        held = int(twins.model.unbroken(layer).min())
        twins.check(data.draw(st.integers(0, min(held, 20)), label="queries"), 2, None, layer)

    @rule(data=st.data(), per_row=st.booleans())
    def crop(self, data, per_row):
        twins = self.pick(data)
        longest = int(twins.cache.seen().max())
        numbers = st.integers(0, longest + 1).map(lambda dropped: max(longest - dropped, 0))
        rows = st.lists(numbers, min_size=self.batch, max_size=self.batch).map(torch.tensor)
        tokens = data.draw(rows if per_row else numbers, label="tokens")
        if not twins.model.can_crop(tokens):
            with pytest.raises(ValueError, match="n must be 0 or >="):
                twins.cache.crop(tokens)
            return
        twins.crop(tokens)
        twins.check(min(1, int(twins.model.unbroken(0).min())))

    @rule(data=st.data(), share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    def evict(self, data, share):
        twins = self.pick(data)
        layer = data.draw(st.integers(0, twins.layers - 1), label="layer")
        twins.evict(share, layer)

    @rule(data=st.data())
    def trim(self, data):
        twins = self.pick(data)
        twins.cache.trim()
        assert pool_of(twins.cache).shape[0] == self.allocator.num_pages and self.allocator.free_count == 0

    @precondition(lambda self: len(self.family) < MOST_FORKS)
    @rule(data=st.data())
    def fork(self, data):
        twins = self.pick(data)
        self.family.append(twins.fork())
        assert_same_contents(twins.cache, self.family[-1].cache)

    @precondition(lambda self: len(self.family) > 1)
    @rule(data=st.data(), close=st.booleans())
    def drop(self, data, close):
        twins = self.family.pop(data.draw(st.integers(0, len(self.family) - 1), label="fork"))
        if close:
            twins.cache.close()

    @rule()
    def poison(self):
        poison(*(twins.cache for twins in self.family))

    @rule(data=st.data())
    def reserve(self, data):
        self.pick(data).cache.reserve(data.draw(st.integers(0, 100), label="tokens"))

    @invariant()
    def lengths_and_pages_add_up(self):
        if not hasattr(self, "family"):
            return
        references = {}
        for twins in self.family:
            twins.check_lengths()
            for layer in range(twins.layers):
                table, lengths, _, _ = inside(twins.cache, layer)
                for slot, length in zip(table.flatten(0, 1), lengths.flatten().tolist(), strict=True):
                    for page in slot[: length // self.page_size].tolist():
                        references[page] = references.get(page, 0) + 1
        assert self.allocator.num_pages - self.allocator.free_count == len(references)
        assert all(self.allocator.refcount(page) == n for page, n in references.items())
        assert pool_of(self.family[0].cache).shape[0] == self.allocator.num_pages

    def teardown(self):
        if hasattr(self, "family"):
            self.family.clear()
            assert all_pages_are_free(self.allocator)


CacheMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = CacheMachine.TestCase


def test_layers_of_unequal_length_are_repaired_by_crop():
    twins = Twins(layers=3, batch_size=2, page_size=16)
    twins.append(20, torch.tensor([20, 14]))
    twins.append(5, layer=0)
    twins.append(5, layer=1)
    twins.check_lengths()
    twins.crop(torch.tensor([20, 14]))
    twins.check_lengths()
    assert [twins.cache.seen(i).tolist() for i in range(3)] == [[20, 14]] * 3
    twins.append(15)
    for layer in range(3):
        twins.check(15, 2, layer=layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("keep", [0, 1, 15, 16, 17, 31, 33, 47, 48])
def test_crop_into_a_page_is_as_if_the_rest_had_not_come(keep, kv_format, dtype):
    twins = Twins(kv_heads=2, page_size=16, dtype=dtype, kv_format=kv_format, batch_size=2)
    k, v = torch.randn(2, 2, 48, 2, 16).to(dtype).unbind()
    if kv_format == "bf16" and dtype == torch.float16:
        k[0, 2, 1, 3], v[0, 1, 0, 7] = 65504, -65504  # 65536 in a bf16 page, which float16 has not
    cropped, fresh = twins.cache, twins.fork().cache
    cropped.append(0, k, v)
    cropped.crop(keep)
    fresh.append(0, k[:, :keep], v[:, :keep])
    assert torch.equal(cropped.lengths(0), fresh.lengths(0))
    if twins.cache.kv_format == ("fp32",) * 2 or kv_format == {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
        dtype
    ):
        assert_same_contents(cropped, fresh)  # no format has rounded: the tails too are those that they were
    # Coded again, the kept tokens give the same bytes.
    for cache in (cropped, fresh):
        cache.append(0, k[:, keep:], v[:, keep:])
    assert_same_contents(cropped, fresh)


def test_crop_by_row():
    twins = Twins(batch_size=4, page_size=16, layers=2)
    twins.append(50)
    twins.crop(torch.tensor([0, 17, 50, 70]))
    twins.check_lengths()
    assert twins.cache.lengths(1)[:, 0].tolist() == [0, 17, 50, 50]
    twins.crop(torch.tensor([9, 16, 33, 48], dtype=torch.int32))
    twins.check_lengths()
    twins.append(3)
    twins.check(3, layer=1)


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_forks_of_forks_dropped_in_any_order(order):
    root = Twins(batch_size=2, page_size=16, layers=2)
    allocator = allocator_of(root.cache)
    root.append(40)
    child = root.fork()
    child.append(25)
    grandchild = child.fork()
    child.crop(37)
    grandchild.append(7)
    family = [root, child, grandchild, root.fork()]
    del root, child, grandchild
    for count, i in enumerate(order):
        family[i].append(9)
        family[i].check(9, 2, layer=1)
        family[i] = None
        for twins in family:
            if twins is not None:
                twins.check(5, 2, layer=0)
        assert (count == 3) == all_pages_are_free(allocator)


def test_a_fork_goes_its_own_way():
    root = Twins(page_size=16)
    root.append(39)
    fork = root.fork()
    shared = inside(root.cache)[0][0, :, :2].flatten().tolist()
    assert [allocator_of(root.cache).refcount(page) for page in shared] == [2] * 4
    before = pool_of(root.cache)[shared].clone()
    fork.append(30)
    root.append(12)
    fork.check(30)
    root.check(12)
    assert torch.equal(pool_of(root.cache)[shared], before)
    assert pool_of(root.cache) is pool_of(fork.cache)


def test_the_pool_grows_under_forks():
    root = Twins(page_size=16)
    root.append(33)
    forks = [root.fork() for _ in range(3)]
    for step in range(4):
        for twins in (root, *forks):
            twins.append(40 + step)
            twins.check(40 + step, 2)
    first = forks[0].cache.attend(0, torch.ones(1, 1, 2, 16))
    forks[1].append(300)
    assert_same_bits(forks[0].cache.attend(0, torch.ones(1, 1, 2, 16)), first)
