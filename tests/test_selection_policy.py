"""A selection and a policy in one cache: what is kept is what the policy alone keeps, what is read is certified."""

import pytest
import torch
from cache_cases import assert_same_contents, random_kv
from policy_cases import CASES
from test_cache_memory import held_bytes
from tiny_model import greedy_by_hand, tiny_decoder
from tolerance import assert_same_bits

import lcore
from lcore import policies, selection
from lcore.generation import Generator
from lcore.positions import RopeConfig, Rotation

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KV_HEADS, DIM, PAGE = 6, 3, 16, 16
PROMPT = [(17 * i * i + 5 * i + 3) % 256 for i in range(500)]


def quest(budget, **options):
    return selection.Quest(budget, **{"dense_layers": 0, **options})


def new_cache(policy, select, kv_format="fp32", **options):
    sizes = {"dtype": torch.float32, "kv_format": kv_format, "page_size": PAGE}
    return lcore.PagedCache(2, KV_HEADS, DIM, policy=policy, select=select, **{**sizes, **options})


def feed(caches, new, batch=1, lengths=None):
    """The same tokens and queries for all; the outputs of each, layer by layer."""
    outs = []
    for layer in range(2):
        k, v = random_kv(batch, new, KV_HEADS, DIM)
        q = torch.randn(batch, new, HEADS, DIM)
        for cache in caches:
            cache.append(layer, k, v, lengths=lengths)
        outs.append([cache.attend(layer, q, lengths=lengths) for cache in caches])
    return outs


def misses_at_most_its_bound(cache):
    for layer in range(2):
        q = torch.randn(cache.batch_size, 1, HEADS, DIM)
        fork, whole = cache.fork(), cache.fork()
        fork.policy = whole.policy = None
        whole.select = None
        _, lse = fork.attend(layer, q, return_lse=True)
        _, full = whole.attend(layer, q, return_lse=True)
        assert (-torch.expm1((lse - full).double()) <= fork.dropped_mass(layer) + 1e-5).all()
        fresh = cache.fork()
        fresh.policy = None
        fresh._slots.forget_index()
        assert_same_bits(fresh.attend(layer, q), fork.attend(layer, q))
        for one in (fork, whole, fresh):
            one.close()


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_what_the_policy_keeps(name):
    """The policy sees the attention over all keys, though the output is over some."""
    if name == "duo":
        policy = policies.DuoAttention(torch.tensor([[True, False, False], [False, True, False]]), sinks=4, recent=90)
    else:
        policy = CASES[name][0](96)
    cache, alone = new_cache(policy, quest(3)), new_cache(policy, None)
    for new in (150, 40, *[1] * 40):
        (got, want), _ = feed([cache, alone], new)
        for layer in range(2):
            assert_same_contents(cache, alone, layer)
        if new > 1:
            assert_same_bits(got, want)
    assert not torch.equal(got, want), "reads a part"
    misses_at_most_its_bound(cache)
    assert cache.stats()["bytes"] == held_bytes(cache)


@pytest.mark.parametrize("kv_format", ["int8", "int4", "fp8", ("int4", "fp32")])
def test_whole_pages_are_dropped_from_codes(kv_format):
    policy = policies.H2O(96)
    cache, alone = (new_cache(policy, select, kv_format) for select in (quest(3), None))
    for new in (150, *[1] * 40):
        feed([cache, alone], new)
        for layer in range(2):
            assert torch.equal(cache.lengths(layer), alone.lengths(layer))
    assert int(cache.lengths(0).max()) <= 96 + PAGE + PAGE
    misses_at_most_its_bound(cache)


def test_rows_of_a_batch():
    policy, lengths = policies.TOVA(70), torch.tensor([200, 30, 121])
    cache, alone = (new_cache(policy, select, batch_size=3) for select in (quest(2), None))
    feed([cache, alone], 200, 3, lengths)
    for counts in ([1, 1, 0], [0, 1, 1], *[[1, 1, 1]] * 20):
        feed([cache, alone], 1, 3, torch.tensor(counts))
        for layer in range(2):
            assert torch.equal(cache.lengths(layer), alone.lengths(layer))
    misses_at_most_its_bound(cache)


@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
def test_places_close_up(kv_format):
    """A policy that re-indexes: pages that moved have other bounds."""
    policy = policies.StreamingLLM(96, reindex=True)
    rope = Rotation.of(RopeConfig(), DIM)
    cache, alone = (new_cache(policy, select, kv_format, rope=rope) for select in (quest(3), None))
    for new in (150, 40, *[1] * 40):
        feed([cache, alone], new)
        for layer in range(2):
            assert torch.equal(cache.lengths(layer), alone.lengths(layer))
        misses_at_most_its_bound(cache)


class Watched(selection.Quest):
    """Says which pages it has been asked to summarize."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.asked = []

    def summarize(self, pages, first, last):
        self.asked.append((first, last))
        return super().summarize(pages, first, last)


def test_only_pages_that_changed_are_summarized_again():
    select = Watched(3, dense_layers=0)
    cache = new_cache(None, select)
    feed([cache], 200)
    keep = torch.ones(1, KV_HEADS, 200, dtype=torch.bool)
    keep[..., 100:104] = False
    keep[0, 1, 80] = False
    cache.attend(0, torch.randn(1, 1, HEADS, DIM))
    cache.evict(0, keep)
    select.asked.clear()
    for expected in ([(5, 11)], []):
        cache.attend(0, torch.randn(1, 1, HEADS, DIM))
        assert select.asked == expected
        select.asked.clear()
    misses_at_most_its_bound(cache)


def test_observed_attention_moves_with_its_keys():
    cache = new_cache(None, selection.InfLLM(4, recent=1, sinks=1, local_tokens=32))
    feed([cache], 100)
    feed([cache], 60)
    before = cache._slots.index.mass[0].clone()
    keep = torch.rand(1, KV_HEADS, 160) > 0.4
    cache.evict(0, keep)
    after = cache._slots.index.mass[0]
    for head in range(KV_HEADS):
        count = int(keep[0, head].sum())
        assert torch.equal(after[0, head, :count], before[0, head][keep[0, head]])
        assert not after[0, head, count:].any()
    assert before.count_nonzero() > after.count_nonzero() > 0


@pytest.mark.parametrize("policy", [policies.H2O(160), policies.StreamingLLM(160, reindex=True)])
@pytest.mark.parametrize("kv_format", [None, "int4"])
def test_the_generator_reads_a_part_of_what_is_kept(policy, kv_format):
    model = tiny_decoder()
    select = quest(2)
    options = {"policy": policy, "kv_format": kv_format}
    ids, cache = greedy_by_hand(model, PROMPT, 64, 80, select=select, **options)
    generator = Generator(model, prefill_chunk=64, select=select, **options)
    done = generator.generate(PROMPT, max_new_tokens=80)
    assert done.tokens == ids and 0 < done.stats.dropped_mass <= 1
    for layer in range(2):
        assert torch.equal(generator.cache.lengths(layer), cache.lengths(layer))
    assert int(cache.lengths(0).max()) <= 160 + 64 + 64
    assert ids != Generator(model, prefill_chunk=64, **options).generate(PROMPT, max_new_tokens=80).tokens
