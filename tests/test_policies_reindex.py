"""Policies that re-index: StreamingLLM's positions, ragged heads, scores over keys rotated to their places."""

import pytest
import torch
from cache_cases import random_kv
from policy_cases import held_by, positions
from tolerance import assert_close

import lcore
from lcore import policies, reference
from lcore.positions import Rotation

ROPE = Rotation(torch.rand(6, generator=torch.Generator().manual_seed(3)) * 2, 1.1)
KV_HEADS, GROUP, DIM = 2, 2, 16

pytestmark = pytest.mark.usefixtures("one_thread")


def new_cache(policy, batch=1, **options):
    options = {"dtype": torch.float32, "kv_format": "fp32", "page_size": 16, **options}
    return lcore.PagedCache(1, KV_HEADS, DIM, batch_size=batch, policy=policy, rope=ROPE, **options)


def turn(x, first):
    """x (n, heads, dim) at positions first, first + 1, ..."""
    places = first + torch.arange(len(x))
    return reference.rope(x[None], places, ROPE.frequencies, attention_scaling=ROPE.attention_scaling)


def attention_over_held(k, v, q):
    """The last queries q (n, group, dim) of a head over what it holds, at the places in the cache; in q's precision."""
    k, v = k.to(q.dtype)[:, None], v.to(q.dtype)[None, :, None]
    return reference.attention(turn(q, len(k) - len(q)), turn(k, 0), v, causal=True)[0][0]


class Text:
    """A text of random tokens, fed to a cache; every output is compared with the formula over what was kept."""

    def __init__(self, cache, tokens=600):
        self.cache, self.fed = cache, 0
        self.k, self.v = random_kv(1, tokens, KV_HEADS, DIM)
        self.held = [[] for _ in range(KV_HEADS)]

    def feed(self, new):
        part = slice(self.fed, self.fed + new)
        self.held = [[*held, *range(part.start, part.stop)] for held in self.held]
        self.fed += new
        q = torch.randn(1, new, KV_HEADS * GROUP, DIM)
        self.cache.append(0, self.k[:, part], self.v[:, part])
        got = self.cache.attend(0, q)[0]
        for h, held in enumerate(self.held):
            heads = slice(h * GROUP, (h + 1) * GROUP)
            k, v = self.k[0, held, h], self.v[0, held, h]
            want, working = (attention_over_held(k, v, q[0, :, heads].to(t)) for t in (torch.float64, torch.float32))
            assert_close(got[:, heads], want, working, f"head {h} after {self.fed}", slack_ulp=16)
        self.held = [positions(held_by(self.cache, 0, 0, h)[0], self.k[0, :, h]) for h in range(KV_HEADS)]


def test_streaming_llm():
    """Sinks and the last tokens stay, and stand at 0, 1, 2, ...: no position is larger than what is held."""
    text = Text(new_cache(policies.StreamingLLM(40, sinks=3, slack=8, reindex=True)))
    for new in (100, 1, 1, 60, *[1] * 30, 7):
        text.feed(new)
        kept = len(text.held[0])
        assert 40 <= kept <= 48
        assert text.held == [[*range(3), *range(text.fed - kept + 3, text.fed)]] * KV_HEADS
    assert text.cache.seen().tolist() == [text.fed]


def test_what_is_read_depends_on_what_is_held_alone():
    """Two texts with the same sinks and the same end, of very different lengths, have the same bits."""
    k, v = random_kv(1, 900, KV_HEADS, DIM)
    q = torch.randn(1, 1, KV_HEADS * GROUP, DIM)
    outputs = []
    for skipped in (0, 64, 777):
        cache = new_cache(policies.StreamingLLM(60, sinks=4, slack=0, reindex=True))
        for part in ([0, 1, 2, 3], range(820 - skipped, 820), range(820, 900)):
            for token in part:
                cache.append(0, k[:, [token]], v[:, [token]])
                out = cache.attend(0, q)
        outputs.append(out)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "policy",
    [
        policies.H2O(40, reindex=True),
        policies.AdaKV(policies.SnapKV(50, window=8, reindex=True), alpha=0.2),
        policies.TOVA(40, slack=0, reindex=True),
        policies.KeyDiff(40, sinks=2, window=5, reindex=True),
        policies.DuoAttention(torch.tensor([[True, False]]), sinks=4, recent=20, reindex=True),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_others_close_up_too(policy):
    text = Text(new_cache(policy))
    for new in (100, 1, 40, *[1] * 20):
        text.feed(new)
    lengths = text.cache.lengths(0)[0].tolist()
    assert min(lengths) < text.fed / 2
    assert policy.reindex


def test_attention_mass_is_of_keys_at_their_places():
    """H2O keeps those that the rotated scores favour, not those of the keys as stored."""
    cache = new_cache(policies.H2O(30, window=4, reindex=True))
    text = Text(cache, 90)
    q = torch.randn(1, 90, KV_HEADS * GROUP, DIM)
    cache.append(0, text.k, text.v)
    cache.attend(0, q)
    for h in range(KV_HEADS):
        heads = q[0, :, h * GROUP : (h + 1) * GROUP].double()
        logits = torch.einsum("qgd,td->gqt", turn(heads, 0)[0], turn(text.k[0, :, [h]].double(), 0)[0, :, 0]) / 4
        weights = logits.masked_fill(torch.ones(90, 90).triu(1).bool(), -torch.inf).softmax(-1)
        best = weights.sum((0, 1))[:86].topk(26).indices.sort().values.tolist()
        assert positions(held_by(cache, 0, 0, h)[0], text.k[0, :, h]) == [*best, 86, 87, 88, 89]


@pytest.mark.parametrize("rotate", [False, True])
def test_keydiff_compares_keys_with_keys(rotate):
    """Also where the cache holds them under the Hadamard transform."""
    cache = lcore.PagedCache(1, 1, DIM, dtype=torch.float32, kv_format="fp32", page_size=16, rotate=rotate,
                             policy=policies.KeyDiff(20, sinks=0, window=0))  # fmt: skip
    k, v = random_kv(1, 80, 1, DIM)
    k[0, ::2] += 2  # every second one is like the mean
    cache.append(0, k, v)
    cache.attend(0, torch.randn(1, 80, 1, DIM))
    unit = torch.nn.functional.normalize(k[0, :, 0].double(), dim=-1)
    worst = (unit @ unit.sum(0)).topk(20, largest=False).indices.sort().values
    held = held_by(cache, 0, 0, 0)[0]
    held = lcore.hadamard(held[:, None], inverse=True)[:, 0] if rotate else held
    torch.testing.assert_close(held, k[0, worst, 0], rtol=1e-5, atol=1e-5)


REFUSED = [
    (lambda: policies.StreamingLLM(99, reindex=1), TypeError, "StreamingLLM: reindex must be a bool, got 1"),
    (lambda: lcore.PagedCache(1, 2, 16, policy=policies.StreamingLLM(99, reindex=True)), ValueError,
     "PagedCache: rope must be given for a policy with reindex=True, which needs keys before RoPE; a model's new_cache "
     "does, got None"),
    (lambda: new_cache(policies.StreamingLLM(99)), ValueError,
     "PagedCache: policy.reindex must be True with rope: keys before RoPE are read at their places in the cache, which "
     "evictions change, got False"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), [pytest.param(*case, id=case[2][:60]) for case in REFUSED])
def test_refusals(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == f"lcore.{message}"
